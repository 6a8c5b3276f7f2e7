"""Metrics, logs and traces. OpenTelemetry is imported in ``tracing`` alone."""
