"""OpenTelemetry spans of calls; imported only where an OTLP endpoint is configured.

The batch processor's queue is bounded and drops when a collector is slow or gone: tracing never delays a
call.
"""

from __future__ import annotations

import re

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.rpc.call import Call

__all__ = ["CallTracer", "otlp_processor"]

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_SERVER_FAULTS = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
"""Codes that make a server span an error, after the RPC conventions; the others are the client's doing."""


def otlp_processor(endpoint: str) -> SpanProcessor:
    """Return a processor that exports to an OTLP/gRPC collector at ``http(s)://host:port``."""
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"), timeout=5)
    return BatchSpanProcessor(exporter, max_queue_size=2048, max_export_batch_size=512)


class CallTracer:
    """Makes one server span of each call; implements ``CallObserver``."""

    def __init__(self, processor: SpanProcessor) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "kvserve"}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kvserve")
        self._propagator = TraceContextTextMapPropagator()
        self._spans: dict[int, Span] = {}

    def begin(self, call: Call, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
        """Start the call's span, under the client's if it names one properly."""
        parents = [value for name, value in metadata if name == "traceparent"]
        context = None
        if len(parents) == 1 and isinstance(parents[0], str) and _TRACEPARENT.fullmatch(parents[0]):
            context = self._propagator.extract({"traceparent": parents[0]})
        service, _, method = call.method.strip("/").rpartition("/")
        self._spans[id(call)] = self._tracer.start_span(
            f"{service}/{method}",
            context=context,
            kind=SpanKind.SERVER,
            attributes={"rpc.system.name": "grpc", "rpc.method": f"{service}/{method}"},
        )

    def end(self, call: Call, code: grpc.StatusCode) -> None:
        """End the call's span with its true status, cancelled and late calls included."""
        span = self._spans.pop(id(call), None)
        if span is None:
            return
        span.set_attribute("rpc.response.status_code", code.name)
        for name, value in call.attributes.items():
            span.set_attribute(name, value)
        if call.received_s:
            span.set_attribute("kvserve.receive_s", call.received_s - call.started_s)
        if call.request_id:
            span.set_attribute("kvserve.request_id", call.request_id)
        if code in _SERVER_FAULTS:
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def close(self) -> None:
        """Export what is left; waits a few seconds at most."""
        self._provider.shutdown()
