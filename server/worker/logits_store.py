"""Rows of kept last logits, by slot number: what lets an exact repeat of a prompt skip the forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["MAX_LOGITS_BYTES", "LogitsStore"]

MAX_LOGITS_BYTES = 256 << 20


class LogitsStore:
    """Own float32 rows ``[num_slots, vocab]``; the engine decides which slot means what.

    Fewer slots than wanted are given if they would take more than ``max_bytes``: ask ``num_slots``.
    The rows are allocated with the first save.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        *,
        device: torch.device,
        max_bytes: int = MAX_LOGITS_BYTES,
    ) -> None:
        self.num_slots = max(0, min(num_slots, max_bytes // (4 * vocab_size)))
        self._shape = (self.num_slots, vocab_size)
        self._device = device
        self._rows: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Return how many bytes the rows take, allocated or not."""
        return 4 * self._shape[0] * self._shape[1]

    def save(self, slots: Sequence[int], rows: torch.Tensor) -> None:
        """Keep ``rows`` ``[len(slots), vocab]``."""
        if not slots:
            return
        if self._rows is None:
            self._rows = torch.empty(self._shape, dtype=torch.float32, device=self._device)
        self._rows[torch.tensor(slots, device=self._device)] = rows

    def load(self, slots: Sequence[int]) -> torch.Tensor:
        """Return a copy of rows ``[len(slots), vocab]``. Raises ``LookupError`` if nothing was ever saved."""
        if self._rows is None:
            raise LookupError("the logits store is empty")
        return self._rows[torch.tensor(slots, device=self._device)]

    def export(self, slot: int) -> bytes:
        """Return a copy of one row, float32 in native order. Raises ``LookupError`` as ``load`` does."""
        return self.load([slot])[0].cpu().numpy().tobytes()

    def restore(self, slot: int, payload: bytes | bytearray | memoryview) -> None:
        """Overwrite one row with what ``export`` gave. Raises ``ValueError`` for another size."""
        if len(payload) != 4 * self._shape[1]:
            raise ValueError(f"a row has {4 * self._shape[1]} bytes, not {len(payload)}")
        self.save([slot], torch.frombuffer(bytearray(payload), dtype=torch.float32)[None].to(self._device))
