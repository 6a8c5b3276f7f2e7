"""The list of cached prefixes, a page at a time.

A page token says after which place of the list to go on, for which conditions, in which life of the engine.
It stays good while the cache changes: places are free of the present time (``kvcore.runs``), so what is
used meanwhile may be seen twice or not at all, and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Generator

import msgspec

from kvcore.index import digest_of
from kvcore.manager import CacheManager
from kvcore.node import Node, NodeState, key_of
from kvcore.runs import Run, RunPlace
from server.engine.admin_messages import AdminErrorKind, ListPrefixes, PinType, PrefixEntry, PrefixPage
from server.engine.cache_ops.catalogues import KEEP_S, Catalogues
from server.engine.cache_ops.interface import (
    MAX_NODES_PER_PIECE,
    Operation,
    OperationContext,
    OperationRefused,
)

__all__ = ["DEVICE", "MAX_PAGE_SIZE", "list_prefixes"]

MAX_PAGE_SIZE = 1000
MAX_PREVIEW_TOKENS = 64
DEVICE = "device"

_TOKEN = struct.Struct(">Q8sdQ")


def list_prefixes(context: OperationContext, catalogues: Catalogues, op: ListPrefixes) -> Operation:
    """List what is cached, the most valuable first."""
    if not 1 <= op.page_size <= MAX_PAGE_SIZE:
        raise OperationRefused(AdminErrorKind.INVALID, f"1 to {MAX_PAGE_SIZE} entries a page", "page_size")
    condition = _condition_of(op)
    place = _place_of(op.page_token, condition, context.epoch) if op.page_token else None
    filters = _Filters(context, op)
    catalogue = yield from catalogues.complete(
        condition, filters.accept, max_age_s=KEEP_S if op.page_token else None
    )
    page = _Page(context, op)
    token = ""
    for run in catalogue.after(place):
        if len(page.entries) == op.page_size:
            token = _token_for(page.last, condition, context.epoch)
            break
        yield from page.add(run)
    return PrefixPage(page.entries, token, catalogue.total)


class _Filters:
    """The conditions of a list."""

    def __init__(self, context: OperationContext, op: ListPrefixes) -> None:
        self._op = op
        self._now = context.clock.now()
        self._space = context.space_of(op.namespace) if op.namespace else None
        self._pins = context.cache.pins
        self._tiers = context.tiers

    def accept(self, run: Run) -> bool:
        """Say whether a run meets all conditions."""
        op, end = self._op, run.end
        if end.parent is None or (self._space is not None and end.space is not self._space):
            return False
        age_s = 0.0 if end.inserted_at is None else self._now - end.inserted_at
        if op.min_age_s is not None and age_s < op.min_age_s:
            return False
        if op.max_age_s is not None and age_s > op.max_age_s:
            return False
        if end.hits < op.min_hits:
            return False
        if op.is_pinned is not None and self._pins.covers(end) is not op.is_pinned:
            return False
        if op.tier and op.tier != DEVICE:
            return self._tiers.blocks_of([digest_of(n) for n in run.nodes()]).get(op.tier, 0) > 0
        return True


class _Page:
    """Entries in the making."""

    def __init__(self, context: OperationContext, op: ListPrefixes) -> None:
        self.entries: list[PrefixEntry] = []
        self.last: RunPlace = (0.0, 0)
        """Place of the last entry."""
        self._context = context
        self._viewer_salt = op.viewer_salt
        self._leased = _nodes_with_leases(context.cache) if len(context.cache.pins) else None
        self._ends_at: dict[Run, float | None] = {}
        self._work = 0

    def add(self, run: Run) -> Generator[None, None, None]:
        """Add an entry; let the engine go on now and then."""
        self._work += run.num_blocks + 20
        if self._work > MAX_NODES_PER_PIECE:
            self._work = 0
            yield None
            if not run.is_there:
                return
        self.entries.append(self._entry(run))
        self.last = run.place

    def _entry(self, run: Run) -> PrefixEntry:
        cache, end = self._context.cache, run.end
        now, size = self._context.clock.now(), cache.block_size
        nodes = run.nodes()
        num_tokens = run.num_tokens(size)
        kind, pin = cache.pins.kind_of(end), end.pin
        expires_at = self._expiry(run)
        inserted_at = now if end.inserted_at is None else end.inserted_at
        is_top = run.top.parent is None or run.top.parent.is_root
        return PrefixEntry(
            prefix_id=digest_of(end).hex(),
            parent_id="" if is_top else digest_of(run.top.real_parent()).hex(),
            namespace=end.space.id,
            salt=end.space.key.salt,
            num_tokens=num_tokens,
            own_tokens=num_tokens - run.start(size),
            own_blocks=len(nodes),
            hits=end.hits,
            age_s=now - inserted_at,
            idle_s=now - (inserted_at if end.used_at is None else max(inserted_at, end.used_at)),
            expires_in_s=None if expires_at is None else max(0.0, expires_at - now),
            pin=None if kind is None else PinType(kind.value),
            pin_expires_in_s=None if pin is None or pin.ends_at is None else max(0.0, pin.ends_at - now),
            in_use=end.is_busy if self._leased is None else end in self._leased,
            has_last_logits=_has_last_logits(end, now),
            num_children=run.num_children,
            tiers=self._context.tiers.blocks_of([digest_of(n) for n in nodes]),
            value=run.value,
            preview=self._preview(nodes) if end.space.key.salt == self._viewer_salt else [],
        )

    def _expiry(self, run: Run) -> float | None:
        """Return when a run can no longer be found: when the first block on the way to its end expires."""
        lineage: list[Run] = []
        current: Run | None = run
        while current is not None and current not in self._ends_at:
            lineage.append(current)
            current = current.above
        ends_at = None if current is None else self._ends_at[current]
        for each in reversed(lineage):
            own = [n.expires_at for n in each.nodes() if n.expires_at is not None]
            if ends_at is not None:
                own.append(ends_at)
            ends_at = min(own, default=None)
            self._ends_at[each] = ends_at
        return ends_at

    def _preview(self, nodes: list[Node]) -> list[int]:
        """Return the last tokens of a run; ``nodes`` stand with the last one first."""
        tokens: list[int] = []
        for node in nodes:
            tokens[:0] = node.tokens
            if len(tokens) >= MAX_PREVIEW_TOKENS:
                break
        return tokens[-MAX_PREVIEW_TOKENS:]


def _has_last_logits(end: Node, now: float) -> bool:
    """Say whether a repeat of exactly this prefix needs no forward pass."""
    holder, key = (end.real_parent(), end.packed) if end.state is NodeState.OPEN else (end, b"")
    tail = (holder.tails or {}).get(key_of(key, None))
    return tail is not None and tail.is_ready and (tail.expires_at is None or tail.expires_at > now)


def _nodes_with_leases(cache: CacheManager) -> set[Node]:
    """Return the nodes that running requests hold; hard pins make others busy, too."""
    held: set[Node] = set()
    for lease in cache.leases:
        node: Node | None = lease.held
        while node is not None and node not in held:
            held.add(node)
            node = node.parent
    return held


def _condition_of(op: ListPrefixes) -> bytes:
    """Return a digest of all that must be the same from page to page."""
    fields = (op.namespace, op.min_age_s, op.max_age_s, op.min_hits, op.is_pinned, op.tier)
    return hashlib.blake2b(msgspec.json.encode(fields), digest_size=8).digest()


def _token_for(place: RunPlace, condition: bytes, epoch: int) -> str:
    return base64.urlsafe_b64encode(_TOKEN.pack(epoch, condition, *place)).decode().rstrip("=")


def _place_of(token: str, condition: bytes, epoch: int) -> RunPlace:
    """Return where a page begins. Raises ``OperationRefused`` for a token that is not this list's."""
    try:
        packed = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        its_epoch, its_condition, key, serial = _TOKEN.unpack(packed)
    except (ValueError, binascii.Error, struct.error):
        its_epoch = its_condition = key = None
        serial = 0
    if its_epoch != epoch or key is None or key != key:
        raise OperationRefused(AdminErrorKind.INVALID, "not a page token of this engine", "page_token")
    if its_condition != condition:
        reason = "the page token belongs to a list with other conditions"
        raise OperationRefused(AdminErrorKind.INVALID, reason, "page_token")
    return key, serial
