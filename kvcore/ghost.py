"""A cache without its contents: which blocks would be there under a policy, and what it would have hit.

One ghost entry costs some hundred bytes of host memory and no KV memory. It behaves as the server's tree
does: a hit is the longest cached prefix; a request inserts all of its blocks; what it uses cannot be
evicted by itself; of a request that is larger than the cache only the front is kept; leaves go before
parents; an entry whose lifetime is over is no hit and goes with all that hangs below it. The policy is
the very object that would serve, in the very eviction queue.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar

from kvcore.queues import EvictionQueue

if TYPE_CHECKING:
    from kvcore.policies.interface import EvictionPolicy

__all__ = ["GhostCache", "GhostEntry"]

_serials = count(1)


class GhostEntry:
    """One block that would be cached, or a namespace's root. See ``kvcore.policies.Entry``."""

    __slots__ = (
        "children",
        "depth",
        "hits",
        "inserted_at",
        "is_busy",
        "is_root",
        "key",
        "last_used",
        "mark",
        "num_children",
        "parent",
        "serial",
    )

    cursors: ClassVar[None] = None

    def __init__(self, parent: GhostEntry | None, key: Hashable, tick: int) -> None:
        self.parent = parent
        """None of a root, and of an entry that was removed."""
        self.key = key
        self.is_root = parent is None
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[Hashable, GhostEntry] = {}
        self.num_children = 0
        self.last_used = tick
        self.inserted_at: float | None = None
        self.hits = 0
        self.is_busy = False
        self.mark: Any = None
        self.serial = next(_serials)

    def __repr__(self) -> str:
        return f"GhostEntry#{self.serial}(depth={self.depth} key={self.key!r})"


class GhostCache:
    """Replay requests against ``capacity_blocks`` of ghost entries. Time is passed in; one thread."""

    def __init__(
        self, policy: EvictionPolicy, *, capacity_blocks: int, lifetime_s: float | None = None
    ) -> None:
        if capacity_blocks < 1:
            raise ValueError("capacity_blocks must be at least 1")
        self.capacity_blocks = capacity_blocks
        self.policy = policy
        self.num_entries = 0
        self.num_evicted = 0
        self.num_expired = 0
        self._lifetime_s = lifetime_s
        self._queue = EvictionQueue[GhostEntry](policy)
        self._roots: dict[Hashable, GhostEntry] = {}
        self._expiring: deque[GhostEntry] = deque()
        self._tick = 0

    def __repr__(self) -> str:
        return f"GhostCache({self.policy!r}, {self.num_entries}/{self.capacity_blocks} entries)"

    def request(
        self,
        namespace: Hashable,
        blocks: Sequence[Hashable],
        now: float,
        *,
        num_tokens: int,
        num_output_tokens: int = 0,
    ) -> int:
        """Serve one request: return how many of its leading blocks were cached, and insert the others.

        The request begins and ends at ``now``.
        """
        if self._lifetime_s is not None:
            self._sweep_expired(now)
        path = self._touch(namespace, blocks)
        num_matched = len(path)
        policy = self.policy
        policy.opened(path, num_tokens, now)
        node = path[-1] if path else self._roots[namespace]
        for entry in path:
            entry.is_busy = True
        for key in blocks[num_matched:]:
            if self.num_entries >= self.capacity_blocks and not self._evict(now):
                break
            node = self._insert(node, key, now)
            path.append(node)
        policy.closed(path, num_tokens, num_output_tokens, now)
        for entry in path:
            entry.is_busy = False
        if path:
            self._queue.offer(node)
        self._queue.compact(self.num_entries)
        return num_matched

    def resize(self, capacity_blocks: int, now: float) -> None:
        """Go on with another capacity; what no longer fits is evicted."""
        if capacity_blocks < 1:
            raise ValueError("capacity_blocks must be at least 1")
        self.capacity_blocks = capacity_blocks
        while self.num_entries > capacity_blocks:
            self._evict(now)

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` if the counts do not add up. Walks everything."""
        found, stack = 0, list(self._roots.values())
        while stack:
            node = stack.pop()
            if node.num_children != len(node.children):
                raise AssertionError(f"{node!r} counts {node.num_children} children")
            found += node.num_children
            stack.extend(node.children.values())
        if found != self.num_entries or found > self.capacity_blocks:
            raise AssertionError(f"{self!r} holds {found} entries")

    def _touch(self, namespace: Hashable, blocks: Sequence[Hashable]) -> list[GhostEntry]:
        """Find the longest cached prefix and mark it as used now."""
        self._tick += 1
        tick = self._tick
        node = self._roots.get(namespace)
        if node is None:
            node = self._roots[namespace] = GhostEntry(None, namespace, tick)
        path: list[GhostEntry] = []
        for key in blocks:
            child = node.children.get(key)
            if child is None:
                break
            child.last_used = tick
            child.hits += 1
            path.append(child)
            node = child
        return path

    def _insert(self, parent: GhostEntry, key: Hashable, now: float) -> GhostEntry:
        node = GhostEntry(parent, key, self._tick)
        node.inserted_at = now
        node.is_busy = True
        parent.children[key] = node
        parent.num_children += 1
        self.num_entries += 1
        if self._lifetime_s is not None:
            self._expiring.append(node)
        self.policy.inserted(node, now)
        return node

    def _evict(self, now: float) -> bool:
        """Evict one entry; say whether there was one."""
        try:
            node = self._queue.pop(now)
        except IndexError:
            return False
        self._remove(node, now, evicted=True)
        self.num_evicted += 1
        return True

    def _remove(self, node: GhostEntry, now: float, *, evicted: bool) -> None:
        parent = node.parent
        if parent is None:
            raise AssertionError(f"{node!r} was removed already")
        self.policy.removed(node, now, evicted=evicted)
        del parent.children[node.key]
        parent.num_children -= 1
        node.parent = None
        self.num_entries -= 1
        if not parent.is_root:
            self._queue.offer(parent)
        elif not parent.num_children and not evicted:
            self._roots.pop(parent.key, None)

    def _sweep_expired(self, now: float) -> None:
        lifetime_s = self._lifetime_s or 0.0
        while self._expiring:
            top = self._expiring[0]
            if top.parent is not None and (top.inserted_at or 0.0) + lifetime_s > now:
                return
            self._expiring.popleft()
            if top.parent is None:
                continue
            order, stack = [], [top]
            while stack:
                node = stack.pop()
                order.append(node)
                stack.extend(node.children.values())
            for node in reversed(order):
                self._remove(node, now, evicted=False)
            self.num_expired += len(order)
