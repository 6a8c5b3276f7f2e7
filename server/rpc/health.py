"""``grpc.health.v1`` that follows the engine: SERVING exactly while requests are taken.

The administration is SERVING as long as the server listens: a model that is not loaded is loaded through it.
"""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health, health_pb2
from grpc_health.v1.health import aio as health_aio

from server.engine.interface import Engine, EngineState

__all__ = ["HealthReporter"]

_SERVICES = (health.OVERALL_HEALTH, "kvserve.v1.GenerateService")
_ADMIN_SERVICE = "kvserve.v1.CacheAdminService"


class HealthReporter:
    """Keeps the health service in step with an engine. ``servicer`` is what gets registered."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.servicer = health_aio.HealthServicer()

    async def follow(self) -> None:
        """Report every change of the engine's state, until cancelled."""
        await self.servicer.set(_ADMIN_SERVICE, health_pb2.HealthCheckResponse.SERVING)
        while True:
            state = self._engine.state
            await self._report(state)
            others = [
                asyncio.ensure_future(self._engine.wait_state(other))
                for other in EngineState
                if other is not state
            ]
            try:
                if self._engine.state is state:
                    await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for waiter in others:
                    waiter.cancel()

    async def shut_down(self) -> None:
        """Report NOT_SERVING from now on, whatever the engine does."""
        await self.servicer.enter_graceful_shutdown()

    async def _report(self, state: EngineState) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        for service in _SERVICES:
            await self.servicer.set(service, serving if state is EngineState.READY else not_serving)
