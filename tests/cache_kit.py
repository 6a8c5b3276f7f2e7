"""Short words for tests of the cache: leases driven by hand, blocks named by number."""

from __future__ import annotations

from kvcore.clock import ManualClock
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.lease import Lease, PrefixMatch
from kvcore.manager import CacheManager
from kvcore.node import Node

__all__ = ["HOME", "CacheKit"]

HOME = NamespaceKey("model")


class CacheKit:
    """A cache of small blocks under a clock that stands still."""

    def __init__(
        self, num_blocks: int = 16, *, block_size: int = 4, num_logits_slots: int = 4, **more: object
    ) -> None:
        self.clock = ManualClock()
        self.cache = CacheManager(
            num_blocks=num_blocks,
            block_size=block_size,
            clock=self.clock,
            num_logits_slots=num_logits_slots,
            **more,
        )

    def open(self, tokens: list[int], *, namespace: NamespaceKey = HOME, read: bool = True, **how) -> Lease:
        """Find and lease; does not compute anything."""
        packed = pack_tokens(tokens)
        found = self.cache.find(namespace, packed, read=read, owner=how.get("owner"))
        assert not found.is_being_computed
        return self.cache.open(found, packed, **how)

    def plan(self, lease: Lease, count: int | None = None) -> Lease:
        """Plan to compute ``count`` tokens of a lease: all that are missing if not told."""
        missing = len(lease.tokens) - lease.num_computed
        if missing:
            self.cache.extend(lease, missing if count is None else count)
        if lease.num_computed + lease.in_flight == len(lease.tokens) and lease.logits_from is None:
            self.cache.add_tail(lease)
        return lease

    def start(self, tokens: list[int], **how) -> Lease:
        """Open, compute everything and commit; the lease stays open."""
        lease = self.plan(self.open(tokens, **how))
        self.cache.commit([lease])
        return lease

    def compute(self, tokens: list[int], **how) -> list[int]:
        """Do a whole request; return the blocks that it used."""
        lease = self.start(tokens, **how)
        table = lease.block_table.tolist()
        self.cache.release(lease)
        self.cache.check_integrity()
        return table

    def request(self, tokens: list[int], **how) -> int:
        """Do a whole request and count it; return how many of its tokens were cached."""
        lease = self.start(tokens, **how)
        self.cache.count_request(lease)
        self.cache.release(lease)
        self.cache.check_integrity()
        return lease.match.num_tokens

    def node(self, tokens: list[int], *, namespace: NamespaceKey = HOME) -> Node:
        """Return the node that bears the end of a cached prefix."""
        found = self.cache.control.locate(namespace, pack_tokens(tokens))
        assert found.node is not None
        assert found.num_tokens == len(tokens)
        return found.node

    def lookup(self, tokens: list[int], *, namespace: NamespaceKey = HOME) -> PrefixMatch:
        """Say how much of a prompt is cached."""
        return self.cache.lookup(namespace, pack_tokens(tokens))

    def cached(self, tokens: list[int], **where) -> tuple[int, int, bool]:
        """Return tokens in whole blocks, in a part of a block, and whether the prompt is an exact repeat."""
        match = self.lookup(tokens, **where)
        return match.block_tokens, match.partial_tokens, match.is_exact
