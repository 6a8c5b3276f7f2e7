"""The standard health protocol (grpc.health.v1), without a dependency for two one-field messages.

The messages live in a descriptor pool of their own, so that ``grpcio-health-checking`` may be imported in
the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from kvserve._errors import DeadlineExceeded, Unavailable

__all__ = ["HealthCheckRequest", "HealthCheckResponse", "HealthStatus", "ReadyWait", "health_status"]


class HealthStatus(StrEnum):
    """What the server says of itself."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"


_BY_NUMBER = (
    HealthStatus.UNKNOWN,
    HealthStatus.SERVING,
    HealthStatus.NOT_SERVING,
    HealthStatus.SERVICE_UNKNOWN,
)


def _message_class(pool: descriptor_pool.DescriptorPool, name: str) -> Any:
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"grpc.health.v1.{name}"))


def _make_pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(
        name="kvserve_health.proto", package="grpc.health.v1", syntax="proto3"
    )
    field_types = descriptor_pb2.FieldDescriptorProto
    for message_name, field_name, field_type in (
        ("HealthCheckRequest", "service", field_types.TYPE_STRING),
        # An enum on the wire; read as a number, so that values of later versions are no surprise.
        ("HealthCheckResponse", "status", field_types.TYPE_INT32),
    ):
        message = file.message_type.add(name=message_name)
        message.field.add(name=field_name, number=1, type=field_type, label=field_types.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


_pool = _make_pool()
HealthCheckRequest = _message_class(_pool, "HealthCheckRequest")
HealthCheckResponse = _message_class(_pool, "HealthCheckResponse")


def health_status(response: Any) -> HealthStatus:
    """Read a HealthCheckResponse."""
    return _BY_NUMBER[response.status] if 0 <= response.status < len(_BY_NUMBER) else HealthStatus.UNKNOWN


class ReadyWait:
    """The bookkeeping of ``wait_ready``: the time left, what was seen last, the pause between tries."""

    def __init__(self, timeout_s: float, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timeout_s = timeout_s
        self._end_s = clock() + timeout_s
        self._pause_s = 0.05
        self._last_seen = "no answer"

    @property
    def remaining_s(self) -> float:
        """Return the time left, at least a millisecond."""
        return max(self._end_s - self._clock(), 0.001)

    def is_ready(self, response: Any) -> bool:
        """Tell whether this answer ends the wait; remember it otherwise."""
        status = health_status(response)
        self._last_seen = status.value
        return status is HealthStatus.SERVING

    def pause_s(self, error: Unavailable | None) -> float:
        """Return how long to pause after a watch that broke off. Raises ``DeadlineExceeded`` at the end."""
        if error is not None:
            self._last_seen = error.message
        if self._clock() >= self._end_s:
            raise self.timed_out()
        pause_s = min(self._pause_s, self.remaining_s)
        self._pause_s = min(self._pause_s * 2, 1.0)
        return pause_s

    def timed_out(self) -> DeadlineExceeded:
        """Make the error that says what was seen last."""
        return DeadlineExceeded(f"not ready after {self._timeout_s:g} s: {self._last_seen}")
