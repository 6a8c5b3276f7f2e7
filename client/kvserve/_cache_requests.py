"""From arguments to the calls about the cache, for both clients.

Refused here, with ``ValueError`` or ``TypeError`` that name the argument: what can't mean anything to any
server. The rest is the server's to judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvserve import _calls
from kvserve._cache_convert import event_kind_to_pb
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
from kvserve._cache_results import CacheEventKind, PinKind, PrefixId
from kvserve._calls import Call
from kvserve._fields import check_seconds, fill_chat, fill_duration, refusing, set_field
from kvserve._options import CallOptions, ChatMessage, TimeoutOptions, check_options
from kvserve._requests import CallFactory
from kvserve.v1 import cache_admin_pb2 as pb

__all__ = ["CacheCalls"]

_MIN_ID_CHARACTERS = 8
_MAX_CANARY_SHARE = 0.5
_MAX_PAGE_SIZE = 1000
_TIERS = ("device", "host", "disk", "redis")
_IN_USE = {"fail": pb.IN_USE_FAIL, "skip": pb.IN_USE_SKIP}
_PIN_KINDS = {PinKind.SOFT: pb.PIN_KIND_SOFT, PinKind.HARD: pb.PIN_KIND_HARD}


class CacheCalls:
    """Makes the calls of CacheAdminService about the cache."""

    def __init__(self, factory: CallFactory) -> None:
        self._factory = factory

    def stats(
        self, namespace: str | None, options: CallOptions
    ) -> Call[pb.GetStatsRequest, pb.GetStatsResponse]:
        """Make a call of GetStats."""
        check_options(options, CallOptions, method="stats")
        request = pb.GetStatsRequest()
        set_field(request, "model", options.get("model"))
        set_field(request, "namespace", namespace)
        return self._factory.call(_calls.GET_STATS, request, options)

    def prefixes(
        self, options: PrefixFilter, *, page_token: str = ""
    ) -> Call[pb.ListPrefixesRequest, pb.ListPrefixesResponse]:
        """Make a call of ListPrefixes, for one page."""
        check_options(options, PrefixFilter, method="prefixes")
        page_size, tier = options.get("page_size"), options.get("tier")
        if page_size is not None and not 1 <= page_size <= _MAX_PAGE_SIZE:
            raise ValueError(f"page_size must be from 1 to {_MAX_PAGE_SIZE}")
        if tier is not None and tier not in _TIERS:
            raise ValueError(f"tier must be one of {', '.join(_TIERS)}; not {tier!r}")
        request = pb.ListPrefixesRequest(page_token=page_token)
        for name in ("model", "namespace", "min_hits", "pinned", "tier", "page_size"):
            set_field(request, name, options.get(name))
        check_seconds("min_age_s", options.get("min_age_s"))
        fill_duration(request.min_age, options.get("min_age_s"), field="min_age")
        check_seconds("max_age_s", options.get("max_age_s"))
        fill_duration(request.max_age, options.get("max_age_s"), field="max_age")
        return self._factory.call(_calls.LIST_PREFIXES, request, options)

    def lookup(
        self, prefix: Prefix, options: PrefixOptions
    ) -> Call[pb.LookupPrefixRequest, pb.LookupPrefixResponse]:
        """Make a call of LookupPrefix."""
        request = pb.LookupPrefixRequest()
        _fill_named(request, prefix, options, method="lookup")
        return self._factory.call(_calls.LOOKUP_PREFIX, request, options)

    def warm(self, prefix: Prefix, options: WarmOptions) -> Call[pb.WarmPrefixRequest, pb.WarmPrefixProgress]:
        """Make a call of WarmPrefix."""
        check_options(options, WarmOptions, method="warm")
        if isinstance(prefix, PrefixId):
            raise TypeError("warm() takes text, token ids or messages: an id names what is cached already")
        request = pb.WarmPrefixRequest()
        set_field(request, "model", options.get("model"))
        _fill_prefix(request.prefix, prefix, options.get("add_generation_prompt"))
        check_seconds("lifetime_s", options.get("lifetime_s"), is_zero_allowed=False)
        fill_duration(request.lifetime, options.get("lifetime_s"), field="lifetime")
        pin, pin_lifetime_s = options.get("pin"), options.get("pin_lifetime_s")
        if pin is not None:
            request.pin = _pin_kind("pin", pin)
        elif pin_lifetime_s is not None:
            raise TypeError("warm(): pin_lifetime_s needs pin")
        check_seconds("pin_lifetime_s", pin_lifetime_s, is_zero_allowed=False)
        fill_duration(request.pin_lifetime, pin_lifetime_s, field="pin_lifetime")
        return self._factory.call(_calls.WARM_PREFIX, request, options)

    def pin(
        self, prefix: Prefix, kind: PinName, lifetime_s: float | None, options: PrefixOptions
    ) -> Call[pb.PinPrefixRequest, pb.PinPrefixResponse]:
        """Make a call of PinPrefix."""
        request = pb.PinPrefixRequest(kind=_pin_kind("kind", kind))
        _fill_named(request, prefix, options, method="pin")
        check_seconds("lifetime_s", lifetime_s, is_zero_allowed=False)
        fill_duration(request.lifetime, lifetime_s, field="lifetime")
        return self._factory.call(_calls.PIN_PREFIX, request, options)

    def unpin(
        self, prefix: Prefix, options: PrefixOptions
    ) -> Call[pb.UnpinPrefixRequest, pb.UnpinPrefixResponse]:
        """Make a call of UnpinPrefix."""
        request = pb.UnpinPrefixRequest()
        _fill_named(request, prefix, options, method="unpin")
        return self._factory.call(_calls.UNPIN_PREFIX, request, options)

    def set_lifetime(
        self, prefix: Prefix, lifetime_s: float | None, options: PrefixOptions
    ) -> Call[pb.SetLifetimeRequest, pb.SetLifetimeResponse]:
        """Make a call of SetLifetime."""
        request = pb.SetLifetimeRequest()
        _fill_named(request, prefix, options, method="set_lifetime")
        check_seconds("lifetime_s", lifetime_s, is_zero_allowed=False)
        fill_duration(request.lifetime, lifetime_s, field="lifetime")
        return self._factory.call(_calls.SET_LIFETIME, request, options)

    def release(
        self, prefix: Prefix, options: PrefixOptions
    ) -> Call[pb.ReleasePrefixRequest, pb.ReleasePrefixResponse]:
        """Make a call of ReleasePrefix."""
        request = pb.ReleasePrefixRequest()
        _fill_named(request, prefix, options, method="release")
        return self._factory.call(_calls.RELEASE_PREFIX, request, options)

    def evict(
        self, prefix: Prefix | None, options: EvictOptions
    ) -> Call[pb.EvictPrefixesRequest, pb.EvictPrefixesResponse]:
        """Make a call of EvictPrefixes."""
        check_options(options, EvictOptions, method="evict")
        namespace, min_idle_s = options.get("namespace"), options.get("min_idle_s")
        if prefix is None and not namespace and min_idle_s is None:
            raise TypeError(
                "evict() needs a prefix, namespace or min_idle_s; clear() empties the whole cache"
            )
        request = pb.EvictPrefixesRequest()
        if prefix is not None:
            _fill_prefix(request.subtree, prefix, options.get("add_generation_prompt"), field="subtree")
        set_field(request, "namespace", namespace)
        check_seconds("min_idle_s", min_idle_s)
        fill_duration(request.min_idle, min_idle_s, field="min_idle")
        _fill_reach(request, options)
        return self._factory.call(_calls.EVICT_PREFIXES, request, options)

    def clear(self, options: ClearOptions) -> Call[pb.ClearCacheRequest, pb.ClearCacheResponse]:
        """Make a call of ClearCache."""
        check_options(options, ClearOptions, method="clear")
        request = pb.ClearCacheRequest()
        _fill_reach(request, options)
        return self._factory.call(_calls.CLEAR_CACHE, request, options)

    def policy(self, options: CallOptions) -> Call[pb.GetPolicyRequest, pb.GetPolicyResponse]:
        """Make a call of GetPolicy."""
        check_options(options, CallOptions, method="policy")
        request = pb.GetPolicyRequest()
        set_field(request, "model", options.get("model"))
        return self._factory.call(_calls.GET_POLICY, request, options)

    def set_policy(
        self,
        policy: str | None,
        trial: Iterable[str] | None,
        canary: tuple[str, float] | None,
        options: CallOptions,
    ) -> Call[pb.SetPolicyRequest, pb.GetPolicyResponse]:
        """Make a call of SetPolicy."""
        check_options(options, CallOptions, method="set_policy")
        if policy is None and trial is None and canary is None:
            raise TypeError("set_policy() needs policy, trial or canary")
        if policy == "":
            raise ValueError("policy must be a name")
        request = pb.SetPolicyRequest()
        set_field(request, "model", options.get("model"))
        set_field(request, "policy", policy)
        if trial is not None:
            if isinstance(trial, str):
                raise TypeError("trial must be a list of names, not one name")
            request.trial.SetInParent()  # No names: end all trials.
            with refusing("trial.names"):
                request.trial.names.extend(trial)
        if canary is not None:
            name, share = canary
            if not 0 <= share <= _MAX_CANARY_SHARE:
                raise ValueError(f"the canary's share must be from 0 to {_MAX_CANARY_SHARE}")
            set_field(request.canary, "policy", name, prefix="canary.")
            set_field(request.canary, "share", share, prefix="canary.")
        return self._factory.call(_calls.SET_POLICY, request, options)

    def watch(
        self,
        namespace: str | None,
        kinds: Iterable[CacheEventKind | str],
        options: CallOptions,
    ) -> Call[pb.WatchCacheRequest, pb.CacheEvent]:
        """Make a call of WatchCache: without a deadline unless it names one of its own."""
        check_options(options, CallOptions, method="watch")
        if isinstance(kinds, str):
            raise TypeError("kinds must be a list of names, not one name")
        request = pb.WatchCacheRequest(kinds=[_event_kind(kind) for kind in kinds])
        set_field(request, "model", options.get("model"))
        set_field(request, "namespace", namespace)
        unending: TimeoutOptions = {"timeout_s": options.get("timeout_s")}
        return self._factory.call(_calls.WATCH_CACHE, request, unending)

    def save_snapshot(
        self, name: str, options: SaveOptions
    ) -> Call[pb.SaveSnapshotRequest, pb.SnapshotProgress]:
        """Make a call of SaveSnapshot."""
        check_options(options, SaveOptions, method="save_snapshot")
        request = pb.SaveSnapshotRequest()
        _fill_name(request, name)
        for field in ("model", "namespace", "replace"):
            set_field(request, field, options.get(field))
        return self._factory.call(_calls.SAVE_SNAPSHOT, request, options)

    def restore_snapshot(
        self, name: str, options: CallOptions
    ) -> Call[pb.RestoreSnapshotRequest, pb.SnapshotProgress]:
        """Make a call of RestoreSnapshot."""
        check_options(options, CallOptions, method="restore_snapshot")
        request = pb.RestoreSnapshotRequest()
        _fill_name(request, name)
        set_field(request, "model", options.get("model"))
        return self._factory.call(_calls.RESTORE_SNAPSHOT, request, options)


_PrefixRequest = (
    pb.LookupPrefixRequest
    | pb.PinPrefixRequest
    | pb.UnpinPrefixRequest
    | pb.SetLifetimeRequest
    | pb.ReleasePrefixRequest
)


def _fill_named(request: _PrefixRequest, prefix: Prefix, options: PrefixOptions, *, method: str) -> None:
    check_options(options, PrefixOptions, method=method)
    set_field(request, "model", options.get("model"))
    _fill_prefix(request.prefix, prefix, options.get("add_generation_prompt"))


def _fill_prefix(
    selector: pb.PrefixSelector,
    prefix: Prefix,
    add_generation_prompt: bool | None,
    *,
    field: str = "prefix",
) -> None:
    if isinstance(prefix, PrefixId):
        if len(prefix.value) < _MIN_ID_CHARACTERS:
            raise ValueError(f"a PrefixId needs at least {_MIN_ID_CHARACTERS} characters")
        set_field(selector, "prefix_id", prefix.value, prefix=f"{field}.")
    elif isinstance(prefix, str):
        set_field(selector, "text", prefix, prefix=f"{field}.")
    elif isinstance(prefix, bytes | bytearray | Mapping) or not isinstance(prefix, Iterable):
        raise TypeError(f"a prefix is text, token ids, messages or a PrefixId; not {type(prefix).__name__}")
    else:
        items = list(prefix)
        messages = [item for item in items if isinstance(item, ChatMessage | Mapping)]
        if messages and len(messages) == len(items):
            fill_chat(selector.chat, messages, add_generation_prompt)
        else:
            selector.token_ids.SetInParent()
            with refusing(f"{field}.token_ids.ids"):
                selector.token_ids.ids.extend(items)  # type: ignore[arg-type]  # refused if any is no number


def _fill_reach(request: pb.EvictPrefixesRequest | pb.ClearCacheRequest, options: ClearOptions) -> None:
    in_use = options.get("in_use", "fail")
    if in_use not in _IN_USE:
        raise ValueError(f"in_use must be 'fail' or 'skip'; not {in_use!r}")
    request.in_use = _IN_USE[in_use]
    set_field(request, "model", options.get("model"))
    set_field(request, "tiers", options.get("tiers"))


def _fill_name(request: pb.SaveSnapshotRequest | pb.RestoreSnapshotRequest, name: str) -> None:
    if not name:
        raise ValueError("a snapshot's name can't be empty")
    set_field(request, "name", name)


def _pin_kind(argument: str, kind: PinName) -> pb.PinKind:
    if kind not in tuple(PinKind):
        raise ValueError(f"{argument} must be 'soft' or 'hard'; not {kind!r}")
    return _PIN_KINDS[PinKind(kind)]


def _event_kind(kind: CacheEventKind | str) -> str:
    known = [each for each in CacheEventKind if each is not CacheEventKind.OTHER]
    if kind not in known:
        raise ValueError(f"kinds must be of {', '.join(known)}; not {kind!r}")
    return event_kind_to_pb(CacheEventKind(kind))
