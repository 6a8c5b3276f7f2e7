"""The cache manager: leases over the tree, blocks from the pool, tails beside it.

One step, seen from here (everything between ``open`` and ``commit`` belongs to the running plan)::

    find ─► open ─► extend ─► [the worker runs] ─► commit ─► ... ─► release      blocks stay cached
      │       │       │                              └─► discard                 nothing new stays
      │       └───────┴ OutOfBlocks: nothing changed
      └ changes nothing; may say that somebody is computing this very prompt

**Copies.** A copy's source may be evicted by a later request of the very plan that copies from it, even
to become the target of another copy. Copies run in plan order and before anything is computed, so the
source is still intact when it is read.

Not thread-safe: one engine loop owns it. Tokens are packed arrays (``kvcore.keys.pack_tokens``).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterable

from kvcore.blocks import BlockId, BlockPool
from kvcore.clock import Clock
from kvcore.control import CacheControl
from kvcore.counters import CacheCounters
from kvcore.cursors import Cursor, CursorBoard
from kvcore.errors import IntegrityError, OutOfBlocks
from kvcore.events import CacheListener, LeaveCause
from kvcore.filler import Filler
from kvcore.finder import Finder
from kvcore.heat import add_heat, use_at
from kvcore.integrity import check_integrity
from kvcore.keys import NamespaceKey
from kvcore.lanes import EvictionLanes
from kvcore.lease import Found, Lease, PrefixMatch, SlotCopy
from kvcore.node import NodeState
from kvcore.pins import HARD_SHARE, SOFT_SHARE, PinBook
from kvcore.policies import EvictionPolicy, LruPolicy
from kvcore.quotas import Quotas
from kvcore.reclaim import Reclaimer
from kvcore.restore import Restorer
from kvcore.tails import TailStore
from kvcore.tree import PrefixTree

__all__ = ["CacheManager", "TokenCost", "nominal_cost"]

TokenCost = Callable[[int, int], float]


def nominal_cost(start: int, stop: int) -> float:
    """Stand in for a measured cost: a millisecond a token."""
    return 1e-3 * (stop - start)


class CacheManager:
    """Decide what is cached, shared, evicted and expired. Constructor injection: clock and policy."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        clock: Clock,
        num_logits_slots: int = 0,
        policy: EvictionPolicy | None = None,
        max_share: float | None = None,
        hard_pin_share: float = HARD_SHARE,
        soft_pin_share: float = SOFT_SHARE,
    ) -> None:
        """``max_share`` of the pool is what one namespace may keep when others want room; None: all of it."""
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(block_size)
        self.tails = TailStore(num_logits_slots)
        self.board = CursorBoard(self.tree)
        self.counters = CacheCounters()
        self.block_size = block_size
        self.quotas = Quotas(num_blocks, default_share=max_share)
        self.pins = PinBook(
            self.tree,
            num_blocks=num_blocks,
            let_go=lambda node: self._reclaimer.offer(node),
            hard_share=hard_pin_share,
            soft_share=soft_pin_share,
        )
        self._clock = clock
        self._leases: dict[Lease, None] = {}
        self._lanes = EvictionLanes(policy or LruPolicy(capacity_blocks=num_blocks))
        self._reclaimer = Reclaimer(
            pool=self.pool,
            tree=self.tree,
            tails=self.tails,
            board=self.board,
            counters=self.counters,
            clock=clock,
            lanes=self._lanes,
            pins=self.pins,
            quotas=self.quotas,
        )
        self._finder = Finder(tree=self.tree, tails=self.tails, clock=clock)
        self._filler = Filler(
            pool=self.pool, tree=self.tree, tails=self.tails, reclaimer=self._reclaimer, clock=clock
        )
        self.control = CacheControl(
            tree=self.tree,
            tails=self.tails,
            pins=self.pins,
            quotas=self.quotas,
            lanes=self._lanes,
            reclaimer=self._reclaimer,
            clock=clock,
        )
        self.restorer = Restorer(tree=self.tree, tails=self.tails, reclaimer=self._reclaimer, clock=clock)
        self.cost: TokenCost = nominal_cost
        """Seconds of computing positions ``[start, stop)`` of a prompt, as the engine has measured them."""

    def __repr__(self) -> str:
        return f"CacheManager({self.pool!r}, {self.tree!r}, {len(self._leases)} leases)"

    @property
    def num_available(self) -> int:
        """Return how many blocks can be had right now: free ones and evictable ones."""
        return self._reclaimer.num_available

    @property
    def listeners(self) -> list[CacheListener]:
        """Return those who are told what happens to blocks: append to it."""
        return self._reclaimer.listeners

    @property
    def leases(self) -> Collection[Lease]:
        """Return the open leases."""
        return self._leases.keys()

    # -- looking ------------------------------------------------------------------------------------

    def lookup(self, namespace: NamespaceKey, tokens: array[int], *, owner: int | None = None) -> PrefixMatch:
        """Say how much of a prompt is cached. Touches no recency and holds nothing."""
        if namespace not in self.tree.roots:
            return PrefixMatch(0, 0, is_exact=False)
        return self.find(namespace, tokens, owner=owner).match

    def find(
        self, namespace: NamespaceKey, tokens: array[int], *, read: bool = True, owner: int | None = None
    ) -> Found:
        """Find the longest cached prefix of ``tokens``, and what matches inside the next block.

        ``owner`` names a request that leaves nothing behind; None shares. Without ``read`` nothing is found.
        """
        if not read:
            return self._finder.find_nothing(namespace)
        return self._finder.find(namespace, tokens, owner=owner)

    def fits(self, found: Found, num_positions: int, *, spare: int) -> bool:
        """Say whether a lease of ``found`` could grow to ``num_positions`` and leave ``spare`` blocks."""
        missing = -(-num_positions // self.block_size) - len(found.path)
        return missing + spare + self.tree.num_idle(found.path) <= self.num_available

    def park(self, namespace: NamespaceKey, cursor: Cursor) -> None:
        """Start following how far a waiting prompt is cached."""
        self.board.park(cursor, self.tree.root(namespace), self._clock.now())

    # -- leases -------------------------------------------------------------------------------------

    def open(
        self, found: Found, tokens: array[int], *, owner: int | None = None, lifetime_s: float | None = None
    ) -> Lease:
        """Lease what was just found, and copy what matches inside the next block.

        Raises ``OutOfBlocks`` (nothing changed) if the block for the copy is not to be had.
        """
        if found.tail is not None and not found.tail.is_ready:
            raise IntegrityError("a lease cannot draw from logits that the running step computes")
        self.tree.hold(found.end)  # first, so that making room for the copy evicts none of it
        source, target = found.source, BlockId(-1)
        if source is not None and not self.num_available:
            self._reclaimer.drop(found.end)
            raise OutOfBlocks(needed=1, available=0)
        self._note_use(found, len(tokens), owner)
        if source is not None:
            target = self._reclaimer.take(1, found.root.space)[0]
        lease = Lease(found=found, tokens=tokens, owner=owner, lifetime_s=lifetime_s)
        self._leases[lease] = None
        if source is not None:
            lease.copy = SlotCopy(source.real_block(), target, found.match.partial_tokens)
            node = self.tree.add_open(found.end, target, owner)
            node.is_lossy = lease.is_lossy
            node.limit_life(source.expires_at)  # what is copied does not get younger
            lease.block_table.append(target)
            lease.nodes.append(node)
            self._filler.hold_deepest(lease)
        if found.tail is not None:
            self.tails.use(found.tail)
        return lease

    def blocks_needed(self, lease: Lease, num_tokens: int) -> int:
        """Return how many blocks ``extend`` would take for ``num_tokens`` more positions."""
        return max(0, -(-(lease.num_computed + num_tokens) // self.block_size) - len(lease.block_table))

    def extend(self, lease: Lease, num_tokens: int) -> None:
        """Plan to compute the next ``num_tokens`` of ``lease.tokens``.

        Takes blocks, and publishes those that will be full as PENDING.

        Raises ``OutOfBlocks`` and changes nothing if the blocks are not to be had.
        """
        self._filler.extend(lease, num_tokens)

    def add_tail(self, lease: Lease) -> None:
        """Keep the last logits of the prompt that the running step completes (``lease.save_logits_to``).

        Call after ``extend``, when ``lease.tokens`` is the whole prompt. Does nothing if they are kept.
        """
        self._filler.add_tail(lease)

    def commit(self, leases: Iterable[Lease], *, spoiled: Collection[Lease] = ()) -> None:
        """The step is done: what it filled is READY. Takes all leases of the plan at once.

        The logits of ``spoiled`` leases are no good and not kept; discard these leases afterwards.
        """
        self._filler.commit(leases, spoiled=spoiled)

    def roll_back(self, leases: Iterable[Lease]) -> None:
        """The step failed: end all leases of the plan; nothing that they inserted stays."""
        self.discard(leases)
        self.tails.end_step()

    def release(self, lease: Lease) -> None:
        """End a lease between steps. What it computed stays cached (unless private or expired)."""
        if lease.in_flight or lease.pending or lease.duplicates:
            raise IntegrityError(f"{lease!r} released in the middle of a step")
        self._close(lease)
        self.tree.touch(lease.nodes, self._clock.now())
        self._reclaimer.drop(lease.held)
        self._reclaimer.prune(lease)

    def note_end(self, lease: Lease, *, num_prompt_tokens: int) -> None:
        """A request has come to its end: tell the policy, before its lease is released.

        Not for one that was cancelled, preempted or failed.
        """
        if lease.owner is None:
            left = [n for n in lease.nodes if n.state is NodeState.READY and n.owner is None]
            num_output = len(lease.tokens) - num_prompt_tokens
            policy = self._lanes.policy_of(lease.root.space)
            policy.closed(left, num_prompt_tokens, num_output, self._clock.now())

    def discard(self, leases: Iterable[Lease]) -> None:
        """End leases whose content must not be used: nothing that they inserted is found any more.

        Nodes that others hold, too, go when those let go; until then they count as expired.
        """
        leases, now = list(leases), self._clock.now()
        for lease in leases:
            self._close(lease)
            if lease.new_tail is not None:
                self.tails.remove(lease.new_tail)
            self.pool.give_back(lease.duplicates.values())
            self._reclaimer.drop(lease.held)
        inserted = {n for lease in leases for n in lease.inserted}
        if len(self.pins):
            self.pins.end_through(inserted)
        for node in self._reclaimer.remove_unheld(inserted, LeaveCause.DISCARDED):
            node.limit_life(now)
        for lease in leases:
            self._reclaimer.prune(lease)

    def count_request(self, lease: Lease, *, restored_tokens: int = 0, restore_s: float = 0.0) -> None:
        """Count a request that looked its prompt up and was admitted with ``lease``: once per request.

        ``restored_tokens`` of its whole blocks were brought back for it, which took ``restore_s``.
        """
        match, space = lease.match, self.tree.spaces.use(lease.root.space.key)
        totals, num_prompt = space.totals, len(lease.tokens)
        totals.requests += 1
        totals.hits += match.num_tokens > 0
        totals.prompt_tokens += num_prompt
        totals.cached_block_tokens += match.block_tokens - restored_tokens
        totals.restored_tokens += restored_tokens
        if match.is_exact:
            totals.cached_tail_tokens += match.partial_tokens
        else:
            totals.cached_partial_tokens += match.partial_tokens
        totals.time_saved_s += self.cost(0, match.num_tokens) - restore_s
        canary = self._lanes.canary
        if canary is not None:
            counts = canary.counts if canary.has(space) else canary.live_counts
            counts.prompt_tokens += num_prompt
            counts.reused_tokens += match.num_tokens

    def forget_owner(self, owner: int) -> None:
        """Drop what a private request kept beside its leases. Call when it ends."""
        self.tails.remove_private(owner)

    # -- time and space -----------------------------------------------------------------------------

    def sweep_expired(self) -> int:
        """Free entries whose lifetime is over and that nobody holds; return how many. Bounded per call."""
        return self._reclaimer.sweep_expired()

    def evict(self, count: int) -> None:
        """Evict ``count`` blocks, leaves before parents.

        Raises ``OutOfBlocks``, and changes nothing, if there are fewer.
        """
        self._reclaimer.evict(count)

    def clear(self) -> int:
        """Drop every entry that nobody holds; return how many blocks that freed."""
        return self._reclaimer.clear()

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` if an invariant is broken. Walks everything: for tests and idle times."""
        check_integrity(self.pool, self.tree, self.tails, self.pins, self._lanes, self._leases)

    # -- inside -------------------------------------------------------------------------------------

    def _note_use(self, found: Found, num_tokens: int, owner: int | None) -> None:
        """Count the use of what was found, and tell the policy of the request."""
        path, now = found.path, self._clock.now()
        source = found.source
        whole_use = path if source is None or source.state is not NodeState.OPEN else [*path, source]
        self.tree.touch(whole_use, now)
        for matched in whole_use:
            matched.hits += 1
            matched.is_released = False
        if not found.is_read:
            return
        if whole_use:
            used = whole_use[-1]
            used.heat = add_heat(used.heat, use_at(now))
        shared = path if owner is None else [n for n in path if n.owner is None]
        self._lanes.policy_of(found.root.space).opened(shared, num_tokens, now)

    def _close(self, lease: Lease) -> None:
        if not lease.is_open:
            raise IntegrityError(f"{lease!r} closed twice")
        lease.is_open = False
        del self._leases[lease]
