"""Put the server together and run it: engine and predict processes, front end, telemetry, signals.

::

    check the port -> spawn processes -> (no gRPC object exists before this line) -> tokenizer, gRPC server
                      '--- load their models ---------------------------------------> READY: "ready on ..."

While the model loads the server listens already: health says NOT_SERVING, calls are refused with UNAVAILABLE.
The first SIGTERM or SIGINT drains and ends with 0; the second ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from server.banner import banner
from server.config import ServerConfig
from server.engine.errors import EngineStartError
from server.engine.model_slot import ModelSlot
from server.engine.process import EngineProcess
from server.logs import configure_logs
from server.predict.process import BUSY_SILENCE_S, PredictProcess, PredictStartError
from server.process.child import ChildLimits
from server.rpc.call import CallObserver
from server.rpc.listener import ListenError, ListenOptions, TlsFiles, check_port_free
from server.rpc.model_files import ModelFilesError, load_model_files
from server.rpc.tokenizer import ModelTokenizer
from server.telemetry.loop_lag import watch_loop_lag
from server.telemetry.metrics import EngineCollector, FrontEndMetrics, MetricsServer
from server.telemetry.predict_metrics import PredictCollector, PredictMetrics
from server.telemetry.process_metrics import ProcessCollector, ProcessCounts

if TYPE_CHECKING:
    from server.rpc.front_end import FrontEndOptions
    from server.telemetry.tracing import CallTracer

__all__ = ["serve"]

_log = logging.getLogger(__name__)


class StartError(Exception):
    """The server cannot start; the text is for the operator."""


def serve(config: ServerConfig) -> int:
    """Run until stopped; return the exit code: 0 after a drain, 1 if the server could not start."""
    configure_logs(format_name=config.log_format, level=config.log_level)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_Application(config).run())


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return None
    return uvloop.Loop


@dataclass(slots=True)
class _Telemetry:
    registry: CollectorRegistry
    metrics: FrontEndMetrics
    predict: PredictMetrics
    tracer: CallTracer | None = None
    server: MetricsServer | None = None

    @property
    def call_observers(self) -> tuple[CallObserver, ...]:
        return (self.metrics,) if self.tracer is None else (self.metrics, self.tracer)


class _StopSignals:
    """Counts SIGTERM and SIGINT: the first asks, the second ends the process."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self.asked.is_set():
            _say(f"second {number.name}: ending at once")
            # The engine process ends by itself when its socket closes.
            os._exit(128 + number)
        self.asked.set()


@dataclass(slots=True)
class _Application:
    config: ServerConfig
    started_s: float = field(default_factory=time.perf_counter)

    async def run(self) -> int:
        signals = _StopSignals()
        try:
            await self._run(signals)
        except (StartError, EngineStartError, PredictStartError, ListenError, ModelFilesError) as error:
            sys.stderr.write(f"kvserve: error: {error}\n")
            return 1
        return 0

    async def _run(self, signals: _StopSignals) -> None:
        config = self.config
        check_port_free(config.host, config.port)
        _say(f"loading {config.model}")
        if config.is_open_to_others:
            _log.warning("no API keys are configured and the server is reachable from other machines")
        engine = ModelSlot(
            lambda: EngineProcess(
                config.engine_options(),
                limits=_limits(config),
                log_format=config.log_format,
                log_level=config.log_level,
                quarantine_s=config.quarantine,
            )
        )
        predict = None
        if config.predict == "on":
            predict = PredictProcess(
                config.predict_options(),
                limits=_limits(config, busy_silence_s=BUSY_SILENCE_S),
                log_format=config.log_format,
                log_level=config.log_level,
                quarantine_s=config.quarantine,
            )
        starts = [asyncio.create_task(engine.start(), name="engine-start")]
        if predict is not None:
            starts.append(asyncio.create_task(predict.start(), name="predict-start"))
        starting = asyncio.create_task(_all_of(starts), name="start")
        try:
            await asyncio.sleep(0)  # the processes are spawned now, before any gRPC object exists
            tokenizer = await _unless(signals, starting, asyncio.to_thread(_load_tokenizer, config))
            if tokenizer is not None:
                async with self._telemetry(engine, predict) as telemetry:
                    await self._serve(engine, predict, tokenizer, telemetry, starting, signals)
        finally:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError, EngineStartError, PredictStartError):
                await starting
            await engine.stop(grace_s=0.0)
            if predict is not None:
                await predict.stop(grace_s=0.0)

    async def _serve(
        self,
        engine: ModelSlot,
        predict: PredictProcess | None,
        tokenizer: ModelTokenizer,
        telemetry: _Telemetry,
        starting: asyncio.Task[None],
        signals: _StopSignals,
    ) -> None:
        from server.rpc.auth import Authenticator
        from server.rpc.front_end import FrontEnd

        config = self.config
        front_end = FrontEnd(
            engine,
            tokenizer,
            _front_end_options(config),
            authenticator=Authenticator(config.api_keys),
            observer=telemetry.metrics,
            call_observers=telemetry.call_observers,
            model_control=engine,
            predict=predict,
            predict_observer=telemetry.predict,
        )
        port = await front_end.start()
        grace_s = 0.0
        try:
            stopping = asyncio.create_task(signals.asked.wait())
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                if engine.ready is not None:
                    # What is there now stays. Looked through for garbage every few seconds under load, it
                    # would hold every call up for 50 ms.
                    gc.collect()
                    gc.freeze()
                    lines = banner(config, engine.ready, None if predict is None else predict.ready)
                    _say_ready(config, lines, port, telemetry, time.perf_counter() - self.started_s)
            await stopping
            grace_s = config.grace
            if front_end.num_active_calls:
                _say(f"stopping: {front_end.num_active_calls} calls have {grace_s:g} s to finish")
        finally:
            await front_end.shut_down(grace_s=grace_s)
        _say("stopped")

    @asynccontextmanager
    async def _telemetry(
        self, engine: ModelSlot, predict: PredictProcess | None
    ) -> AsyncIterator[_Telemetry]:
        config = self.config
        registry = CollectorRegistry()
        telemetry = _Telemetry(
            registry, FrontEndMetrics(registry, model_name=config.model_name), PredictMetrics(registry)
        )
        registry.register(EngineCollector(engine, model_name=config.model_name))
        kept: dict[str, ProcessCounts] = {"engine": engine}
        if predict is not None:
            registry.register(PredictCollector(predict))
            kept["predict"] = predict
        registry.register(ProcessCollector(kept))
        lag_watch = asyncio.create_task(watch_loop_lag(telemetry.metrics.loop_lag), name="loop-lag")
        try:
            if config.metrics_port is not None:
                telemetry.server = _listen_for_metrics(registry, config.metrics_host, config.metrics_port)
            if config.otlp_endpoint is not None:
                telemetry.tracer = _make_tracer(config.otlp_endpoint)
            yield telemetry
        finally:
            lag_watch.cancel()
            if telemetry.server is not None:
                await asyncio.to_thread(telemetry.server.close)
            if telemetry.tracer is not None:
                await asyncio.to_thread(telemetry.tracer.close)


