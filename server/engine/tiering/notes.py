"""Telling whoever watches what went down and came up, one note for each run of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kvcore.node import Node
from server.engine.admin_messages import CacheEventKind

__all__ = ["TierNotes", "runs_of"]


class TierNotes(Protocol):
    """Takes notes for ``WatchCache``."""

    is_on: bool

    def note(
        self, kind: CacheEventKind, node: Node, num_blocks: int, *, cause: str = "", tier: str = ""
    ) -> None:
        """Note that something happened to ``num_blocks`` blocks that end with ``node``."""
        ...


def runs_of(moved: Iterable[tuple[Node, str]]) -> Iterator[tuple[Node, int, str]]:
    """Join neighbours that continue each other, upwards or downwards, and went to or came from one tier.

    Yields the deepest node of each run, how many blocks it has, and the tier. Nodes that were evicted have
    lost their parent: those of one prefix are known by their depth.
    """
    deepest: Node | None = None
    last: Node | None = None
    count, place = 0, ""
    for node, tier in moved:
        if last is not None and deepest is not None:
            joins = node.space is last.space and tier == place and abs(node.depth - last.depth) == 1
            if joins and (node.parent is last or last.parent is node or node.parent is None):
                deepest = node if node.depth > deepest.depth else deepest
                last, count = node, count + 1
                continue
            yield deepest, count, place
        deepest = last = node
        count, place = 1, tier
    if deepest is not None:
        yield deepest, count, place
