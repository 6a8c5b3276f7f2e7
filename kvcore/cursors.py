"""Cursors: how far each waiting request's prompt is cached, kept current by the tree itself.

A cursor is parked at the deepest node that its prompt matches, in the group of those that need the same
key next. Publishing a child touches the group that needs that very key and nobody else; removing a node
hands its groups, merged into one, to the parent. Neither costs more with ten thousand waiting: groups
move whole, and the cursors of a group whose block came move on a bounded number per call.
"""

from __future__ import annotations

from array import array
from collections import deque

from kvcore.node import Node
from kvcore.tree import PrefixTree

__all__ = ["Cursor", "CursorBoard", "CursorGroup"]


class CursorGroup:
    """Cursors parked at one node that need the same key next (None: nothing more to match)."""

    __slots__ = ("key", "members", "node")

    def __init__(self, node: Node, key: bytes | None) -> None:
        self.node = node
        self.key = key
        self.members: dict[Cursor, None] = {}

    def absorb(self, other: CursorGroup) -> None:
        """Take over the members of a smaller group."""
        for cursor in other.members:
            cursor.group = self
        self.members.update(other.members)


class Cursor:
    """One waiting prompt's place in the tree."""

    __slots__ = ("group", "limit", "owner", "payload", "tokens")

    def __init__(self, tokens: array[int], limit: int, owner: int | None, payload: object) -> None:
        self.tokens = tokens
        self.limit = limit
        """Only ``tokens[:limit]`` may be matched: a prompt's last token is always computed, or a tail's."""
        self.owner = owner
        self.payload = payload
        """Whom to tell when it moves; opaque here."""
        self.group: CursorGroup | None = None

    @property
    def num_blocks(self) -> int:
        """Return how many whole blocks of the prompt are cached: the depth of its node."""
        return 0 if self.group is None else self.group.node.depth


class CursorBoard:
    """Park cursors and move them as the tree changes."""

    def __init__(self, tree: PrefixTree) -> None:
        self._tree = tree
        self._to_move: deque[tuple[Node, bytes]] = deque()

    def park(self, cursor: Cursor, start: Node, now: float) -> Node:
        """Walk on from ``start`` as deep as the prompt is cached, and wait there. Returns that node."""
        path = self._tree.walk(start, cursor.tokens, cursor.limit, cursor.owner, now)
        node = path[-1] if path else start
        if node.cursors is None:
            node.cursors = {}
        key = self._next_key(cursor, node)
        group = node.cursors.get(key)
        if group is None:
            group = node.cursors[key] = CursorGroup(node, key)
        group.members[cursor] = None
        cursor.group = group
        return node

    def leave(self, cursor: Cursor) -> None:
        """Take a cursor off the board. Does nothing if it is not on it."""
        group, cursor.group = cursor.group, None
        if group is not None:
            del group.members[cursor]
            _drop_if_empty(group)

    def published(self, parent: Node, child: Node) -> None:
        """Note that ``child`` became matchable; its cursors move with the next ``settle``."""
        if parent.cursors and child.packed in parent.cursors:
            self._to_move.append((parent, child.packed))

    def removed(self, node: Node, parent: Node) -> None:
        """Hand the cursors of a node that goes to its parent, where they need its key again."""
        if not node.cursors:
            return
        groups = list(node.cursors.values())
        node.cursors = None
        if parent.cursors is None:
            parent.cursors = {}
        waiting = parent.cursors.get(node.packed)
        if waiting is not None:
            groups.append(waiting)
        largest = max(groups, key=lambda g: len(g.members))
        for group in groups:
            if group is not largest:
                largest.absorb(group)
        largest.node, largest.key = parent, node.packed
        parent.cursors[node.packed] = largest
        successor = parent.children.get(node.packed)
        if successor is not None and successor is not node:
            self._to_move.append((parent, node.packed))

    def settle(self, *, max_moves: int, now: float) -> list[Cursor]:
        """Move at most ``max_moves`` cursors whose next block was published; return those that moved."""
        moved: list[Cursor] = []
        while self._to_move and len(moved) < max_moves:
            parent, key = self._to_move[0]
            group = parent.cursors.get(key) if parent.cursors else None
            child = parent.children.get(key)
            if group is None or child is None or child.is_expired(now):
                self._to_move.popleft()
                continue
            self._move(group, child, moved, max_moves, now)
            _drop_if_empty(group)
        return moved

    def _move(self, group: CursorGroup, child: Node, moved: list[Cursor], max_moves: int, now: float) -> None:
        """Move members of a group to ``child`` or below until it is empty or ``moved`` is full."""
        size = self._tree.block_size
        leader: Cursor | None = None
        end, way, trodden = child, slice(0, 0), array("i")
        while group.members and len(moved) < max_moves:
            cursor, _ = group.members.popitem()
            start = child
            if leader is None:
                leader = cursor
                end = self.park(cursor, child, now)
                way = slice(child.depth * size, end.depth * size)
                trodden = cursor.tokens[way]
            else:  # most of a group goes the leader's way: one comparison instead of a walk
                same = cursor.limit >= way.stop and cursor.owner == leader.owner
                if same and cursor.tokens[way] == trodden:
                    start = end
                self.park(cursor, start, now)
            moved.append(cursor)

    def _next_key(self, cursor: Cursor, node: Node) -> bytes | None:
        size = self._tree.block_size
        start = node.depth * size
        if start + size > cursor.limit:
            return None
        return cursor.tokens[start : start + size].tobytes()


def _drop_if_empty(group: CursorGroup) -> None:
    if group.members:
        return
    listed = group.node.cursors
    if listed is not None and listed.get(group.key) is group:
        del listed[group.key]
        if not listed:
            group.node.cursors = None
