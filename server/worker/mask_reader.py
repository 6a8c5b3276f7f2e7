"""Learn from a model's own attention masks how far back each layer's queries see.

Families say their window in different places: as an argument of the attention, in the configuration,
or in the mask alone. The mask is what their own forward obeys. So during the gate's trace the model is
given a mask maker that, instead of a mask of the few tokens at hand, looks at the mask's *rule*: how
many positions would a query a million tokens on see?
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from server.worker.errors import UnsupportedModel

__all__ = ["MaskReader"]


class MaskReader:
    """Stands in for mask construction during the trace: notes what each mask lets a far query see."""

    _far = 1 << 20

    def __init__(self) -> None:
        self._read: dict[int, tuple[torch.Tensor, int | None]] = {}
        self.has_chunks = False

    def make(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        mask_function: Callable[..., Any],
        **_: Any,
    ) -> torch.Tensor:
        """Return a mask that is recognised later by where its data lie."""
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)
        at, later = self._far, self._far + 5
        widths = [self._width(mask_function, at), self._width(mask_function, later)]
        window: int | None = widths[0]
        if widths == [at + 1, later + 1]:
            window = None
        elif widths[0] != widths[1]:
            self.has_chunks = True
            window = None
        self._read[mask.data_ptr()] = (mask, window)
        return mask

    def knows(self, mask: torch.Tensor) -> bool:
        return mask.data_ptr() in self._read

    def window(self, mask: torch.Tensor) -> int | None:
        return self._read[mask.data_ptr()][1]

    @staticmethod
    def _width(sees: Callable[..., Any], at: int) -> int:
        """Return how many positions up to ``at`` a query there sees. Raises ``UnsupportedModel``."""

        def visible(key: int) -> bool:
            zero = torch.tensor(0)
            return bool(sees(zero, zero, torch.tensor(at), torch.tensor(key)))

        if visible(at + 1) or not visible(at):
            raise UnsupportedModel("its attention mask is not causal")
        low, high = -1, at  # the first visible position lies in (low, high]
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if visible(middle) else (middle, high)
        return at - high + 1
