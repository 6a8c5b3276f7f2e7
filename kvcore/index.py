"""From a node to its digest, and from a digest, or the beginning of one, to its node.

A digest is computed when somebody asks for it, from the deepest ancestor that has one, and kept with the
node. An OPEN node's tokens still change: its digest is computed each time.

The way back is a search through the tree: nothing has to be kept current for the few times that an
operator names a prefix, and it can be done in pieces between two steps.
"""

from __future__ import annotations

from array import array

from kvcore.keys import PrefixDigest, chain_digests
from kvcore.node import Node, NodeState
from kvcore.tree import PrefixTree

__all__ = ["MIN_DIGITS", "PrefixSearch", "digest_of"]

MIN_DIGITS = 8
"""Hexadecimal digits that name a prefix at least."""


def digest_of(node: Node) -> PrefixDigest:
    """Return the digest of the prefix up to and including a node; of a root: the namespace's seed.

    Raises ``IntegrityError`` for a node that was removed.
    """
    missing, above = [], node
    while above.digest is None and not above.is_root:
        missing.append(above)
        above = above.real_parent()
    start = last = above.digest or above.space.seed
    missing.reverse()
    for current, last in zip(
        missing, chain_digests(start, (array("i", n.packed) for n in missing)), strict=True
    ):
        if current.state is not NodeState.OPEN:
            current.digest = last
    return last


class PrefixSearch:
    """Look for the shared, unexpired nodes whose digest begins with given digits, a piece at a time."""

    def __init__(self, tree: PrefixTree, digits: str) -> None:
        if len(digits) < MIN_DIGITS:
            raise ValueError(f"at least {MIN_DIGITS} digits")
        whole = len(digits) // 2 * 2
        self._start = bytes.fromhex(digits[:whole])
        self._digits = digits.lower()
        self._stack = list(tree.roots.values())
        self.found: list[Node] = []
        """What was found; check that it is still in the tree."""

    def advance(self, max_nodes: int, now: float) -> bool:
        """Look at ``max_nodes`` more or a few beyond; say whether all have been seen."""
        stack, seen = self._stack, 0
        while stack and seen < max_nodes:
            node = stack.pop()
            if not node.is_root and (node.parent is None or node.owner is not None or node.is_expired(now)):
                continue  # gone meanwhile, or nobody else's business; nothing below could be found either
            seen += 1
            if not node.is_root:
                digest = node.digest or digest_of(node)
                if digest.startswith(self._start) and digest.hex().startswith(self._digits):
                    self.found.append(node)
            stack.extend(node.children.values())
            stack.extend(node.open_children)
        return not stack
