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
from kvcore.errors import OutOfBlocks, OverBudget
from kvcore.events import LeaveCause
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.lease import Lease
from kvcore.manager import CacheManager
from kvcore.node import Node, NodeState
from kvcore.pins import Pin, PinKind
from kvcore.policies import POLICIES, make_policy
from tests.campaigns import cases

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=14)
owners = st.sampled_from([None, None, None, 1, 2])
lifetimes = st.sampled_from([None, None, 0.0, 3.0])
policies = st.sampled_from(sorted(POLICIES))


@dataclass
class Running:
    """A lease and what it is for."""

    lease: Lease
    owner: int | None
    planned: bool = False


class Follower:
    """A listener that keeps a copy of what is stored, as a tier or a watcher would."""

    def __init__(self, cache: CacheManager) -> None:
        self.cache = cache
        self.stored_nodes: set[Node] = set()
        self.taken_while_pinned: list[Node] = []

    def stored(self, nodes):
        assert all(n.state is NodeState.READY and n.owner is None for n in nodes)
        self.stored_nodes.update(nodes)

    def tail_stored(self, tail):
        assert tail.is_ready
        assert (tail.node.tails or {}).get(tail.key) is tail

    def leaving(self, node, cause):
        assert node.parent is not None
        assert node.block is not None
        assert not node.is_busy
        self.stored_nodes.discard(node)
        if cause in (LeaveCause.CAPACITY, LeaveCause.QUOTA, LeaveCause.RELEASED):
            hard = {n for pin in self.cache.pins.all if pin.kind is PinKind.HARD for n in path_to(pin.node)}
            assert node not in hard
        if cause is LeaveCause.CAPACITY and node.pin is not None:  # a soft pin: nothing else could go
            leaves = [n for n in self.cache.tree.iterate() if not n.is_busy and not n.num_children]
            assert all(n.pin is not None for n in leaves)


def path_to(node: Node) -> list[Node]:
    path = []
    while not node.is_root:
        path.append(node)
        node = node.real_parent()
    return path


