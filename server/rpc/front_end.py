"""The front end as one object: services, interceptor, health and reflection around an engine and predict."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvserve.v1 import (
    cache_admin_pb2,
    cache_admin_pb2_grpc,
    generate_pb2,
    generate_pb2_grpc,
    predict_pb2,
    predict_pb2_grpc,
)
from server.engine.interface import Engine, ModelControl
from server.predict.interface import PredictBackend
from server.rpc.auth import Authenticator
from server.rpc.cache_admin_service import CacheAdminService
from server.rpc.cache_watch import WatchHub, WatchObserver
from server.rpc.call import CallObserver
from server.rpc.generate_service import GenerateService, GenerationObserver, ServiceLimits
from server.rpc.health import HealthReporter
from server.rpc.interceptor import CallInterceptor, CallLimits
from server.rpc.listener import ListenOptions, Services, bind, make_server
from server.rpc.oip import open_inference_pb2, open_inference_pb2_grpc
from server.rpc.oip.off import InferenceOff
from server.rpc.oip.service import InferenceService
from server.rpc.predict_service import PredictLimits, PredictObserver, PredictService
from server.rpc.served_model import ServedModel
from server.rpc.tokenizer import ModelTokenizer

__all__ = ["FrontEnd", "FrontEndObserver", "FrontEndOptions"]

_CLOSING_S = 0.5
_LAST_MESSAGES_S = 2.0
"""For calls that the engine has ended to hand over their last message or status."""


@dataclass(frozen=True, slots=True)
class FrontEndOptions:
    """How the front end serves."""

    model_name: str
    listen: ListenOptions = field(default_factory=ListenOptions)
    call_limits: CallLimits = field(default_factory=CallLimits)
    write_timeout_s: float = 10.0
    reflection: bool = True
    num_tokenizer_threads: int = 2
    max_predict_inputs: int = 4096
    """Of one call."""


class FrontEndObserver(GenerationObserver, WatchObserver, Protocol):
    """Sees what the services do: metrics."""


class FrontEnd:
    """Create it inside the event loop; ``start``, then ``shut_down``."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: ModelTokenizer,
        options: FrontEndOptions,
        *,
        authenticator: Authenticator,
        observer: FrontEndObserver,
        call_observers: Sequence[CallObserver] = (),
        model_control: ModelControl | None = None,
        predict: PredictBackend | None = None,
        predict_observer: PredictObserver | None = None,
    ) -> None:
        """``model_control`` loads and unloads the model of ``engine``; None: it stays loaded.

        Without ``predict`` the methods of predict answer that the server is not configured for them.
        """
        self._engine = engine
        self._predict = predict
        self._options = options
        self._pool = ThreadPoolExecutor(options.num_tokenizer_threads, thread_name_prefix="tokenizer")
        self._health = HealthReporter(engine, predict)
        self._follower: asyncio.Task[None] | None = None
        self._interceptor = CallInterceptor(
            authenticator, limits=options.call_limits, observers=call_observers
        )
        self._model = ServedModel(engine, tokenizer, name=options.model_name, executor=self._pool)
        self._hub = WatchHub(engine, observer=observer)
        limits = ServiceLimits(options.write_timeout_s, options.listen.max_message_bytes)
        generate_service = GenerateService(self._model, limits=limits, observer=observer)
        admin_service = CacheAdminService(
            self._model,
            hub=self._hub,
            control=model_control,
            tenants=authenticator,
            limits=limits,
            predict=predict,
        )
        self._predict_service = PredictService(
            predict,
            limits=PredictLimits(
                options.max_predict_inputs, options.write_timeout_s, options.listen.max_message_bytes
            ),
            observer=predict_observer,
        )
        self._server = make_server(options.listen, [self._interceptor])
        services = Services(self._server)
        generate_pb2_grpc.add_GenerateServiceServicer_to_server(generate_service, services)
        cache_admin_pb2_grpc.add_CacheAdminServiceServicer_to_server(admin_service, services)
        predict_pb2_grpc.add_PredictServiceServicer_to_server(self._predict_service, services)
        self._inference_service: InferenceService | None = None
        if predict is not None:
            self._inference_service = InferenceService(
                predict,
                max_inputs=options.max_predict_inputs,
                write_timeout_s=options.write_timeout_s,
                max_message_bytes=options.listen.max_message_bytes,
                observer=predict_observer,
            )
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
            self._inference_service or InferenceOff(), services
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, services)
        if options.reflection:
            self._add_reflection(services)

    @property
    def num_active_calls(self) -> int:
        """Return how many calls are being served, health checks apart."""
        return self._interceptor.num_active

    async def start(self) -> int:
        """Listen and serve; return the port. Raises ``ListenError``."""
        port = bind(self._server, self._options.listen)
        self._follower = asyncio.create_task(self._health.follow(), name="health")
        await self._server.start()
        return port

    async def shut_down(self, *, grace_s: float) -> None:
        """Turn health, refuse new calls, let running ones finish for ``grace_s``, then end everything.

        Stops the engine and predict too: they are what knows which requests run. Ends early when nothing runs
        any more.
        """
        if self._follower is not None:
            self._follower.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._follower
        await self._health.shut_down()
        self._model.drain()
        self._predict_service.drain()
        if self._inference_service is not None:
            self._inference_service.drain()
        await self._hub.close()
        stopping = [self._engine.stop(grace_s=grace_s)]
        if self._predict is not None:
            stopping.append(self._predict.stop(grace_s=grace_s))
        await asyncio.gather(*stopping)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._interceptor.wait_idle(), _LAST_MESSAGES_S)
        # Short: answers on their way out need it, and health watchers hold all of it.
        await self._server.stop(grace=_CLOSING_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _add_reflection(self, services: Services) -> None:
        from grpc_reflection.v1alpha import reflection

        names = [
            generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name,
            cache_admin_pb2.DESCRIPTOR.services_by_name["CacheAdminService"].full_name,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ]
        if self._predict is not None:
            names.append(predict_pb2.DESCRIPTOR.services_by_name["PredictService"].full_name)
            names.append(open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name)
        reflection.enable_server_reflection(names, services)
