"""The desk: carries out what operators ask of an engine's cache, between two steps.

::

    handle(call) ─► a short operation is done at once ──────────────► drain(): its reply
                 └► a long one does its first piece, and another with each advance() ─► progress ... reply

Whatever an operation changes, it changes between steps, when nothing is PENDING and no copy is on its way.
Long ones (a list, a search by id, an eviction of very much, a snapshot) let the engine go on after some
milliseconds, and take turns. Engine's thread only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.manager import CacheManager
from server.engine.admin_messages import (
    AdminCall,
    AdminOp,
    AdminProgress,
    AdminReply,
    AdminResult,
    CacheEvents,
    ClearCache,
    DescribePolicy,
    EvictPrefixes,
    ListPrefixes,
    LookUpPrefix,
    PinPrefix,
    ReadStats,
    ReleasePrefix,
    RestoreSnapshot,
    SaveSnapshot,
    SetLifetime,
    SetPolicy,
    UnpinPrefix,
)
from server.engine.cache_ops.catalogues import Catalogues
from server.engine.cache_ops.interface import (
    NoTiers,
    Operation,
    OperationContext,
    OperationRefused,
    TierView,
    TrialView,
)
from server.engine.cache_ops.listing import list_prefixes
from server.engine.cache_ops.looking import look_up_prefix, read_stats, report_policies
from server.engine.cache_ops.policies import set_policy
from server.engine.cache_ops.steering import (
    clear_cache,
    evict_prefixes,
    pin_prefix,
    release_prefix,
    set_lifetime,
    unpin_prefix,
)
from server.engine.cache_ops.watch import CacheWatch

__all__ = ["CacheDesk"]


@dataclass(frozen=True, slots=True)
class _Running:
    """A long operation that is not through."""

    key: int
    operation: Operation


class CacheDesk:
    """See the module's text."""

    def __init__(
        self,
        cache: CacheManager,
        *,
        clock: Clock,
        fingerprint: str,
        epoch: int,
        largest_need: Callable[[], int],
        tiers: TierView | None = None,
        trial: TrialView | None = None,
    ) -> None:
        """``epoch`` (63 random bits) tells this engine's life from others'.

        ``largest_need``: see ``Scheduler.largest_need``.
        """
        self.epoch = epoch
        self._context = OperationContext(
            cache=cache,
            clock=clock,
            fingerprint=fingerprint,
            epoch=epoch,
            tiers=tiers or NoTiers(),
            trial=trial,
            largest_need=largest_need,
        )
        self.events = CacheWatch(clock, block_size=cache.block_size, epoch=epoch)
        """Also takes notes of others: ``note`` what was restored or offloaded."""
        cache.listeners.append(self.events)
        cache.pins.on_end = self.events.pin_ended
        self._catalogues = Catalogues(cache, clock)
        self._started = clock.now()
        self._running: deque[_Running] = deque()
        self._said: list[AdminReply | AdminProgress] = []

    @property
    def is_busy(self) -> bool:
        """Say whether a long operation goes on: call ``advance`` soon again."""
        return bool(self._running)

    def handle(self, call: AdminCall) -> None:
        """Carry an operation out, or begin a long one."""
        self._context.cache.sweep_expired()
        self._go_on(_Running(call.key, self._begin(call.op)))

    def cancel(self, key: int) -> None:
        """End a long operation where it is, without a reply. Ignores keys that are not running."""
        for running in [r for r in self._running if r.key == key]:
            self._running.remove(running)
            running.operation.close()

    def watch(self, is_on: bool) -> None:
        """Tell events from now on, or no more."""
        self.events.is_on = is_on

    def advance(self) -> None:
        """Do one piece of one long operation; they take turns."""
        if self._running:
            self._go_on(self._running.popleft())

    def drain(self) -> list[AdminReply | AdminProgress | CacheEvents]:
        """Return what there is to say since the last call, in order."""
        said, self._said = self._said, []
        return [*said, *self.events.drain()]

    def _go_on(self, running: _Running) -> None:
        """Do one piece. What an operation raises, besides a refusal, passes; it is through then."""
        try:
            step = next(running.operation)
        except StopIteration as done:
            result: AdminResult = done.value
            self._said.append(AdminReply(running.key, result))
            return
        except OperationRefused as refused:
            self._said.append(AdminReply(running.key, refused.refusal))
            return
        if step is not None:
            self._said.append(
                AdminProgress(
                    running.key, step.done_objects, step.total_objects, step.done_bytes, step.skipped_objects
                )
            )
        self._running.append(running)

    def _begin(self, op: AdminOp) -> Operation:
        context = self._context
        match op:
            case ReadStats():
                uptime_s = context.clock.now() - self._started
                return read_stats(context, self._catalogues, op, uptime_s)
            case ListPrefixes():
                return list_prefixes(context, self._catalogues, op)
            case LookUpPrefix():
                return look_up_prefix(context, op)
            case PinPrefix():
                return pin_prefix(context, self.events, op)
            case UnpinPrefix():
                return unpin_prefix(context, op)
            case SetLifetime():
                return set_lifetime(context, op)
            case ReleasePrefix():
                return release_prefix(context, op)
            case EvictPrefixes():
                return evict_prefixes(context, op)
            case ClearCache():
                return clear_cache(context, op)
            case DescribePolicy():
                return _at_once(lambda: report_policies(context))
            case SetPolicy():
                return _at_once(lambda: set_policy(context, op))
            case SaveSnapshot():
                return _save(context, op)
            case RestoreSnapshot():
                return _restore(context, op)


def _at_once(function: Callable[[], AdminResult]) -> Operation:
    """Make an operation of one piece."""
    yield from ()
    return function()


def _save(context: OperationContext, op: SaveSnapshot) -> Operation:
    namespace = context.space_of(op.namespace).seed if op.namespace else None
    return (yield from context.tiers.save(op.name, namespace=namespace, replace=op.replace))


def _restore(context: OperationContext, op: RestoreSnapshot) -> Operation:
    return (yield from context.tiers.restore(op.name))
