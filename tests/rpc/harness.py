"""A real gRPC server around an engine without a model, and what tests ask of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from prometheus_client import CollectorRegistry

from kvserve.v1 import cache_admin_pb2_grpc, generate_pb2_grpc, predict_pb2_grpc
from kvserve.v1 import generate_pb2 as pb
from server.engine.admin_messages import AdminCall, AdminOp, AdminProgress, AdminResult, CacheEvents
from server.engine.desk import Desk
from server.engine.fake import fake_ready
from server.engine.interface import Engine, EngineState, ModelControl
from server.engine.messages import Cancel, EngineReady, EngineStats, GenerateSpec, Submit, ToEngine
from server.engine.streams import Event, EventStream
from server.predict.interface import PredictBackend
from server.rpc.auth import ApiKey, Authenticator
from server.rpc.call import CallObserver
from server.rpc.front_end import FrontEnd, FrontEndOptions
from server.rpc.interceptor import CallLimits
from server.rpc.listener import ListenOptions
from server.rpc.model_files import load_model_files
from server.rpc.tokenizer import ModelTokenizer
from server.telemetry.metrics import EngineCollector, FrontEndMetrics
from server.telemetry.predict_metrics import PredictMetrics

MODEL_NAME = "tiny"
TOKENIZER = ModelTokenizer(load_model_files("builtin"))
READY = fake_ready(vocab_size=3072, max_model_length=1024, num_blocks=256)


class ScriptedEngine:
    """Answers every submission with the events that a script returns for it; records what it was sent."""

    def __init__(
        self, script: Callable[[Submit], Sequence[Event]] = lambda submit: (), ready: EngineReady = READY
    ) -> None:
        self._script = script
        self._ready = ready
        self.desk = Desk(self._send)
        self.submitted: list[Submit] = []
        self.asked: list[AdminOp] = []
        """Operations on the cache; none is ever answered."""
        self.cancelled: list[Cancel] = []

    @property
    def state(self) -> EngineState:
        return self.desk.state.value

    @property
    def ready(self) -> EngineReady | None:
        return None if self.state is EngineState.LOADING else self._ready

    @property
    def stats(self) -> EngineStats | None:
        return None

    async def start(self) -> None:
        self.desk.state.set(EngineState.READY)

    def submit(self, spec: GenerateSpec, *, deadline_s: float | None = None) -> EventStream:
        return self.desk.submit(spec, deadline_s)

    async def administer(self, op: AdminOp) -> AdminResult:
        return await self.desk.admin.administer(op)

    def administer_with_progress(self, op: AdminOp) -> AsyncGenerator[AdminProgress | AdminResult]:
        return self.desk.admin.administer_with_progress(op)

    def watch(self) -> AsyncGenerator[CacheEvents]:
        return self.desk.admin.watch()

    async def wait_state(self, state: EngineState) -> None:
        await self.desk.state.wait(state)

    async def stop(self, *, grace_s: float) -> None:
        self.desk.state.set(EngineState.DEAD)

    def _send(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self.submitted.append(message)
            self.desk.streams.dispatch(list(self._script(message)))
        elif isinstance(message, Cancel):
            self.cancelled.append(message)
        elif isinstance(message, AdminCall):
            self.asked.append(message.op)


@dataclass
class Server:
    """A running server and a channel to it."""

    front_end: FrontEnd
    port: int
    channel: Any  # as grpc.aio types it, every call would have to be annotated
    registry: CollectorRegistry

    @property
    def stub(self) -> Any:
        return generate_pb2_grpc.GenerateServiceStub(self.channel)

    @property
    def admin(self) -> Any:
        return cache_admin_pb2_grpc.CacheAdminServiceStub(self.channel)

    @property
    def predict(self) -> Any:
        return predict_pb2_grpc.PredictServiceStub(self.channel)

    @property
    def health(self) -> Any:
        return health_pb2_grpc.HealthStub(self.channel)

    def sample(self, name: str, labels: dict[str, str] | None = None) -> float | None:
        return self.registry.get_sample_value(name, labels or {})


@asynccontextmanager
async def serving(
    engine: Engine,
    *,
    keys: Sequence[ApiKey] = (),
    limits: CallLimits = CallLimits(),  # noqa: B008
    listen: ListenOptions = ListenOptions(port=0),  # noqa: B008
    write_timeout_s: float = 10.0,
    observers: Sequence[CallObserver] = (),
    started: bool = True,
    model_control: ModelControl | None = None,
    predict: PredictBackend | None = None,
) -> AsyncIterator[Server]:
    """Run a front end around ``engine`` and ``predict`` and connect to it."""
    if started:
        await engine.start()
    registry = CollectorRegistry()
    metrics = FrontEndMetrics(registry, model_name=MODEL_NAME)
    registry.register(EngineCollector(engine, model_name=MODEL_NAME))
    front_end = FrontEnd(
        engine,
        TOKENIZER,
        FrontEndOptions(MODEL_NAME, listen, limits, write_timeout_s),
        authenticator=Authenticator(keys),
        observer=metrics,
        call_observers=(metrics, *observers),
        model_control=model_control,
        predict=predict,
        predict_observer=PredictMetrics(registry),
    )
    port = await front_end.start()
    async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            yield Server(front_end, port, channel, registry)
        finally:
            await front_end.shut_down(grace_s=0.0)


@dataclass
class Refusal:
    """A status other than OK, taken apart."""

    code: grpc.StatusCode
    message: str
    fields: dict[str, str]
    reason: str | None
    retry_after_s: float | None
    pushback_ms: str | None


def refusal_of(error: aio.AioRpcError) -> Refusal:
    metadata: dict[str, Any] = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))
    refusal = Refusal(
        error.code(),
        error.details() or "",
        {},
        None,
        None,
        metadata.get("grpc-retry-pushback-ms"),
    )
    for detail in status.details:
        bad_request, info, retry = (
            error_details_pb2.BadRequest(),
            error_details_pb2.ErrorInfo(),
            error_details_pb2.RetryInfo(),
        )
        if detail.Unpack(bad_request):
            refusal.fields = {
                violation.field: violation.description for violation in bad_request.field_violations
            }
        elif detail.Unpack(info):
            assert info.domain == "kvserve"
            refusal.reason = info.reason
        elif detail.Unpack(retry):
            refusal.retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9
    return refusal


async def refused(call: Any) -> Refusal:
    """Await a unary call, or read a stream to its end, that must fail; return how."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not aio.EOF:
                pass
        else:
            await call
    except aio.AioRpcError as error:
        return refusal_of(error)
    raise AssertionError("the call succeeded")


async def collect(call: AsyncIterator[pb.GenerateEvent]) -> list[pb.GenerateEvent]:
    return [event async for event in call]


def request(**fields: object) -> pb.GenerateRequest:
    """Return a small request; ``parameters`` may be a dict."""
    fields.setdefault("token_ids", {"ids": [10, 20, 30]})
    if fields["token_ids"] is None:
        del fields["token_ids"]
    return pb.GenerateRequest(**fields)  # type: ignore[arg-type]
