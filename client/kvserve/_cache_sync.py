"""The cache of a server, blocking: ``client.cache``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Unpack

from kvserve._cache_convert import (
    evict_result_from_pb,
    lifetime_result_from_pb,
    lookup_from_pb,
    pin_result_from_pb,
    policy_report_from_pb,
    prefix_info_from_pb,
    report_from_pb,
    snapshot_progress_from_pb,
    warm_progress_from_pb,
)
from kvserve._cache_options import (
    ClearOptions,
    EvictOptions,
    PinName,
    Prefix,
    PrefixFilter,
    PrefixOptions,
    SaveOptions,
    WarmOptions,
)
from kvserve._cache_reports import CacheReport
from kvserve._cache_requests import CacheCalls
from kvserve._cache_results import (
    CacheEvent,
    CacheEventKind,
    EvictResult,
    LifetimeResult,
    PinKind,
    PinResult,
    PolicyReport,
    PrefixInfo,
    PrefixLookup,
    SnapshotProgress,
    WarmProgress,
)
from kvserve._cache_streams import CacheWatchState
from kvserve._calls import Call
from kvserve._follow_sync import Progress, Watch
from kvserve._options import CallOptions
from kvserve._transport import Transport
from kvserve.v1 import cache_admin_pb2 as pb

__all__ = ["Cache", "CacheWatch"]


class CacheWatch(Watch[CacheEvent], CacheWatchState):
    """What happens to the cache from now on; made by ``client.cache.watch``.

    Use it as ``with ... as events`` and ``for event in events``. Leaving the block ends the call.
    ``Unavailable`` says that the server or the connection went: what was seen so far may be out of date.
    """


class Cache:
    """Sees and steers the cache; it is ``client.cache``. Needs a key with the scope "admin" where keys are.

    A prefix is named by text, token ids, messages, or a ``PrefixId`` from a result. All methods take
    ``model=`` and ``timeout_s=``, and raise ``kvserve.Error``; ValueError or TypeError for arguments that
    make no sense to any server.
    """

    def __init__(self, calls: CacheCalls, transport: Transport) -> None:
        self._calls = calls
        self._transport = transport

    def stats(self, namespace: str | None = None, **options: Unpack[CallOptions]) -> CacheReport:
        """Say how the cache does: in total, by namespace (all, or the one given) and by tier."""
        return report_from_pb(self._transport.unary(self._calls.stats(namespace, options)))

    def prefixes(self, **options: Unpack[PrefixFilter]) -> Iterator[PrefixInfo]:
        """Iterate over cached prefixes, the most valuable first. See ``PrefixFilter``.

        Pages are fetched as they are needed; what changes between two of them may be missed or come twice.
        """
        return self._prefixes(self._calls.prefixes(options), options)

    def _prefixes(
        self, call: Call[pb.ListPrefixesRequest, pb.ListPrefixesResponse], options: PrefixFilter
    ) -> Iterator[PrefixInfo]:
        while True:
            page = self._transport.unary(call)
            for message in page.prefixes:
                yield prefix_info_from_pb(message)
            if not page.next_page_token:
                return
            call = self._calls.prefixes(options, page_token=page.next_page_token)

    def lookup(self, prefix: Prefix, **options: Unpack[PrefixOptions]) -> PrefixLookup:
        """Say how much of a prompt is cached, and where. Touches no recency."""
        return lookup_from_pb(self._transport.unary(self._calls.lookup(prefix, options)))

    def warm(self, prefix: Prefix, **options: Unpack[WarmOptions]) -> Progress[WarmProgress]:
        """Compute a prefix ahead of its use: wait for it, or follow it. See ``WarmOptions``."""
        return Progress(self._calls.warm(prefix, options), warm_progress_from_pb, self._transport)

    def pin(
        self,
        prefix: Prefix,
        kind: PinName = PinKind.SOFT,
        lifetime_s: float | None = None,
        **options: Unpack[PrefixOptions],
    ) -> PinResult:
        """Hold a cached prefix: "soft" is evicted last, "hard" never. No lifetime: until unpinned."""
        call = self._calls.pin(prefix, kind, lifetime_s, options)
        return pin_result_from_pb(self._transport.unary(call))

    def unpin(self, prefix: Prefix, **options: Unpack[PrefixOptions]) -> bool:
        """End a pin. Return whether there was one."""
        return (self._transport.unary(self._calls.unpin(prefix, options))).was_pinned

    def set_lifetime(
        self, prefix: Prefix, lifetime_s: float | None, **options: Unpack[PrefixOptions]
    ) -> LifetimeResult:
        """Let a prefix expire so long from now, in tiers too; None: it has no end."""
        call = self._calls.set_lifetime(prefix, lifetime_s, options)
        return lifetime_result_from_pb(self._transport.unary(call))

    def release(self, prefix: Prefix, **options: Unpack[PrefixOptions]) -> int:
        """Say that a prefix is not needed any more: it goes first. Return how many blocks that concerns."""
        return (self._transport.unary(self._calls.release(prefix, options))).num_blocks

    def evict(self, prefix: Prefix | None = None, **options: Unpack[EvictOptions]) -> EvictResult:
        """Evict a prefix and all that continues it, or a namespace, or what is idle. See ``EvictOptions``.

        Never takes a block from a running request: raises ``FailedPrecondition``, and changes nothing, if
        one holds any of it; with ``in_use="skip"`` leaves those.
        """
        return evict_result_from_pb(self._transport.unary(self._calls.evict(prefix, options)))

    def clear(self, **options: Unpack[ClearOptions]) -> EvictResult:
        """Evict everything, by the rules of ``evict``."""
        return evict_result_from_pb(self._transport.unary(self._calls.clear(options)))

    def policy(self, **options: Unpack[CallOptions]) -> PolicyReport:
        """Say what decides on evictions, and how others would do on the same traffic."""
        return policy_report_from_pb(self._transport.unary(self._calls.policy(options)))

    def set_policy(
        self,
        policy: str | None = None,
        *,
        trial: Iterable[str] | None = None,
        canary: tuple[str, float] | None = None,
        **options: Unpack[CallOptions],
    ) -> PolicyReport:
        """Change the policy, those that run in its shadow, or the canary; None leaves each as it is.

        ``trial=[]`` ends all trials. ``canary`` is a policy and the share of namespaces that it gets, at most
        a half; a share of 0 ends it. Nothing is evicted by the change itself.
        """
        call = self._calls.set_policy(policy, trial, canary, options)
        return policy_report_from_pb(self._transport.unary(call))

    def watch(
        self,
        namespace: str | None = None,
        kinds: Iterable[CacheEventKind | str] = (),
        **options: Unpack[CallOptions],
    ) -> CacheWatch:
        """Prepare to follow what happens to the cache; no kinds: all. Has no deadline unless given here."""
        return CacheWatch(self._calls.watch(namespace, kinds, options), self._transport)

    def save_snapshot(self, name: str, **options: Unpack[SaveOptions]) -> Progress[SnapshotProgress]:
        """Write cached prefixes to the server's disk: wait for it, or follow it. See ``SaveOptions``."""
        call = self._calls.save_snapshot(name, options)
        return Progress(call, snapshot_progress_from_pb, self._transport)

    def restore_snapshot(self, name: str, **options: Unpack[CallOptions]) -> Progress[SnapshotProgress]:
        """Read a snapshot back: wait for it, or follow it."""
        call = self._calls.restore_snapshot(name, options)
        return Progress(call, snapshot_progress_from_pb, self._transport)
