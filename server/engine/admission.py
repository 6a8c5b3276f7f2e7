"""Admission: which requests are taken at all, and which waiting sequence joins the next step.

A sequence is admitted if all blocks of its present tokens can be had beside what is promised to the
running ones. While a prompt is cut by the budget, only such join as fit into what is left of it: one
prompt at a time is computed in pieces, and short requests need not wait until it is through, because
up to a quarter of the budget is left to them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcore.clock import Clock
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.lease import Lease
from kvcore.manager import CacheManager
from kvcore.pins import PinKind
from server.engine.messages import FailureKind, Refused, Submit
from server.engine.options import EngineOptions
from server.engine.request import Sequence
from server.engine.running import RunningSet
from server.engine.waiting import WaitingRoom

if TYPE_CHECKING:
    from server.engine.tiering.restorations import Restorations

__all__ = ["Admission"]

MAX_CANDIDATES_PER_PLAN = 256
MAX_MISFITS_PER_PLAN = 32
"""How many waiting sequences may be passed over in one plan by ones behind them: such as do not fit, or wait
for a prefix that this very step computes."""

MAX_HELD_PER_PLAN = 64
"""How many may be passed over because what tiers have of them is still on its way."""

MAX_ADMISSIONS_PER_PLAN = 32
"""Bounds the time that one plan takes; the others join the next steps."""

NEWCOMERS_SHARE = 4
"""One part in so many of the budget is left to short requests while a long prompt is computed."""


class Admission:
    """Decide; the scheduler acts."""

    def __init__(
        self,
        options: EngineOptions,
        *,
        cache: CacheManager,
        waiting: WaitingRoom,
        running: RunningSet,
        clock: Clock,
        fingerprint: str = "",
    ) -> None:
        self._options = options
        self._cache = cache
        self._waiting = waiting
        self._running = running
        self._clock = clock
        self._max_running = min(options.max_running, options.max_batch_tokens)  # a token per step for each
        self.restorations: Restorations | None = None
        self._fingerprint = fingerprint
        self.is_open = True
        """False once nothing new is accepted."""

    def refusal(self, message: Submit, *, recent_step_s: float) -> Refused | None:
        """Say why a request cannot be taken, if so."""
        spec = message.spec
        if not self.is_open:
            return Refused(message.key, FailureKind.DRAINING, "the engine is shutting down")
        if message.deadline_s is not None and message.deadline_s <= 0:
            return Refused(message.key, FailureKind.DEADLINE, "the deadline passed")
        num_blocks = self._cache.pool.num_blocks
        needed = -(-(len(spec.token_ids) + spec.max_new_tokens) // self._cache.block_size)
        if needed > num_blocks:
            reason = f"prompt and new tokens need {needed} KV blocks, the pool has {num_blocks}"
            return Refused(message.key, FailureKind.TOO_LARGE, reason)
        num_pinned = self._cache.pins.num_blocks(PinKind.HARD)
        if num_pinned and needed > num_blocks - num_pinned + self._num_pinned_of(message):
            left = num_blocks - num_pinned
            reason = f"prompt and new tokens need {needed} KV blocks, {left} of the pool are not pinned"
            return Refused(message.key, FailureKind.TOO_LARGE, reason)
        num_waiting = len(self._waiting)
        if num_waiting + spec.num_samples > self._options.max_waiting:
            steps = (s.request.spec.max_new_tokens - s.num_generated for s in self._running)
            retry_after_s = min(self._options.waiting_bound_s, 0.05 + min(steps, default=0) * recent_step_s)
            return Refused(
                message.key, FailureKind.QUEUE_FULL, f"{num_waiting} requests are waiting", retry_after_s
            )
        return None

    def _num_pinned_of(self, message: Submit) -> int:
        """Return how many hard-pinned blocks a request would share."""
        spec, cache = message.spec, self._cache
        if not (spec.use_kv_cache and spec.read_prefix):
            return 0
        namespace = NamespaceKey(self._fingerprint, salt=spec.salt)
        return cache.pins.num_shared(cache.control.path_of(namespace, pack_tokens(spec.token_ids)))

    def share_for_newcomers(self, budget: int) -> int:
        """Return how many tokens of a budget that running sequences could use up are left to waiting ones."""
        need, count = self._waiting.queue.smallest_need()
        share = budget // NEWCOMERS_SHARE
        if not count or need > share or len(self._running) >= self._max_running:
            return 0
        blocks = need // self._cache.block_size + 2
        if blocks + self._spare() > self._cache.num_available:
            return 0
        return min(share, need * count)

    def choose(self, budget: int, *, is_cut: bool, now: float) -> Iterator[tuple[Sequence, Lease, int]]:
        """Yield who joins this step, with a lease and the number of tokens to compute.

        The caller makes each a running one and extends its lease before it asks for the next. ``is_cut``: a
        running prompt got less than it needs.
        """
        if not budget or not len(self._waiting):
            return
        misfits, num_held, spare = 0, 0, self._spare()
        max_running = min(self._max_running, len(self._running) + MAX_ADMISSIONS_PER_PLAN)
        largest = budget if is_cut else None
        candidates = self._waiting.queue.candidates(now, limit=MAX_CANDIDATES_PER_PLAN, largest=largest)
        with contextlib.closing(candidates):  # those passed over go back to their places
            for sequence, is_overdue in candidates:
                if not budget or len(self._running) >= max_running:
                    return
                if self._is_held(sequence, has_place=len(self._running) + num_held < max_running):
                    num_held += 1
                    if is_overdue or num_held >= MAX_HELD_PER_PLAN:
                        return
                    continue
                room = budget if is_cut and not is_overdue else len(sequence.tokens)
                lease = self._open(sequence, spare, room)
                if lease is None:
                    misfits += 1
                    if is_overdue or misfits >= MAX_MISFITS_PER_PLAN:
                        return
                    continue
                missing = 0 if lease.logits_from is not None else len(sequence.tokens) - lease.num_computed
                count = min(missing, budget)
                budget -= count
                yield sequence, lease, count
                spare += 1 + self._running.blocks_outstanding(sequence)

    def _is_held(self, sequence: Sequence, *, has_place: bool) -> bool:
        """Say whether what tiers have of a prompt is still on its way."""
        restoration = sequence.restoration
        if restoration is None or self.restorations is None:
            return False
        return self.restorations.is_holding(restoration, has_place=has_place)

    def _spare(self) -> int:
        """Return the blocks to leave alone: what is promised, and one for each that may begin a block."""
        return self._running.all_blocks_outstanding() + len(self._running)

    def _open(self, sequence: Sequence, spare: int, room: int) -> Lease | None:
        """Lease what is cached of a sequence, if the rest fits and nobody computes it just now."""
        request, cache = sequence.request, self._cache
        started = self._clock.now()
        found = cache.find(request.namespace, sequence.tokens, read=sequence.may_read, owner=sequence.owner)
        request.lookup_s += self._clock.now() - started
        if found.is_being_computed:
            return None
        if not found.match.is_exact and len(sequence.tokens) - found.match.num_tokens > room:
            return None
        if not cache.fits(found, len(sequence.tokens) + 1, spare=spare):
            return None
        lifetime_s = request.spec.lifetime_s
        if lifetime_s is None:
            lifetime_s = self._options.default_lifetime_s
        return cache.open(found, sequence.tokens, owner=sequence.owner, lifetime_s=lifetime_s)
