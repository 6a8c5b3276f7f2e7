"""Up, for one waiting sequence: what tiers have of its prompt beyond the device, and the fetch of it.

::

    NEW ──► ASKING ──────────────► FETCHING ───────────► DONE
             lookups, until a NO    blocks land in order    admitted, or gone
             or the time is over    as the plan has room
                └─► DONE: nothing found, or computing it is expected to be faster
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum

from kvcore.index import digest_of
from kvcore.keys import NamespaceKey, PrefixDigest, chain_digests
from kvcore.node import Node
from kvcore.tails import TailStore
from kvcore.tiers.interface import ObjectKey, ObjectKind, Presence
from kvcore.tiers.stack import FetchBatch, Located, TierStack
from kvcore.tree import PrefixTree
from server.engine.tiering.wanted import tail_digest

__all__ = ["Answer", "LookupBudget", "Restoration", "RestorationState"]

LOOKAHEAD = 64
"""Blocks asked for at once where a tier has to ask somebody else."""


WALKED_PER_LOOKUP = 8
"""So many blocks on the device are passed in the time of one lookup in a tier."""


class Answer(Enum):
    """How far asking has come."""

    COMPLETE = "complete"
    COMING = "coming"
    """A tier does not know yet."""
    POSTPONED = "postponed"
    """The lookups of this step are used up."""


@dataclass(slots=True)
class LookupBudget:
    """Lookups left in this step: a name to compute and a question to each tier take some microseconds."""

    left: int


class RestorationState(Enum):
    """Where it is."""

    NEW = "new"
    ASKING = "asking"
    FETCHING = "fetching"
    DONE = "done"


class Restoration:
    """One prompt's way back. ``Restorations`` drives it."""

    __slots__ = (
        "asked_at",
        "asked_until",
        "batch",
        "block_size",
        "decided_fetch",
        "digests",
        "done_at",
        "expected_fetch_s",
        "expected_recompute_s",
        "first_block",
        "held_s",
        "held_since",
        "hold_s",
        "is_ahead",
        "late_blocks",
        "namespace",
        "nodes",
        "num_landed",
        "seed",
        "started_at",
        "state",
        "tail_batch",
        "tail_keys",
        "tiers",
        "tokens",
    )

    def __init__(self, namespace: NamespaceKey, tokens: array[int], block_size: int) -> None:
        self.namespace = namespace
        self.seed = namespace.seed()
        self.tokens = tokens
        """Of the prompt; a sequence that comes back after a preemption brings its own tokens, too. Shared
        with the sequence, whose tokens do not change while it waits."""
        self.block_size = block_size
        self.state = RestorationState.NEW
        self.asked_at: float | None = None
        """Since when tiers are asked."""
        self.asked_until = 0
        """Blocks of which every tier has been asked at least once."""
        self.started_at = 0.0
        self.done_at: float | None = None
        self.held_since: float | None = None
        """Since when nothing else keeps the sequence from being admitted; None: something does."""
        self.held_s = 0.0
        """For how long that was so before."""
        self.is_ahead = True
        """Somebody looked for its blocks before its turn had come."""
        self.hold_s = 0.0
        """How long the sequence may be held for it."""
        self.first_block = 0
        self.digests: list[PrefixDigest] = []
        """``digests[0]`` is of the prefix on the device, the others of one block more each."""
        self.tiers: list[str] = []
        """Which tier has each of the blocks found, from ``first_block`` on."""
        self.tail_keys: list[ObjectKey] = []
        self.batch: FetchBatch | None = None
        self.tail_batch: FetchBatch | None = None
        self.num_landed = 0
        self.late_blocks = 0
        self.nodes: set[Node] = set()
        """Placed for this sequence."""
        self.decided_fetch = False
        self.expected_fetch_s = 0.0
        self.expected_recompute_s = 0.0

    def __repr__(self) -> str:
        return f"Restoration({self.state.value} {self.num_landed}/{self.num_found} from {self.first_block})"

    @property
    def num_found(self) -> int:
        """Return how many blocks tiers have."""
        return len(self.tiers)

    @property
    def num_full_blocks(self) -> int:
        """Return how many full blocks the prompt has."""
        return len(self.tokens) // self.block_size

    @property
    def rest(self) -> bytes:
        """Return the packed tokens after the last full block."""
        return self.tokens[self.num_full_blocks * self.block_size :].tobytes()

    @property
    def num_found_tokens(self) -> int:
        """Return how many prompt tokens tiers have beyond the device."""
        return self.num_found * self.block_size + (
            len(self.tokens) % self.block_size if self.tail_keys else 0
        )

    @property
    def main_tier(self) -> str:
        """Return the tier that has most of the blocks."""
        return max(self.tiers, key=self.tiers.count, default="")

    @property
    def is_over(self) -> bool:
        return self.state is RestorationState.DONE

    @property
    def located(self) -> list[Located]:
        """Return where the blocks found are."""
        return [Located(Presence.YES, tier) for tier in self.tiers]

    @property
    def keys(self) -> list[ObjectKey]:
        """Return the names of the blocks found."""
        return [ObjectKey(d, ObjectKind.BLOCK) for d in self.digests[1 : 1 + self.num_found]]

    def count_held(self, now: float, *, is_held: bool) -> None:
        """Note whether, from now on, nothing but this restore keeps the sequence from being admitted."""
        if is_held:
            if self.held_since is None:
                self.held_since = now
        elif self.held_since is not None:
            self.held_s += now - self.held_since
            self.held_since = None

    def total_held_s(self, now: float) -> float:
        """Return how long the sequence has been held for it, all in all."""
        return self.held_s + (0.0 if self.held_since is None else now - self.held_since)

    def look_at_device(self, tree: PrefixTree, tails: TailStore, now: float, budget: LookupBudget) -> bool:
        """Note where the device ends: what tiers have is wanted from there on. False: it has everything."""
        root = tree.root(self.namespace)
        path = tree.walk(root, self.tokens, len(self.tokens), None, now)
        budget.left -= 1 + len(path) // WALKED_PER_LOOKUP
        self.first_block = len(path)
        if len(path) == self.num_full_blocks:
            end = path[-1] if path else root
            if tails.find(end, self.rest, None, now) is not None:
                return False
        budget.left -= sum(node.digest is None for node in path)
        self.digests = [digest_of(path[-1]) if path else self.seed]
        self.state = RestorationState.ASKING
        self.asked_at = now
        return True

    def look_from(self, tree: PrefixTree, first_block: int) -> None:
        """Begin behind a given block instead, whether the device has what is before it or not."""
        root = tree.roots.get(self.namespace)
        limit = first_block * self.block_size
        path = [] if root is None else tree.walk(root, self.tokens, limit, None, 0.0)
        self.first_block = len(path)
        self.digests = [digest_of(path[-1]) if path else self.seed]
        while self.first_block < first_block:
            self._digest(1)
            self.digests.pop(0)
            self.first_block += 1

    def ask(self, blocks: TierStack, tails: TierStack, budget: LookupBudget) -> Answer:
        """Go on looking, as far as ``budget`` goes. Costs one digest per block that is there."""
        while self.first_block + self.num_found < self.num_full_blocks:
            if budget.left <= 0:
                return Answer.POSTPONED
            budget.left -= 1
            where = blocks.lookup(self._block_key(self.num_found))
            if where.presence is Presence.COMING:
                last = min(self.num_found + LOOKAHEAD, self.num_full_blocks - self.first_block)
                for index in range(max(self.num_found + 1, self.asked_until), last):
                    blocks.lookup(self._block_key(index))  # so that a remote tier can ask for all at once
                    budget.left -= 1
                self.asked_until = max(self.asked_until, last)
                return Answer.COMING
            if where.tier is None:
                return Answer.COMPLETE
            self.tiers.append(where.tier)
        return self._ask_for_tail(tails)

    def _ask_for_tail(self, tails: TierStack) -> Answer:
        parent = self._digest(self.num_found)
        digest = tail_digest(parent, self.rest)
        logits = ObjectKey(digest, ObjectKind.LOGITS)
        partial = ObjectKey(digest, ObjectKind.PARTIAL)
        wanted = [logits, partial] if self.rest else [logits]
        answers = [tails.lookup(key).presence for key in wanted]
        if Presence.COMING in answers:
            return Answer.COMING
        if answers[0] is Presence.YES:
            self.tail_keys = [
                key for key, answer in zip(wanted, answers, strict=True) if answer is Presence.YES
            ]
        return Answer.COMPLETE

    def _block_key(self, index: int) -> ObjectKey:
        return ObjectKey(self._digest(index + 1), ObjectKind.BLOCK)

    def _digest(self, index: int) -> PrefixDigest:
        """Return the digest of the device's prefix and ``index`` blocks more."""
        size = self.block_size
        while len(self.digests) <= index:
            start = (self.first_block + len(self.digests) - 1) * size
            self.digests.append(next(chain_digests(self.digests[-1], [self.tokens[start : start + size]])))
        return self.digests[index]
