"""Limits of the transport, TLS and traces."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio

from kvserve.v1 import generate_pb2 as pb
from kvserve.v1 import generate_pb2_grpc
from server.engine.fake import FakeEngine
from server.rpc.listener import ListenError, ListenOptions, TlsFiles, check_port_free
from tests.rpc.harness import READY, ScriptedEngine, refused, request, serving

Code = grpc.StatusCode


async def test_small_bytes_that_inflate_to_large_messages_are_refused() -> None:
    async with serving(ScriptedEngine()) as server:
        options = [("grpc.max_send_message_length", -1)]
        async with aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            call: Any = channel.unary_unary("/kvserve.v1.GenerateService/Generate")
            refusal = await refused(call(b"a" * (20 << 20), compression=grpc.Compression.Gzip))
    assert refusal.code is Code.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("metadata", [[("k", "v" * 17 * 1024)], [(f"k{i}", "v" * 20) for i in range(1000)]])
async def test_too_much_metadata_is_refused(metadata: list[tuple[str, str]]) -> None:
    async with serving(ScriptedEngine()) as server:
        refusal = await refused(server.stub.Generate(request(), metadata=metadata))
    assert refusal.code is Code.RESOURCE_EXHAUSTED


async def test_connection_serves_100_streams_at_a_time() -> None:
    engine = ScriptedEngine()
    async with serving(engine) as server:
        calls = [server.stub.Generate(request()) for _ in range(150)]
        async with asyncio.timeout(60):
            while len(engine.submitted) < 100:
                await asyncio.sleep(0.001)
            # A call on a connection of its own is not held up.
            own = [("grpc.use_local_subchannel_pool", 1)]
            async with aio.insecure_channel(f"127.0.0.1:{server.port}", options=own) as channel:
                await generate_pb2_grpc.GenerateServiceStub(channel).GetModelInfo(pb.GetModelInfoRequest())
        assert len(engine.submitted) == 100
        for call in calls:
            call.cancel()


async def test_noise_on_the_port_harms_nobody() -> None:
    async with serving(FakeEngine(ready=READY)) as server:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + b"\0" * 200, b"\xff" * 4096):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(noise)
            async with asyncio.timeout(60):
                await reader.read(-1)  # closed by the server
            writer.close()
        await server.stub.Generate(request(parameters={"max_new_tokens": 2}))


def test_port_that_is_taken_is_found_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            check_port_free("127.0.0.1", port)
    check_port_free("127.0.0.1", port)
    with pytest.raises(ListenError, match="cannot listen on"):
        check_port_free("192.0.2.1", 50051)


async def test_two_servers_cannot_share_a_port() -> None:
    async with serving(ScriptedEngine()) as server:
        with pytest.raises(ListenError, match="in use"):
            async with serving(ScriptedEngine(), listen=ListenOptions(port=server.port)):
                pass


def make_certificates(folder: Path) -> None:
    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = (
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    )
    openssl(*new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
    for name in ("server", "client"):
        extra = ("-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=CA:FALSE")
        openssl(
            *new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", *extra,
            "-CA", "ca.pem", "-CAkey", "ca.key",
        )  # fmt: skip


async def test_tls_with_client_certificates(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make certificates")
    make_certificates(tmp_path)
    files = TlsFiles(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    listen = ListenOptions(port=0, tls=files)

    def credentials(name: str | None) -> grpc.ChannelCredentials:
        ca = (tmp_path / "ca.pem").read_bytes()
        if name is None:
            return grpc.ssl_channel_credentials(ca)
        key, certificate = (tmp_path / f"{name}.key").read_bytes(), (tmp_path / f"{name}.pem").read_bytes()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    async with serving(FakeEngine(ready=READY), listen=listen) as server:
        async with aio.secure_channel(f"localhost:{server.port}", credentials("client")) as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            await stub.Generate(request(parameters={"max_new_tokens": 1}))
        async with aio.secure_channel(f"localhost:{server.port}", credentials(None)) as channel:
            stub = generate_pb2_grpc.GenerateServiceStub(channel)
            assert (await refused(stub.Generate(request(), timeout=5))).code is Code.UNAVAILABLE
        assert (await refused(server.stub.Generate(request(), timeout=5))).code is Code.UNAVAILABLE


def test_missing_certificate_is_named(tmp_path: Path) -> None:
    from server.rpc.listener import bind

    async def run() -> None:
        from server.rpc.listener import make_server

        options = ListenOptions(port=0, tls=TlsFiles(tmp_path / "no.pem", tmp_path / "no.key"))
        server = make_server(options, [])
        try:
            with pytest.raises(ListenError, match=r"cannot read .*no\.pem: No such file"):
                bind(server, options)
        finally:
            await server.stop(None)

    asyncio.run(run())


async def test_calls_leave_spans_with_their_true_status() -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="needs the extra 'otlp'")
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    from server.telemetry.tracing import CallTracer

    class Kept(SpanExporter):
        def __init__(self) -> None:
            self.spans: list[ReadableSpan] = []

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self.spans += spans
            return SpanExportResult.SUCCESS

    kept = Kept()
    tracer = CallTracer(SimpleSpanProcessor(kept))
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    async with serving(FakeEngine(ready=READY, step_s=0.001), observers=[tracer]) as server:
        done = request(parameters={"max_new_tokens": 3})
        await server.stub.Generate(done, metadata=[("traceparent", parent)])
        await server.stub.Generate(done, metadata=[("traceparent", "x" * 5000)])
        long = request(parameters={"max_new_tokens": 900})
        await refused(server.stub.Generate(long, timeout=0.5))
        cancelled = server.stub.StreamGenerate(long)
        await cancelled.read()
        cancelled.cancel()
        await refused(server.stub.Generate(pb.GenerateRequest()))
        async with asyncio.timeout(60):
            while len(kept.spans) < 5:
                await asyncio.sleep(0.001)
    tracer.close()
    by_status: dict[Any, ReadableSpan] = {}
    for span in kept.spans:
        by_status.setdefault((span.attributes or {})["rpc.response.status_code"], span)
    assert set(by_status) == {"OK", "DEADLINE_EXCEEDED", "CANCELLED", "INVALID_ARGUMENT"}
    first = kept.spans[0]
    assert first.name == "kvserve.v1.GenerateService/Generate"
    assert first.parent is not None
    assert f"{first.parent.trace_id:032x}" == parent[3:35]
    assert kept.spans[1].parent is None
    assert first.attributes is not None
    assert first.attributes["gen_ai.usage.output_tokens"] == 3
    assert by_status["DEADLINE_EXCEEDED"].status.is_ok is False
    assert (
        by_status["INVALID_ARGUMENT"].status.is_ok is False or by_status["INVALID_ARGUMENT"].status.is_unset
    )
