"""``grpc.health.v1`` that follows the engine: SERVING exactly while requests are taken.

The administration is SERVING as long as the server listens: a model that is not loaded is loaded through it.
Predict has a process of its own and follows that one.
"""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health, health_pb2
from grpc_health.v1.health import aio as health_aio

from server.engine.interface import Engine, EngineState
from server.predict.interface import PredictBackend, PredictState

__all__ = ["HealthReporter"]

_SERVICES = (health.OVERALL_HEALTH, "kvserve.v1.GenerateService")
_ADMIN_SERVICE = "kvserve.v1.CacheAdminService"
_PREDICT_SERVICE = "kvserve.v1.PredictService"
_PREDICT_INTERVAL_S = 0.2


class HealthReporter:
    """Keeps the health service in step with an engine. ``servicer`` is what gets registered."""

    def __init__(self, engine: Engine, predict: PredictBackend | None = None) -> None:
        self._engine = engine
        self._predict = predict
        self.servicer = health_aio.HealthServicer()

    async def follow(self) -> None:
        """Report every change of the engine's and of predict's state, until cancelled."""
        await self.servicer.set(_ADMIN_SERVICE, health_pb2.HealthCheckResponse.SERVING)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_engine())
            if self._predict is not None:
                group.create_task(self._follow_predict(self._predict))

    async def _follow_engine(self) -> None:
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

    async def _follow_predict(self, predict: PredictBackend) -> None:
        reported: PredictState | None = None
        while True:
            if predict.state is not reported:
                reported = predict.state
                status = (
                    health_pb2.HealthCheckResponse.SERVING
                    if reported is PredictState.READY
                    else health_pb2.HealthCheckResponse.NOT_SERVING
                )
                await self.servicer.set(_PREDICT_SERVICE, status)
            await asyncio.sleep(_PREDICT_INTERVAL_S)

    async def shut_down(self) -> None:
        """Report NOT_SERVING from now on, whatever the engine does."""
        await self.servicer.enter_graceful_shutdown()

    async def _report(self, state: EngineState) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        for service in _SERVICES:
            await self.servicer.set(service, serving if state is EngineState.READY else not_serving)
