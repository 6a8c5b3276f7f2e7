"""Finding what an eviction would take, before anything is taken.

Done in pieces, so that requests can go on in between; what they take up or add meanwhile shows when the
nodes are taken out (``CacheControl.take_out`` leaves what is held), never as a loss.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvcore.node import Node
from kvcore.spaces import Space
from kvcore.tree import PrefixTree

__all__ = ["Selection"]


class Selection:
    """Everything that meets all conditions: what could go, children before parents, and what could not.

    ``below``: these nodes and all that continues them. ``last_use``: used then or earlier. Soft pins protect
    nothing here.
    """

    def __init__(
        self,
        tree: PrefixTree,
        *,
        below: Sequence[Node] | None = None,
        space: Space | None = None,
        last_use: float | None = None,
    ) -> None:
        if below is not None:
            self._to_visit = list(below)
        elif space is not None:
            self._to_visit = [] if space.root is None else [space.root]
            self._to_visit += [n for n in tree.displaced if n.space is space]
        else:
            self._to_visit = [*tree.roots.values(), *tree.displaced]
        self._space = space
        self._last_use = last_use
        self._visited: list[Node] = []
        self._blocked: set[Node | None] = set()
        """Parents of what stays."""
        self.nodes: list[Node] = []
        """What could go."""
        self.num_in_use = 0
        """Selected, but held by a request or a hard pin."""
        self.num_kept = 0
        """Those, and such as have something below them that stays."""

    def advance(self, max_nodes: int) -> bool:
        """Look at about ``max_nodes`` more; say whether the selection is complete."""
        stack, seen = self._to_visit, 0
        while stack and seen < max_nodes:
            node = stack.pop()
            seen += 1
            if not node.is_root:
                self._visited.append(node)
            stack.extend(node.children.values())
            stack.extend(node.open_children)
        while not stack and self._visited and seen < max_nodes:
            self._decide(self._visited.pop())
            seen += 1
        return not stack and not self._visited

    def _decide(self, node: Node) -> None:
        """Decide about a node after all that is below it."""
        if node.parent is None:
            return  # gone meanwhile
        is_meant = self._is_meant(node)
        if is_meant and not node.is_busy and node not in self._blocked:
            self.nodes.append(node)
            return
        self._blocked.add(node.parent)
        self.num_kept += is_meant
        self.num_in_use += is_meant and node.is_busy

    def _is_meant(self, node: Node) -> bool:
        if self._space is not None and node.space is not self._space:
            return False
        if self._last_use is None:
            return True
        return max(node.used_at or 0.0, node.inserted_at or 0.0) <= self._last_use
