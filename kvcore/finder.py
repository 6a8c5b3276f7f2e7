"""Looking a prompt up: how much of it is cached, without changing anything.

::

    positions   0            block_size            2 * block_size        ...            len(tokens)
                |---- whole shared blocks: path ----|---- leading slots ----|---- not found ----|
                                                      source: copied from

An exact repeat ends in a tail, whose logits are kept. Without one the last token is never taken from the
cache: it has to be computed for its logits.
"""

from __future__ import annotations

from array import array

from kvcore.clock import Clock
from kvcore.keys import NamespaceKey
from kvcore.lease import Found, PrefixMatch
from kvcore.node import Node, NodeState
from kvcore.tails import TailStore
from kvcore.tree import PrefixTree

__all__ = ["Finder"]


class Finder:
    """Find prompts in the tree and the tails beside it."""

    def __init__(self, *, tree: PrefixTree, tails: TailStore, clock: Clock) -> None:
        self._tree = tree
        self._tails = tails
        self._clock = clock
        self._block_size = tree.block_size

    def find(self, namespace: NamespaceKey, tokens: array[int], *, owner: int | None) -> Found:
        """Find the longest cached prefix of ``tokens``, and what matches inside the next block."""
        root = self._tree.root(namespace)
        now, size = self._clock.now(), self._block_size
        path = self._tree.walk(root, tokens, len(tokens), owner, now)
        node = path[-1] if path else root
        position = len(path) * size
        tail, in_flight = None, False
        if len(tokens) - position < size:
            tail = self._tails.find(node, tokens[position:].tobytes(), owner, now)
            if tail is None and position == len(tokens):  # one token has to be computed for its logits
                in_flight = path.pop().state is NodeState.PENDING
                position -= size
                node = path[-1] if path else root
        limit = len(tokens) if tail is not None else len(tokens) - 1
        wanted = tokens[position : min(limit, position + size)].tobytes()
        source, num_partial = self._tree.find_partial(node, wanted, owner, now)
        if source is not None and source.expires_at is not None and 2 * num_partial < size:
            source, num_partial = None, 0  # a few tokens are not worth taking over its lifetime
        in_flight = in_flight or (tail is not None and not tail.is_ready)
        return Found(
            root,
            path,
            tail,
            source,
            is_being_computed=in_flight or self._producer_goes_on(node, tokens),
            match=PrefixMatch(position, num_partial, is_exact=tail is not None),
        )

    def find_nothing(self, namespace: NamespaceKey) -> Found:
        """Return what a request finds that does not look."""
        nothing = PrefixMatch(0, 0, is_exact=False)
        root = self._tree.root(namespace)
        return Found(root, [], None, None, is_being_computed=False, match=nothing, is_read=False)

    def _producer_goes_on(self, frontier: Node, tokens: array[int]) -> bool:
        """Say whether who fills ``frontier`` in this step fills the block that ``tokens`` need next, too."""
        producer = frontier.producer
        if producer is None:
            return False
        position = frontier.depth * self._block_size
        wanted = tokens[position : position + self._block_size]
        return (
            len(wanted) == self._block_size
            and wanted == producer.tokens[position : position + self._block_size]
        )
