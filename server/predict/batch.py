"""What the batcher says: a batch, or when to ask again; and what it has counted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from server.predict.waiting import Share

__all__ = ["Batch", "BatchCounters", "Turn"]

KeyT = TypeVar("KeyT", bound=Hashable)


class Batch(msgspec.Struct, Generic[KeyT], frozen=True):
    """Inputs of one model to be computed together."""

    model: Hashable
    shares: tuple[Share[KeyT], ...]
    """A call may have two."""
    num_inputs: int
    num_tokens: int
    num_padding_tokens: int
    """Computed for nothing, if every input is padded to the longest: an upper bound."""


class Turn(msgspec.Struct, Generic[KeyT], frozen=True):
    """What to do now."""

    batch: Batch[KeyT] | None
    expired: Sequence[KeyT]
    """Calls that were dropped since their deadline has come."""
    look_again_s: float | None = None
    """Without a batch: when there is one even if no call comes; None: not before one comes."""


@dataclass(slots=True)
class BatchCounters:
    """Inputs. Added ones are taken, dropped, or still wait."""

    num_added: int = 0
    num_taken: int = 0
    num_expired: int = 0
    num_cancelled: int = 0
    num_refused: int = 0
    """Never added."""
    num_batches: int = 0
    num_held_batches: int = 0
    held_s: float = 0.0
