"""Everything about tiers that the scheduler calls, in the order of a step::

plan:   advance() ──► loads       admissions, evictions       collect() ──► saves
apply:  applied(result)                                    or, if it failed:  aborted()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvcore.clock import Clock
from kvcore.index import digest_of
from kvcore.keys import NamespaceKey, PrefixDigest
from kvcore.lease import Lease
from kvcore.manager import CacheManager
from kvcore.node import NodeState
from kvcore.prefetch import SessionPredictor
from kvcore.restore import Placed
from kvcore.tiers.interface import ObjectFormat, ObjectKey, ObjectKind
from kvcore.tiers.stack import TierStack
from kvcore.tiers.worth import Worth
from server.engine.admin_messages import CacheEventKind
from server.engine.plan import KvLoad, KvSave, KvTarget, StepPlan, StepResult
from server.engine.tiering.divergence import DivergenceWatch
from server.engine.tiering.notes import TierNotes, runs_of
from server.engine.tiering.offload import Offloader
from server.engine.tiering.restoration import Restoration
from server.engine.tiering.restorations import Restorations
from server.engine.tiering.sessions import SessionPrefetch
from server.engine.tiering.wanted import tail_digest

__all__ = ["Tiering"]

BUSY_POLL_S = 0.005
SESSION_POLL_S = 0.25
MIN_MEASURED_TOKENS = 64
"""Steps that compute fewer tokens say more about the step than about the tokens."""


class Tiering:
    """The tiers of one engine. Engine's thread; nothing blocks."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        blocks: TierStack,
        tails: TierStack,
        object_format: ObjectFormat,
        worth: Worth,
        clock: Clock,
        mode: str = "auto",
        prefetches_sessions: bool = True,
    ) -> None:
        self.cache = cache
        self._clock = clock
        self.blocks = blocks
        self.tails = tails
        self.worth = worth
        self.offloader = Offloader(
            cache, blocks=blocks, tails=tails, object_format=object_format, clock=clock
        )

        def make_restorations() -> Restorations:
            return Restorations(
                cache, blocks=blocks, tails=tails, object_format=object_format, clock=clock, mode=mode
            )

        self.restorations = make_restorations()
        self.for_sessions = make_restorations()
        self.predictor = SessionPredictor()
        self.sessions = (
            SessionPrefetch(cache, self.for_sessions, self.predictor) if prefetches_sessions else None
        )
        cache.listeners.append(self.offloader)
        self.divergence = DivergenceWatch((blocks, tails))
        self.notes: TierNotes | None = None
        """Who wants to know what was restored and offloaded."""
        self._placed: list[Placed] = []

    @property
    def has_work(self) -> bool:
        """Say whether blocks are to be moved though no request asks for it."""
        return self.offloader.has_work

    @property
    def idle_wait_s(self) -> float | None:
        """Return how long an engine without work may sleep; None: until somebody asks for something."""
        if self.for_sessions.is_busy or not (self.blocks.is_idle and self.tails.is_idle):
            return BUSY_POLL_S
        return SESSION_POLL_S if self.sessions is not None and len(self.sessions) else None

    def session_of(self, lease: Lease, restoration: Restoration | None) -> int | None:
        """Return the session that a request just admitted goes on with, or a new one."""
        if self.sessions is None:
            return None
        asked = [] if restoration is None else restoration.digests
        return self.sessions.returned(lease, asked, self._clock.now())

    def session_ended(self, session: int | None, lease: Lease, namespace: NamespaceKey) -> None:
        """A request of a session has finished; its lease is still open."""
        if self.sessions is not None and session is not None:
            self.sessions.ended(session, lease, namespace, self._clock.now())

    def advance(self, *, is_computing: bool) -> list[KvLoad]:
        """Take in what tiers have brought; return what this plan loads. Before anything is admitted."""
        self.blocks.poll()
        self.tails.poll()
        self.divergence.poll()
        self._placed = self.restorations.advance(is_computing=is_computing)
        if self.sessions is not None and len(self.sessions):
            self._placed += self.sessions.advance(self._clock.now(), is_computing=is_computing)
        return [_load_of(entry) for entry in self._placed]

    def collect(self, *, is_computing: bool) -> list[KvSave]:
        """Return what this plan saves. When nothing is evicted any more."""
        return self.offloader.collect(is_computing=is_computing)

    def applied(self, plan: StepPlan, result: StepResult) -> None:
        """The plan has run."""
        placed, self._placed = self._placed, []
        self.cache.restorer.loaded()
        offloaded = self.offloader.saved(result.saved)
        self._measure(plan, result)
        if self.notes is None or not self.notes.is_on:
            return
        for node, count, tier in runs_of(offloaded):
            self.notes.note(CacheEventKind.OFFLOADED, node, count, tier=tier)
        full = [(entry.node, entry.tier) for entry in placed if entry.node.state is NodeState.READY]
        for node, count, tier in runs_of(full):
            self.notes.note(CacheEventKind.RESTORED, node, count, tier=tier)

    def aborted(self) -> None:
        """The plan has failed: what it was to load is not there, what it was to save is not known."""
        self.cache.restorer.take_out(self._placed)
        self._placed = []
        self.offloader.abandon()

    def removed(
        self, *, namespace: PrefixDigest | None = None, digests: Sequence[PrefixDigest] | None = None
    ) -> None:
        """Somebody had tiers remove these, or everything: what of it is on its way must not come up."""
        chosen = None if digests is None else set(digests)
        for restorations in (self.restorations, self.for_sessions):
            restorations.forget(namespace=namespace, digests=chosen)

    def spoiled(self, leases: Iterable[Lease]) -> None:
        """Take back what these leases of failed requests entered: it may be no good. Then discard them."""
        for lease in leases:
            nodes = [n for n in lease.inserted if n.state is NodeState.READY and n.owner is None]
            digests = [digest_of(node) for node in nodes if node.parent is not None]
            self.blocks.remove_prefixes(digests[:1])  # and all that continues it
            self.blocks.remove([ObjectKey(digest, ObjectKind.BLOCK) for digest in digests])
            tails = [(node, tail) for node in nodes for tail in (node.tails or {}).values()]
            self.tails.remove(
                [
                    ObjectKey(tail_digest(digest_of(node), tail.key), kind)
                    for node, tail in tails
                    if isinstance(tail.key, bytes)
                    for kind in (ObjectKind.PARTIAL, ObjectKind.LOGITS)
                ]
            )

    def close(self) -> None:
        """End the tiers; stores that were handed over are finished."""
        self.blocks.close()
        self.tails.close()

    def _measure(self, plan: StepPlan, result: StepResult) -> None:
        """Learn what computing costs from a step in which one prompt is (nearly) all there is."""
        if not plan.sequences or result.forward_s <= 0:
            return
        largest = max(plan.sequences, key=lambda part: len(part.token_ids))
        count = len(largest.token_ids)
        if count >= MIN_MEASURED_TOKENS and 10 * count >= 9 * plan.num_tokens:
            self.worth.observe_recompute(count, largest.num_computed, result.forward_s)


def _load_of(entry: Placed) -> KvLoad:
    if entry.slot is not None:
        return KvLoad(KvTarget.LOGITS, entry.slot, entry.stored.payload)
    return KvLoad(KvTarget.BLOCK, entry.node.real_block(), entry.stored.payload)
