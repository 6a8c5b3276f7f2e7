"""The cache against a naive model: a plain list of which blocks exist, and a scan over it.

The model knows nothing of holds, heaps or recency. It says what may be matched: a block stays until the
cache reports fewer blocks than before (eviction, expiry), and then the model looks which are left, so
what it checks is *what a prompt may find*: exactly the longest run of blocks that exist, have not expired
and may be seen, and inside the next block the longest settled run of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvcore.clock import ManualClock
from kvcore.errors import OutOfBlocks
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.lease import Lease
from kvcore.manager import CacheManager
from kvcore.node import Node, NodeState

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14)
owners = st.sampled_from([None, None, None, 1, 2])
lifetimes = st.sampled_from([None, None, 0.0, 3.0])


@dataclass
class Running:
    """A lease and what it is for."""

    lease: Lease
    owner: int | None
    planned: bool = False


class CacheAgainstModel(RuleBasedStateMachine):
    """Random requests by hand: open, extend, commit, roll back, release, discard, expire, evict, clear."""

    @initialize(num_blocks=st.integers(3, 14), block_size=st.integers(1, 4), num_slots=st.integers(0, 3))
    def start(self, num_blocks, block_size, num_slots):
        self.clock = ManualClock()
        self.size = block_size
        self.cache = CacheManager(
            num_blocks=num_blocks, block_size=block_size, clock=self.clock, num_logits_slots=num_slots
        )
        self.running: list[Running] = []
        self.names = [NamespaceKey("m"), NamespaceKey("m", salt="s")]
        # What every slot of every block holds: the whole prefix up to it, as the worker would compute it.
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.logits: dict[int, tuple[int, ...]] = {}

    # -- the model ----------------------------------------------------------------------------------

    def may_see(self, node: Node, owner: int | None) -> bool:
        return node.owner in (None, owner) and not node.is_expired(self.clock.now())

    def longest(self, namespace, tokens: list[int], owner: int | None) -> int:
        """Count the blocks that a prompt may share, by scanning all nodes at every step."""
        root, depth = self.cache.tree.roots.get(namespace), 0
        node = root
        while node is not None and (depth + 1) * self.size <= len(tokens):
            wanted = tuple(tokens[depth * self.size : (depth + 1) * self.size])
            fitting = [
                n
                for n in self.cache.tree.iterate()
                if n.parent is node
                and n.state is not NodeState.OPEN
                and n.tokens == wanted
                and self.may_see(n, owner)
                and n not in self.cache.tree.displaced
            ]
            node = min(fitting, key=lambda n: n.owner is not None, default=None)
            depth += node is not None
        return depth

    # -- what happens -------------------------------------------------------------------------------

    @rule(
        tokens=prompts,
        which=st.integers(0, 1),
        owner=owners,
        lifetime_s=lifetimes,
        read=st.sampled_from([True, True, True, False]),
        count=st.integers(1, 14),
    )
    def open(self, tokens, which, owner, lifetime_s, read, count):
        packed, namespace = pack_tokens(tokens), self.names[which]
        found = self.cache.find(namespace, packed, read=read, owner=owner)
        if read:
            depth = self.longest(namespace, tokens, owner)
            if depth * self.size == len(tokens) and not found.match.is_exact:
                depth -= 1
            assert found.match.block_tokens == depth * self.size
        else:
            assert found.match.num_tokens == 0
        if found.is_being_computed:
            if found.match.is_exact or not read:
                return
            count = 1  # legal, if not wise
        if found.match.is_exact and found.tail is not None and not found.tail.is_ready:
            return
        before = self.snapshot()
        try:
            lease = self.cache.open(found, packed, owner=owner, lifetime_s=lifetime_s)
        except OutOfBlocks:
            assert self.snapshot() == before
            return
        running = Running(lease, owner)
        self.running.append(running)
        if lease.copy is not None:
            for slot in range(lease.copy.num_slots):
                self.slots[lease.copy.target, slot] = self.slots[lease.copy.source, slot]
        if lease.logits_from is not None:
            assert self.logits[lease.logits_from] == tuple(tokens)
            running.planned = True
        else:
            self.plan(running, min(count, len(tokens) - lease.num_computed))

    def plan(self, running: Running, count: int) -> None:
        lease = running.lease
        before = self.snapshot()
        try:
            self.cache.extend(lease, count)
        except OutOfBlocks:
            assert self.snapshot() == before
            return
        running.planned = True
        if lease.num_computed + count == len(lease.tokens):
            self.cache.add_tail(lease)

    @precondition(lambda self: any(not r.planned for r in self.running))
    @rule(data=st.data(), count=st.integers(1, 6), drawn=st.integers(0, 2))
    def go_on(self, data, count, drawn):
        running = data.draw(st.sampled_from([r for r in self.running if not r.planned]))
        lease = running.lease
        if lease.num_computed == len(lease.tokens):
            lease.tokens.append(drawn)
        self.plan(running, min(count, len(lease.tokens) - lease.num_computed))

    @precondition(lambda self: any(r.planned for r in self.running))
    @rule()
    def commit(self):
        planned = [r for r in self.running if r.planned]
        saved = []
        for running in sorted(planned, key=lambda r: r.lease.num_computed):
            lease = running.lease
            for position in range(lease.num_computed, lease.num_computed + lease.in_flight):
                at = (lease.block_table[position // self.size], position % self.size)
                self.slots[at] = tuple(lease.tokens[: position + 1])
            if lease.save_logits_to is not None:
                saved.append((lease.save_logits_to, tuple(lease.tokens)))
            running.planned = False
        read = {r.lease.logits_from for r in planned} - {None}
        assert not read & {slot for slot, _ in saved}
        self.logits.update(saved)
        self.cache.commit([r.lease for r in planned])
        assert not any(n.state is NodeState.PENDING for n in self.cache.tree.iterate())

    @precondition(lambda self: any(r.planned for r in self.running))
    @rule()
    def crash(self):
        planned = [r for r in self.running if r.planned]
        self.cache.roll_back([r.lease for r in planned])
        self.running = [r for r in self.running if r not in planned]
        assert not any(n.state is NodeState.PENDING for n in self.cache.tree.iterate())

    @precondition(lambda self: any(not r.planned for r in self.running))
    @rule(data=st.data(), fails=st.sampled_from([False, False, True]))
    def end(self, data, fails):
        running = data.draw(st.sampled_from([r for r in self.running if not r.planned]))
        self.running.remove(running)
        if fails:
            inserted = running.lease.inserted
            self.cache.discard([running.lease])
            assert all(n.parent is None or n.is_expired(self.clock.now()) for n in inserted)
        else:
            self.cache.release(running.lease)
        if running.owner is not None and all(r.owner != running.owner for r in self.running):
            self.cache.forget_owner(running.owner)
            assert all(n.owner != running.owner for n in self.cache.tree.iterate())

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def wait(self, seconds):
        self.clock.advance(seconds)
        self.cache.sweep_expired()

    @rule(count=st.integers(1, 5))
    def evict(self, count):
        before, possible = self.snapshot(), self.cache.tree.num_evictable
        try:
            self.cache.evict(count)
        except OutOfBlocks:
            assert count > possible
            assert self.snapshot() == before

    @rule()
    def clear(self):
        self.cache.clear()
        assert all(node.is_busy for node in self.cache.tree.iterate())

    def snapshot(self) -> list[object]:
        return [sorted(n.serial for n in self.cache.tree.iterate()), self.cache.pool.num_free]

    # -- what always holds --------------------------------------------------------------------------

    @invariant()
    def structure_is_sound(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity()

    @invariant()
    def every_block_holds_what_its_place_says(self):
        """Settled slots hold the very prefix that leads to them: what sharing relies on."""
        if not hasattr(self, "cache"):
            return
        for running in self.running:
            lease = running.lease
            for position in range(lease.num_computed):
                at = (lease.block_table[position // self.size], position % self.size)
                shared = lease.nodes[position // self.size].state is NodeState.PENDING
                assert shared or self.slots[at] == tuple(lease.tokens[: position + 1])
        for node in self.cache.tree.iterate():
            if node.state is not NodeState.PENDING and node.tokens:
                path, above = list(node.tokens), node.parent
                while above is not None and not above.is_root:
                    path[:0] = above.tokens
                    above = above.parent
                start = (node.depth - 1) * self.size
                for slot in range(len(node.tokens)):
                    assert self.slots[node.block, slot] == tuple(path[: start + slot + 1])

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        self.cache.roll_back([r.lease for r in self.running if r.planned])
        for running in self.running:
            if not running.planned:
                self.cache.release(running.lease)
        for owner in (1, 2):
            self.cache.forget_owner(owner)
        self.cache.clear()
        self.cache.check_integrity()
        assert self.cache.pool.num_free == self.cache.pool.num_blocks
        assert (len(self.cache.tails), len(self.cache.tree.roots)) == (0, 0)


TestCacheAgainstModel = CacheAgainstModel.TestCase
TestCacheAgainstModel.settings = settings(max_examples=400, stateful_step_count=40)