async def _all_of(tasks: list[asyncio.Task[None]]) -> None:
    """Wait for all; raise what the first that fails raises, and end the others then."""
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _unless(
    signals: _StopSignals, starting: asyncio.Task[None], work: Coroutine[Any, Any, ModelTokenizer]
) -> ModelTokenizer | None:
    """Return what ``work`` returns; None if a signal comes first. Raises if the engine fails first."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(signals.asked.wait())
    try:
        waiting: set[asyncio.Future[Any]] = {task, stopping, starting}
        while not task.done() and not stopping.done():
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if starting in waiting and starting.done():
                starting.result()
                waiting.discard(starting)
        return task.result() if task.done() else None
    finally:
        stopping.cancel()
        task.cancel()


def _limits(config: ServerConfig, *, busy_silence_s: float = 5.0) -> ChildLimits:
    return ChildLimits(
        watchdog_s=config.watchdog,
        silence_s=config.silence,
        busy_silence_s=max(config.silence, busy_silence_s),
    )


def _load_tokenizer(config: ServerConfig) -> ModelTokenizer:
    tokenizer = ModelTokenizer(load_model_files(config.model, revision=config.revision))
    tokenizer.warm_up()
    return tokenizer


def _front_end_options(config: ServerConfig) -> FrontEndOptions:
    from server.rpc.front_end import FrontEndOptions
    from server.rpc.interceptor import CallLimits

    tls = None
    if config.tls_certificate is not None and config.tls_key is not None:
        tls = TlsFiles(config.tls_certificate, config.tls_key, config.tls_client_ca)
    return FrontEndOptions(
        model_name=config.model_name,
        listen=ListenOptions(
            host=config.host,
            port=config.port,
            tls=tls,
            max_message_bytes=config.max_message_size,
            max_concurrent_rpcs=2 * (config.max_running + config.max_waiting) + 256,
            max_call_s=config.max_call_time,
        ),
        call_limits=CallLimits(config.receive_timeout, config.max_call_time),
        write_timeout_s=config.write_timeout,
        reflection=config.reflection == "on" or (config.reflection == "auto" and not config.api_keys),
    )


def _listen_for_metrics(registry: CollectorRegistry, host: str, port: int) -> MetricsServer:
    try:
        return MetricsServer(registry, host=host, port=port)
    except OSError as error:
        raise StartError(f"cannot serve metrics on {host}:{port}: {error.strerror or error}") from error


def _make_tracer(endpoint: str) -> CallTracer:
    try:
        from server.telemetry.tracing import CallTracer, otlp_processor
    except ImportError as error:
        raise StartError("--otlp-endpoint needs the packages of the extra 'otlp'") from error
    return CallTracer(otlp_processor(endpoint))


def _say_ready(
    config: ServerConfig, lines: list[str], port: int, telemetry: _Telemetry, elapsed_s: float
) -> None:
    for line in lines:
        _say(line)
    if telemetry.server is not None:
        _say(f"metrics   http://{config.metrics_host}:{telemetry.server.port}/metrics")
    security = ("TLS" if config.tls_certificate else "plaintext") + (
        ", keys" if config.api_keys else ", no keys"
    )
    _say(f"ready on {config.host}:{port} in {elapsed_s:.1f} s ({security})")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