class CacheAgainstModel(RuleBasedStateMachine):
    """Random requests by hand: open, extend, commit, roll back, release, discard, expire, evict, clear.

    And an operator who pins, changes lifetimes, releases, sets quotas and switches policies meanwhile.
    """

    @initialize(num_blocks=st.integers(3, 14), block_size=st.integers(1, 4), num_slots=st.integers(0, 3))
    def start(self, num_blocks, block_size, num_slots):
        self.clock = ManualClock()
        self.size = block_size
        self.cache = CacheManager(
            num_blocks=num_blocks, block_size=block_size, clock=self.clock, num_logits_slots=num_slots
        )
        self.follower = Follower(self.cache)
        self.cache.listeners.append(self.follower)
        self.ended: list[Pin] = []
        self.cache.pins.on_end = self.ended.append
        self.hard: dict[Pin, list[Node]] = {}
        """Hard pins that should hold, with the path that each covers."""
        self.spoiled: set[Node] = set()
        """Nodes of leases that were discarded."""
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

    def of_this_step(self) -> list[Running]:
        """Return all that the running step takes along: one that found no blocks may build on it, too."""
        return [
            r for r in self.running if r.planned or any(n.state is NodeState.PENDING for n in r.lease.nodes)
        ]

    @precondition(lambda self: any(r.planned for r in self.running))
    @rule()
    def crash(self):
        planned = self.of_this_step()
        self.spoiled.update(n for r in planned for n in r.lease.inserted)
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
            self.spoiled.update(inserted)
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

    # -- what an operator does ----------------------------------------------------------------------

    def draw_node(self, data) -> Node | None:
        nodes = [n for n in self.cache.tree.iterate() if self.cache.control.is_findable(n)]
        return data.draw(st.sampled_from(nodes)) if nodes else None

    @rule(data=st.data(), kind=st.sampled_from(PinKind), lifetime_s=lifetimes)
    def pin(self, data, kind, lifetime_s):
        node = self.draw_node(data)
        if node is None:
            return
        before, pins = self.snapshot(), self.cache.pins
        previous = node.pin
        covered = {n for pin in pins.all for n in path_to(pin.node)}
        try:
            done = self.cache.control.pin(node, kind, lifetime_s=lifetime_s)
        except OverBudget:
            assert node.pin is previous
            same = {n for pin in pins.all if pin.kind is kind for n in path_to(pin.node)}
            assert len(same | set(path_to(node))) > pins.budgets[kind]
            return
        finally:
            assert self.snapshot() == before
        assert pins.num_blocks(kind) <= pins.budgets[kind]
        assert (done.num_blocks, done.newly_pinned_blocks) == (
            node.depth,
            len(set(path_to(node)) - covered),
        )
        self.hard.pop(previous, None)
        if kind is PinKind.HARD:
            self.hard[node.pin] = path_to(node)

    @rule(data=st.data())
    def unpin(self, data):
        pins = self.cache.pins.all
        if not pins:
            return
        pin = data.draw(st.sampled_from(pins))
        self.hard.pop(pin, None)
        assert self.cache.control.unpin(pin.node) == pin.node.depth or pin.node.parent is None
        assert pin in self.ended

    @rule(data=st.data(), lifetime_s=lifetimes)
    def set_lifetime(self, data, lifetime_s):
        node = self.draw_node(data)
        if node is None:
            return
        before = {n: n.expires_at for n in self.cache.tree.iterate()}
        changed = self.cache.control.set_lifetime(node, lifetime_s)
        ends_at = None if lifetime_s is None else self.clock.now() + lifetime_s
        assert {n for n, at in before.items() if n.expires_at != at} == set(changed)
        assert node.expires_at == ends_at
        for above in path_to(node):
            assert above.expires_at is None or (ends_at is not None and above.expires_at >= ends_at)

    @rule(data=st.data())
    def release_hint(self, data):
        node = self.draw_node(data)
        if node is not None:
            assert self.cache.control.release(node)[0] is node

    @rule(which=st.integers(0, 1), share=st.sampled_from([None, 0.2, 0.5]))
    def set_quota(self, which, share):
        before = self.snapshot()
        self.cache.control.set_quota(self.names[which], share)
        assert self.snapshot() == before

    @rule(name=policies, share=st.sampled_from([0.0, 0.0, 0.3, 0.5]))
    def switch_policy(self, name, share):
        before, control = self.snapshot(), self.cache.control
        policy = make_policy(name, capacity_blocks=self.cache.pool.num_blocks)
        if share:
            control.start_canary(policy, share)
        else:
            control.end_canary()
            control.set_policy(policy)
        assert self.snapshot() == before

    @rule(data=st.data(), min_idle_s=st.sampled_from([None, 1.0]))
    def evict_below(self, data, min_idle_s):
        node = self.draw_node(data)
        if node is None:
            return
        before = self.snapshot()
        chosen = self.cache.control.select(below=[node], min_idle_s=min_idle_s)
        assert self.snapshot() == before
        assert self.cache.control.take_out(chosen.nodes) == len(chosen.nodes)
        if not chosen.num_kept and min_idle_s is None:
            assert node.parent is None

    def snapshot(self) -> list[object]:
        return [sorted(n.serial for n in self.cache.tree.iterate()), self.cache.pool.num_free]

    # -- what always holds --------------------------------------------------------------------------

    @invariant()
    def structure_is_sound(self):
        if hasattr(self, "cache"):
            self.cache.check_integrity()

    @invariant()
    def hard_pins_hold_until_their_time(self):
        if not hasattr(self, "cache"):
            return
        now = self.clock.now()
        for pin, path in list(self.hard.items()):
            is_over = pin.ends_at is not None and pin.ends_at <= now
            is_stale = any(n.is_expired(now) or n in self.spoiled for n in path)
            if pin.node.pin is pin:
                assert path_to(pin.node) == path
                continue
            assert is_over or is_stale
            assert pin in self.ended
            del self.hard[pin]

    @invariant()
    def listeners_know_what_is_stored(self):
        if not hasattr(self, "cache"):
            return
        ready = {n for n in self.cache.tree.iterate() if n.state is NodeState.READY and n.owner is None}
        assert self.follower.stored_nodes == ready

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
        in_step = self.of_this_step()
        self.cache.roll_back([r.lease for r in in_step])
        for running in self.running:
            if running not in in_step:
                self.cache.release(running.lease)
        for owner in (1, 2):
            self.cache.forget_owner(owner)
        for pin in self.cache.pins.all:
            self.cache.control.unpin(pin.node)
        self.cache.clear()
        self.cache.check_integrity()
        assert self.cache.pool.num_free == self.cache.pool.num_blocks
        assert (len(self.cache.tails), len(self.cache.tree.roots)) == (0, 0)


TestCacheAgainstModel = CacheAgainstModel.TestCase
TestCacheAgainstModel.settings = settings(max_examples=cases(150, full=500), stateful_step_count=50)
