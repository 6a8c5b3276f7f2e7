"""Quotas: how many blocks of the pool one namespace may keep when others want them.

Free blocks are anybody's. But as soon as room has to be made, a namespace that has more than its limit, or
would have, gives up its own least worthy blocks before anybody else loses one. So what a namespace below
its limit has cached is safe from all that are above theirs, however much they ask for. Blocks in use and
pinned ones stay (nothing ever waits for a quota): then others go, as without one.
"""

from __future__ import annotations

from kvcore.keys import NamespaceKey
from kvcore.spaces import Space

__all__ = ["Quotas"]


class Quotas:
    """The limits, and who is over theirs."""

    def __init__(self, num_blocks: int, *, default_share: float | None = None) -> None:
        self._num_blocks = num_blocks
        self._default: int | None = None
        self._own: dict[NamespaceKey, int | None] = {}
        self.over: dict[Space, None] = {}
        """Spaces that were beyond their limit when they last grew; whoever is not any more is struck off."""
        self.set_default(default_share)

    @property
    def is_any(self) -> bool:
        """Say whether there are limits at all."""
        return self._default is not None or bool(self._own)

    def limit_of(self, key: NamespaceKey) -> int | None:
        """Return the blocks that a namespace may keep; None: no limit."""
        return self._own.get(key, self._default)

    def set_default(self, max_share: float | None) -> None:
        """Limit every namespace without a quota of its own to a share of the pool; None: no limit."""
        self._default = None if max_share is None else self._blocks(max_share)

    def set(self, key: NamespaceKey, max_share: float | None) -> None:
        """Limit one namespace to a share of the pool; None: no limit, whatever the default says."""
        self._own[key] = None if max_share is None else self._blocks(max_share)

    def reset(self, key: NamespaceKey) -> None:
        """Let the default apply to a namespace again."""
        self._own.pop(key, None)

    def note(self, space: Space | None) -> None:
        """See to it that a space whose limit was changed keeps to it."""
        if space is not None and self.excess(space):
            self.over[space] = None

    def excess(self, space: Space, count: int = 0) -> int:
        """Return how many blocks a space would hold beyond its limit if it took ``count`` more."""
        limit = self.limit_of(space.key)
        return 0 if limit is None else max(0, space.num_blocks + count - limit)

    def _blocks(self, share: float) -> int:
        if not 0.0 < share <= 1.0:
            raise ValueError("a quota is a share of the pool, above 0 and at most 1")
        return max(1, int(share * self._num_blocks))
