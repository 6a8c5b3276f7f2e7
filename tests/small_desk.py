"""A small desk over a real cache, to test what stands between it and the client.

It does for real what the cache itself can do (look up, list, clear); pins and policies it only remembers, and
snapshots it "writes" one block per turn into a dictionary. Names of snapshots carry orders: "broken" raises
in the middle, "endless" never ends by itself.

``python -m tests.small_desk --fd N`` is an engine process with such a desk.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from kvcore.clock import Clock
from kvcore.keys import NamespaceKey, chain_digests, pack_tokens
from kvcore.manager import CacheManager
from kvcore.node import Node
from server.engine import admin_messages as ops
from server.engine.admin_desk import AdminMessage
from server.engine.admin_messages import AdminErrorKind, AdminRefusal, CacheEventKind, PinType, PrefixRef
from server.engine.local import LocalEngine
from server.engine.loop import EngineParts
from server.engine.options import EngineOptions
from server.engine.serve import serve
from tests.fakes import FakeRunner, fake_parts

__all__ = ["SmallDesk", "engine_with_desk", "parts_with_desk"]

POLICIES = {"lru": "the least recently used first", "fifo": "the oldest first"}


class Refused(Exception):
    """Carries a refusal out of an operation."""

    def __init__(self, kind: AdminErrorKind, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.refusal = AdminRefusal(kind, reason, field)


class SmallDesk:
    """Implements ``AdminDesk``."""

    def __init__(self, cache: CacheManager, clock: Clock, *, pin_budget_blocks: int = 8) -> None:
        self.cache = cache
        self.clock = clock
        self.pin_budget_blocks = pin_budget_blocks
        self.pins: dict[str, tuple[PinType, int]] = {}
        self.snapshots: dict[str, int] = {}
        self.policy = "lru"
        self.cancelled: list[int] = []
        self.lifetimes: list[float | None] = []
        self.epoch = time.time_ns()
        self._sequence = 0
        self._is_watched = False
        self._events: list[ops.CacheEventNote] = []
        self._said: list[AdminMessage] = []
        self._long: dict[int, Iterator[AdminMessage]] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._long)

    def handle(self, call: ops.AdminCall) -> None:
        op = call.op
        if isinstance(op, ops.SaveSnapshot | ops.RestoreSnapshot):
            self._long[call.key] = self._snapshot(call.key, op)
            return
        try:
            result = self._carry_out(op)
        except Refused as error:
            result = error.refusal
        self._said.append(ops.AdminReply(call.key, result))

    def cancel(self, key: int) -> None:
        if self._long.pop(key, None) is not None:
            self.cancelled.append(key)

    def watch(self, is_on: bool) -> None:
        self._is_watched = is_on
        self._events.clear()

    def advance(self) -> None:
        for key, work in list(self._long.items()):
            try:
                self._said.append(next(work))
            except StopIteration:
                del self._long[key]
            except Refused as error:
                del self._long[key]
                self._said.append(ops.AdminReply(key, error.refusal))

    def drain(self) -> list[AdminMessage]:
        said, self._said = self._said, []
        if self._events:
            said.append(ops.CacheEvents(self.epoch, self._events))
            self._events = []
        return said

    def tell(self, kind: CacheEventKind, prefix_id: str, num_blocks: int, *, cause: str = "") -> None:
        self._sequence += 1
        if self._is_watched:
            note = ops.CacheEventNote(
                self._sequence,
                kind,
                self._namespace(""),
                prefix_id,
                16 * num_blocks,
                num_blocks,
                0.0,
                cause=cause,
            )
            self._events.append(note)

    def skip_sequence(self, count: int) -> None:
        """Lose events, as a turn with too many of them would."""
        self._sequence += count

    # -- operations ---------------------------------------------------------------------------------

    def _carry_out(self, op: ops.AdminOp) -> ops.AdminResult:
        match op:
            case ops.ReadStats():
                return self._stats()
            case ops.ListPrefixes():
                return self._page(op)
            case ops.LookUpPrefix():
                match = self.cache.lookup(
                    NamespaceKey("", salt=op.prefix.salt), pack_tokens(op.prefix.token_ids)
                )
                return ops.PrefixFound(
                    prompt_tokens=len(op.prefix.token_ids),
                    cached_block_tokens=match.block_tokens,
                    cached_partial_tokens=match.partial_tokens,
                    is_exact=match.is_exact,
                    tiers={"disk": 3},
                    prefix_id=self._find(op.prefix)[0] if match.block_tokens else "",
                )
            case ops.PinPrefix():
                prefix_id, num_blocks = self._find(op.prefix)
                if num_blocks > self.pin_budget_blocks:
                    raise Refused(AdminErrorKind.OVER_BUDGET, "the budget of pins is spent")
                is_new = prefix_id not in self.pins
                self.pins[prefix_id] = (op.pin, num_blocks)
                self.tell(CacheEventKind.PINNED, prefix_id, num_blocks)
                return ops.Pinned(
                    prefix_id=prefix_id,
                    num_tokens=num_blocks * self.cache.block_size,
                    num_blocks=num_blocks,
                    newly_pinned_blocks=num_blocks * is_new,
                )
            case ops.UnpinPrefix():
                prefix_id, num_blocks = self._find(op.prefix)
                if self.pins.pop(prefix_id, None) is None:
                    return ops.Touched(prefix_id, 0)
                self.tell(CacheEventKind.UNPINNED, prefix_id, num_blocks)
                return ops.Touched(prefix_id, num_blocks)
            case ops.SetLifetime():
                self.lifetimes.append(op.lifetime_s)
                return ops.Touched(*self._find(op.prefix))
            case ops.ReleasePrefix():
                return ops.Touched(*self._find(op.prefix))
            case ops.EvictPrefixes():
                if op.subtree is not None:
                    self._find(op.subtree)
                return self._clear(skip_in_use=op.skip_in_use)
            case ops.ClearCache():
                return self._clear(skip_in_use=op.skip_in_use)
            case ops.DescribePolicy() | ops.SetPolicy():
                return self._policy(op)
            case _:
                raise AssertionError(op)

    def _clear(self, *, skip_in_use: bool) -> ops.Evicted:
        busy = sum(node.is_busy for node in self.cache.tree.iterate())
        if busy and not skip_in_use:
            raise Refused(AdminErrorKind.IN_USE, f"{busy} blocks are in use")
        evicted = self.cache.clear()
        self.tell(CacheEventKind.EVICTED, "", evicted, cause="admin")
        return ops.Evicted(evicted, busy, 0)

    def _policy(self, op: ops.DescribePolicy | ops.SetPolicy) -> ops.PolicyReport:
        if isinstance(op, ops.SetPolicy) and op.policy is not None:
            if op.policy not in POLICIES:
                raise Refused(AdminErrorKind.INVALID, "is not the name of a policy", "policy")
            self.policy = op.policy
        trial = ops.TrialReport(
            policy="fifo",
            token_hit_rate=0.25,
            request_hit_rate=0.5,
            requests=4,
            tokens=64,
            sampled_share=0.1,
            cost_share=0.01,
        )
        canary = ops.CanaryReport(
            policy="fifo", share=0.25, namespaces=2, token_hit_rate=0.5, live_token_hit_rate=0.25
        )
        return ops.PolicyReport(policy=self.policy, available=dict(POLICIES), trial=[trial], canary=canary)

    def _snapshot(self, key: int, op: ops.SaveSnapshot | ops.RestoreSnapshot) -> Iterator[AdminMessage]:
        if isinstance(op, ops.RestoreSnapshot):
            if op.name not in self.snapshots:
                raise Refused(AdminErrorKind.NOT_FOUND, "no such snapshot", "name")
            total = self.snapshots[op.name]
        else:
            if op.name in self.snapshots and not op.replace:
                raise Refused(AdminErrorKind.EXISTS, "there is a snapshot of that name")
            total = len(self._entries())
        done = 0
        while done < total or op.name == "endless":
            done += 1
            if op.name == "broken" and done == 2:
                raise OSError(28, "No space left on device", "/var/secret/path")
            yield ops.AdminProgress(key, done, total, done * 100, 0)
        self.snapshots[op.name] = total
        yield ops.AdminReply(key, ops.SnapshotDone(total, total * 100, 0))

    # -- looking ------------------------------------------------------------------------------------

    def _stats(self) -> ops.CacheReport:
        pool = self.cache.pool
        totals = ops.CacheTotals(
            entries=len(self._entries()), blocks=len(self._entries()), requests=4, hits=1, prompt_tokens=100
        )
        return ops.CacheReport(
            totals=totals,
            namespaces=[
                ops.NamespaceReport(self._namespace(key.salt), key.salt, totals, self.policy, 0)
                for key in self.cache.tree.roots
            ],
            tiers=[],
            pins=ops.PinReport(soft_pins=len(self.pins)),
            prefetch=ops.PrefetchReport(),
            num_blocks=pool.num_blocks,
            num_blocks_in_use=pool.num_blocks - pool.num_free - self.cache.tree.num_evictable,
            num_blocks_cached=self.cache.tree.num_evictable,
            num_blocks_free=pool.num_free,
            uptime_s=self.clock.now(),
            policy=self.policy,
        )

    def _page(self, op: ops.ListPrefixes) -> ops.PrefixPage:
        entries = sorted(self._entries())
        start = 0
        if op.page_token:
            if not op.page_token.isdigit():
                raise Refused(AdminErrorKind.INVALID, "is not a page token of this server", "page_token")
            start = int(op.page_token)
        shown = entries[start : start + op.page_size]
        stop = start + len(shown)
        return ops.PrefixPage(
            [self._entry(*entry, viewer_salt=op.viewer_salt) for entry in shown],
            str(stop) if stop < len(entries) else "",
            len(entries),
        )

    def _entry(
        self, prefix_id: str, salt: str, depth: int, tokens: tuple[int, ...], *, viewer_salt: str
    ) -> ops.PrefixEntry:
        pin = self.pins.get(prefix_id)
        return ops.PrefixEntry(
            prefix_id=prefix_id,
            parent_id="",
            namespace=self._namespace(salt),
            salt=salt,
            num_tokens=depth * self.cache.block_size,
            own_tokens=self.cache.block_size,
            own_blocks=1,
            hits=0,
            age_s=1.0,
            idle_s=0.5,
            expires_in_s=None,
            pin=None if pin is None else pin[0],
            pin_expires_in_s=None,
            in_use=False,
            has_last_logits=False,
            num_children=0,
            tiers={"disk": 1, "host": 0},
            value=0.5,
            preview=list(tokens) if salt == viewer_salt else [],
        )

    def _entries(self) -> list[tuple[str, str, int, tuple[int, ...]]]:
        """Return id, salt, depth and own tokens of every full node."""
        entries = []
        stack: list[tuple[Node, NamespaceKey, list[tuple[int, ...]]]] = [
            (root, key, []) for key, root in self.cache.tree.roots.items()
        ]
        while stack:
            node, key, above = stack.pop()
            path = above if node.is_root else [*above, node.tokens]
            if not node.is_root:
                *_, digest = chain_digests(key.seed(), path)
                entries.append((digest.hex(), key.salt, len(path), path[-1]))
            stack.extend((child, key, path) for child in node.children.values())
        return entries

    def _find(self, ref: PrefixRef) -> tuple[str, int]:
        """Return id and number of blocks of the cached part of a prefix."""
        entries = self._entries()
        if ref.prefix_id:
            found = [entry for entry in entries if entry[0].startswith(ref.prefix_id)]
            if len(found) > 1:
                raise Refused(AdminErrorKind.AMBIGUOUS, "several prefixes begin so")
        else:
            size = self.cache.block_size
            blocks = [ref.token_ids[i : i + size] for i in range(0, len(ref.token_ids) - size + 1, size)]
            ids = {d.hex() for d in chain_digests(NamespaceKey("", salt=ref.salt).seed(), blocks)}
            found = sorted((e for e in entries if e[0] in ids), key=lambda e: -e[2])[:1]
        if not found:
            raise Refused(AdminErrorKind.NOT_FOUND, "no such prefix is cached")
        return found[0][0], found[0][2]

    def _namespace(self, salt: str) -> str:
        return NamespaceKey("", salt=salt).seed().hex()[:16]


def parts_with_desk(
    options: EngineOptions | None = None, *, runner: FakeRunner | None = None, clock: Clock | None = None
) -> EngineParts:
    """Return an engine's parts with a :class:`SmallDesk` over its cache."""
    parts = fake_parts(options, runner=runner, clock=clock)
    return replace(parts, desk=SmallDesk(parts.scheduler.cache, parts.clock))


def engine_with_desk(
    runner: FakeRunner | None = None, **options: object
) -> tuple[LocalEngine, list[SmallDesk]]:
    """Return an engine in a thread, and a list that holds its desk once it is started."""
    resolved = EngineOptions(model="fake", **options)  # type: ignore[arg-type]
    desks: list[SmallDesk] = []

    def build() -> EngineParts:
        parts = parts_with_desk(resolved, runner=runner)
        assert isinstance(parts.desk, SmallDesk)
        desks.append(parts.desk)
        return parts

    return LocalEngine(build), desks


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    sys.exit(serve(parser.parse_args().fd, parts_with_desk))
