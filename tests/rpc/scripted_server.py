"""A real gRPC server on loopback that does what a test tells it to: for tests of the client."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from kvserve.testing import events
from kvserve.v1 import cache_admin_pb2_grpc, generate_pb2, generate_pb2_grpc
from tests.rpc.scripted_cache import ScriptedCache

Context = Any  # grpc.aio.ServicerContext: generic in its type stubs only.
StreamStory = Callable[[generate_pb2.GenerateRequest, Context], AsyncIterator[generate_pb2.GenerateEvent]]
UnaryStory = Callable[[generate_pb2.GenerateRequest, Context], Awaitable[generate_pb2.GenerateResponse]]


async def say_hello(request, context):
    for event in events("Hel", "lo", " world", prompt_tokens=20, cached_tokens=16):
        yield event


class ScriptedServicer(generate_pb2_grpc.GenerateServiceServicer):
    """Plays ``stream_story`` and ``unary_story``; remembers what it was asked and what was cancelled."""

    def __init__(self) -> None:
        self.stream_story: StreamStory = say_hello
        self.unary_story: UnaryStory | None = None
        self.requests: list[object] = []
        self.metadata: list[list[tuple[str, str | bytes]]] = []
        self.num_cancelled = 0
        self.num_running = 0
        self.cancelled = asyncio.Event()

    def _arrived(self, request, context) -> None:
        self.requests.append(request)
        self.metadata.append([(key, value) for key, value in context.invocation_metadata()])

    async def StreamGenerate(self, request, context):
        self._arrived(request, context)
        self.num_running += 1
        try:
            async for event in self.stream_story(request, context):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.num_cancelled += 1
            self.cancelled.set()
            raise
        finally:
            self.num_running -= 1

    async def Generate(self, request, context):
        self._arrived(request, context)
        try:
            if self.unary_story is not None:
                return await self.unary_story(request, context)
        except asyncio.CancelledError:
            self.num_cancelled += 1
            self.cancelled.set()
            raise
        return generate_pb2.GenerateResponse(
            request_id="r-1",
            model="scripted",
            seed=7,
            samples=[
                generate_pb2.Sample(
                    text="Hello",
                    token_ids=[1, 2],
                    finish_reason=generate_pb2.FINISH_REASON_LENGTH,
                )
            ],
        )

    async def Tokenize(self, request, context):
        self._arrived(request, context)
        return generate_pb2.TokenizeResponse(token_ids=list(request.text.encode()), max_model_length=4096)

    async def Detokenize(self, request, context):
        self._arrived(request, context)
        return generate_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def GetModelInfo(self, request, context):
        self._arrived(request, context)
        if request.model not in ("", "scripted"):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no model named {request.model!r}")
        return generate_pb2.ModelInfo(
            name="scripted", family="llama", num_parameters=3_574_528, block_size=16, eos_token_ids=[1, 6]
        )


class ScriptedServer:
    """The servicers, where they listen, and their health."""

    def __init__(self, servicer: ScriptedServicer, health_servicer: health.aio.HealthServicer) -> None:
        self.servicer = servicer
        self.cache = ScriptedCache()
        self._health = health_servicer
        self.target = ""

    async def set_serving(self) -> None:
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)

    async def set_not_serving(self) -> None:
        await self._health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)


@asynccontextmanager
async def scripted_server(*, port: int = 0) -> AsyncIterator[ScriptedServer]:
    """Serve on the running loop, on a free port unless told."""
    scripted = ScriptedServer(ScriptedServicer(), health.aio.HealthServicer())
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    generate_pb2_grpc.add_GenerateServiceServicer_to_server(scripted.servicer, server)
    cache_admin_pb2_grpc.add_CacheAdminServiceServicer_to_server(scripted.cache, server)
    health_pb2_grpc.add_HealthServicer_to_server(scripted._health, server)
    scripted.target = f"localhost:{server.add_insecure_port(f'127.0.0.1:{port}')}"
    await server.start()
    await scripted.set_serving()
    try:
        yield scripted
    finally:
        await server.stop(grace=None)
