"""Calls whose inputs wait, and what of them goes into a batch.

One ring of calls for each model. The call at its head always gets at least one input into the model's next
batch; whoever got something in goes to the end. So a call with ``p`` calls before it has an input computed
within ``p + 1`` batches of its model, whatever comes after it and however much those before it want.

Two ways to fill, by what the executor does with a batch:

packed   Lengths do not matter. Every call of the ring in turn gets an equal share of the tokens that are
         left, at least one input; what is left over goes round once more.
padded   Every input costs as much as the longest one beside it. The longest input of the call at the head is
         the anchor; an input joins if the padding that it causes, or gets, costs less than a batch of its
         own (``slack``: learned, in tokens) or than a quarter of the longest. Others keep their place.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import accumulate, islice
from typing import Generic, TypeVar

import msgspec

__all__ = ["Ring", "Share", "WaitingCall"]

MAX_MISFITS = 16
"""So many calls whose next input does not fit are passed by before a batch counts as full."""
LOOK_AHEAD = 256
"""Calls of a ring among which lengths that belong together are looked for."""
NEAR_SHARE = 0.25

_NONE: list[int] = []

KeyT = TypeVar("KeyT", bound=Hashable)


class Share(msgspec.Struct, Generic[KeyT], frozen=True):
    """What of one call is in a batch."""

    key: KeyT
    indices: Sequence[int]
    num_tokens: int
    longest: int = 0
    """Of a padded batch: the length of the longest input."""


class WaitingCall(Generic[KeyT]):
    """The inputs of one call that are in no batch yet.

    Packed ones leave in their order, padded ones by length.
    """

    __slots__ = ("_ends", "_indices", "_lengths", "_next", "key", "num_tokens")

    def __init__(self, key: KeyT, lengths: Sequence[int], *, by_length: bool) -> None:
        self.key = key
        self.num_tokens = sum(lengths)
        """Of what still waits."""
        self._next = 0
        self._ends: Sequence[int] = ()
        self._indices: list[int] = _NONE
        self._lengths: list[int] = _NONE
        if by_length:
            self._indices = sorted(range(len(lengths)), key=lengths.__getitem__)
            self._lengths = [lengths[index] for index in self._indices]
        else:
            self._ends = list(accumulate(lengths)) if len(lengths) > 1 else lengths

    @property
    def num_inputs(self) -> int:
        """Return how many still wait."""
        return len(self._indices) or len(self._ends) - self._next

    @property
    def longest(self) -> int:
        """Return the length of the longest input (by length)."""
        return self._lengths[-1]

    def longest_up_to(self, limit: float) -> int:
        """Return the length of the longest input within ``limit`` (by length); 0 if there is none."""
        end = bisect_right(self._lengths, limit)
        return self._lengths[end - 1] if end else 0

    def take_first(self) -> Share[KeyT]:
        """Take the next input, however long it is."""
        if self._indices:
            return self._cut(len(self._indices) - 1, len(self._indices))
        return self._advance(self._next + 1)

    def take_packed(self, num_tokens: int, *, at_least_one_of: int) -> Share[KeyT] | None:
        """Take what fits into ``num_tokens``, but one input if that fits into ``at_least_one_of``."""
        done = self._ends[self._next - 1] if self._next else 0
        stop = bisect_right(self._ends, done + num_tokens, lo=self._next)
        if stop == self._next:
            if self._ends[stop] - done > at_least_one_of:
                return None
            stop += 1
        return self._advance(stop)

    def take_padded(self, shortest: float, longest: int, max_inputs: int) -> Share[KeyT] | None:
        """Take up to ``max_inputs`` inputs whose length lies between the two, the longest of them first."""
        stop = bisect_right(self._lengths, longest)
        start = max(bisect_left(self._lengths, shortest), stop - max_inputs)
        return self._cut(start, stop) if start < stop else None

    def _advance(self, stop: int) -> Share[KeyT]:
        start, self._next = self._next, stop
        num_tokens = self._ends[stop - 1] - (self._ends[start - 1] if start else 0)
        self.num_tokens -= num_tokens
        return Share(self.key, range(start, stop), num_tokens)

    def _cut(self, start: int, stop: int) -> Share[KeyT]:
        indices = self._indices[start:stop]
        num_tokens, longest = sum(self._lengths[start:stop]), self._lengths[stop - 1]
        del self._indices[start:stop], self._lengths[start:stop]
        self.num_tokens -= num_tokens
        return Share(self.key, indices, num_tokens, longest)


class Ring(Generic[KeyT]):
    """The calls of one model, in the order of their turns."""

    def __init__(self) -> None:
        self._calls: OrderedDict[KeyT, WaitingCall[KeyT]] = OrderedDict()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._calls)

    def __contains__(self, key: KeyT) -> bool:
        return key in self._calls

    def waiting_tokens_of(self, key: KeyT) -> int:
        """Return how many tokens of a call that is here still wait."""
        return self._calls[key].num_tokens

    def add(self, call: WaitingCall[KeyT]) -> None:
        """Put a call at the end."""
        self._calls[call.key] = call
        self.num_tokens += call.num_tokens

    def remove(self, key: KeyT) -> WaitingCall[KeyT] | None:
        """Take out what still waits of a call."""
        call = self._calls.pop(key, None)
        if call is not None:
            self.num_tokens -= call.num_tokens
        return call

    def to_head(self, key: KeyT) -> None:
        """Let a call be the next one."""
        self._calls.move_to_end(key, last=False)

    def take_packed(self, budget: int) -> list[Share[KeyT]]:
        """Fill a batch of at most ``budget`` tokens; one input that is longer goes alone. Not when empty."""
        shares: list[Share[KeyT]] = []
        left, calls_left, num_misfits = budget, len(self._calls), 0
        served: list[WaitingCall[KeyT]] = []
        for call in self._calls.values():
            share = call.take_packed(left // calls_left, at_least_one_of=left)
            calls_left -= 1
            if share is None:
                if not served:
                    return self._settle([call.take_first()], [call])
                num_misfits += 1
            else:
                shares.append(share)
                served.append(call)
                left -= share.num_tokens
            if left <= 0 or num_misfits > MAX_MISFITS:
                break
        for call in served:
            if left <= 0:
                break
            if call.num_inputs and (share := call.take_packed(left, at_least_one_of=0)) is not None:
                shares.append(share)
                left -= share.num_tokens
        return self._settle(shares, served)

    def take_padded(self, budget: int, slack: float) -> list[Share[KeyT]]:
        """Fill a batch whose inputs times its longest is at most ``budget``; a longer one goes alone.

        Not when empty.
        """
        calls = list(islice(self._calls.values(), LOOK_AHEAD))
        anchor = calls[0].longest
        if anchor >= budget:
            return self._settle([calls[0].take_first()], calls[:1])
        limit = min(budget, anchor + max(NEAR_SHARE * anchor, slack))
        longest = max(call.longest_up_to(limit) for call in calls)
        shortest = longest - max(NEAR_SHARE * longest, slack, longest - anchor)
        left, calls_left = budget // longest, len(calls)
        shares: list[Share[KeyT]] = []
        served: list[WaitingCall[KeyT]] = []
        for call in calls:
            share = call.take_padded(shortest, longest, max(1, left // calls_left))
            calls_left -= 1
            if share is not None:
                shares.append(share)
                served.append(call)
                left -= len(share.indices)
            if left <= 0:
                break
        for call in served:
            if left <= 0:
                break
            if (share := call.take_padded(shortest, longest, left)) is not None:
                shares.append(share)
                left -= len(share.indices)
        return self._settle(shares, served)

    def _settle(self, shares: list[Share[KeyT]], served: Iterable[WaitingCall[KeyT]]) -> list[Share[KeyT]]:
        """Move who was served to the end, or out when nothing of it is left."""
        self.num_tokens -= sum(share.num_tokens for share in shares)
        for call in served:
            if call.num_inputs:
                self._calls.move_to_end(call.key)
            else:
                del self._calls[call.key]
        return shares
