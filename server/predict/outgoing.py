"""What is done after the lock is let go of: leases released, messages sent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.predict.messages import FromPredict
from server.predict.model_cache import ModelLease

__all__ = ["Outgoing"]


class Outgoing:
    """Collects; belongs to one thread."""

    __slots__ = ("leases", "messages")

    def __init__(self) -> None:
        self.leases: list[ModelLease] = []
        self.messages: list[FromPredict] = []

    def __bool__(self) -> bool:
        return bool(self.messages or self.leases)

    def flush(
        self,
        send: Callable[[FromPredict], None],
        send_all: Callable[[Sequence[FromPredict]], None] | None,
    ) -> None:
        """Release the leases, then send: who has the answer may unload the model."""
        for lease in self.leases:
            lease.release()
        if send_all is not None and len(self.messages) > 1:
            send_all(self.messages)
        else:
            for message in self.messages:
                send(message)
