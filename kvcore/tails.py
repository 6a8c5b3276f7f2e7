"""Tails: the last logits of exact prompts, so that a repeat needs no forward pass.

A tail hangs at the node of its prompt's last full block, under the tokens that follow (none to a block
less one). The logits lie with the worker, in numbered slots; this module knows only the numbers. The
partial block needs no place of its own: it is the leading part of an OPEN or full child of the same
node, found by token. If it has gone, the repeat still starts at once and computes those few positions
together with its second token.

A slot is free, or held by one tail, or leaving. Tails leave with their node, when their lifetime is
over, with their owner if they are private, or in order of use when slots run out. A slot named in the
running plan is busy until the step is done: whoever lost it meanwhile, the step never writes what it
also reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from kvcore.errors import IntegrityError
from kvcore.node import Key, Node, key_of

__all__ = ["LogitsSlot", "Tail", "TailStore"]

LogitsSlot = NewType("LogitsSlot", int)
"""Row of the worker's store of last logits."""


@dataclass(slots=True, eq=False)
class Tail:
    """The kept last logits of one exact prompt."""

    node: Node
    key: Key
    slot: LogitsSlot
    expires_at: float | None = None
    is_ready: bool = False
    """False while the step that computes the logits is running."""
    is_lossy: bool = False
    """A lossy codec had a hand in what the logits were computed from."""


class TailStore:
    """Give out logits slots, the least recently used first when none is free."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = [LogitsSlot(s) for s in range(num_slots - 1, -1, -1)]
        self._tails: dict[Tail, None] = {}
        self._private: dict[int, list[Tail]] = {}
        self._busy: set[LogitsSlot] = set()
        self._leaving: list[LogitsSlot] = []
        """Busy slots whose tail has gone: free after the step."""

    def __len__(self) -> int:
        return len(self._tails)

    def find(self, node: Node, rest: bytes, owner: int | None, now: float) -> Tail | None:
        """Return the tail for a prompt that ends with ``rest`` after ``node``; no recency is touched."""
        if not node.tails:
            return None
        for key in (rest,) if owner is None else (rest, (owner, rest)):
            tail = node.tails.get(key)
            if tail is not None and (tail.expires_at is None or tail.expires_at > now):
                return tail
        return None

    def use(self, tail: Tail) -> LogitsSlot:
        """Mark a tail as used by the running plan and return its slot."""
        del self._tails[tail]
        self._tails[tail] = None
        self._busy.add(tail.slot)
        return tail.slot

    def add(
        self, node: Node, rest: bytes, owner: int | None, now: float, *, expires_at: float | None
    ) -> Tail | None:
        """Add a tail that the running step will fill.

        None if the logits are kept already, or this step computes them anyway, or every slot is busy.
        """
        if self.find(node, rest, owner, now) is not None:
            return None
        key = key_of(rest, owner)
        expired = (node.tails or {}).get(key)
        if expired is not None:
            if not expired.is_ready:
                return None
            self.remove(expired)
        slot = self._take_slot()
        if slot is None:
            return None
        tail = Tail(node=node, key=key, slot=slot, expires_at=expires_at)
        if node.tails is None:
            node.tails = {}
        node.tails[key] = tail
        self._tails[tail] = None
        self._busy.add(slot)
        if owner is not None:
            self._private.setdefault(owner, []).append(tail)
        return tail

    def remove(self, tail: Tail) -> None:
        """Forget a tail and free its slot, if need be after the running step."""
        del self._tails[tail]
        if tail.node.tails is not None:
            del tail.node.tails[tail.key]
            if not tail.node.tails:
                tail.node.tails = None
        if isinstance(tail.key, tuple):
            mine = self._private[tail.key[0]]
            mine.remove(tail)
            if not mine:
                del self._private[tail.key[0]]
        (self._leaving if tail.slot in self._busy else self._free).append(tail.slot)

    def remove_all(self, node: Node) -> None:
        """Forget every tail of a node that is about to go."""
        for tail in list((node.tails or {}).values()):
            self.remove(tail)

    def remove_private(self, owner: int) -> None:
        """Forget what an owner that ends has kept."""
        for tail in list(self._private.get(owner, ())):
            self.remove(tail)

    def clear_at(self, node: Node) -> None:
        """Forget the tails of a node that the running plan does not name."""
        for tail in [t for t in (node.tails or {}).values() if t.slot not in self._busy]:
            self.remove(tail)

    def clear(self) -> None:
        """Forget every tail that the running plan does not name."""
        for tail in [t for t in self._tails if t.slot not in self._busy]:
            self.remove(tail)

    def end_step(self) -> None:
        """Let go of the slots that the finished step named."""
        self._busy.clear()
        self._free.extend(self._leaving)
        self._leaving.clear()

    def _take_slot(self) -> LogitsSlot | None:
        if self._free:
            return self._free.pop()
        for tail in self._tails:
            if tail.slot not in self._busy:
                self.remove(tail)
                return self._free.pop()
        return None

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` unless every slot is free, leaving, or held by one reachable tail."""
        slots = [*self._free, *self._leaving, *(tail.slot for tail in self._tails)]
        if sorted(slots) != list(range(self.num_slots)):
            raise IntegrityError("logits slots are lost or held twice")
        for tail in self._tails:
            if (tail.node.tails or {}).get(tail.key) is not tail:
                raise IntegrityError(f"tail {tail.key!r} is not listed by its node")
            if not tail.node.is_root and tail.node.parent is None:
                raise IntegrityError(f"tail {tail.key!r} outlived its node")
        private = {tail for tails in self._private.values() for tail in tails}
        if private != {tail for tail in self._tails if isinstance(tail.key, tuple)}:
            raise IntegrityError("the list of private tails is wrong")
