"""Trace context for outgoing calls: the only place that knows OpenTelemetry, which need not be installed."""

from __future__ import annotations

try:
    from opentelemetry.propagate import inject
except ImportError:  # Not installed: no trace context is sent.

    def trace_metadata() -> tuple[tuple[str, str], ...]:
        """Return nothing: OpenTelemetry is not installed."""
        return ()

else:

    def trace_metadata() -> tuple[tuple[str, str], ...]:
        """Return the headers that carry the current span's context (``traceparent`` and the like)."""
        carrier: dict[str, str] = {}
        inject(carrier)
        return tuple((name.lower(), value) for name, value in carrier.items())


__all__ = ["trace_metadata"]
