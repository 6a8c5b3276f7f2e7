"""Read the requests of ``cache_admin.proto``: every field is checked, all violations are reported together.

An operation that names a prefix by what it says is read as a draft, completed once the prompt is tokenized.
Defaults stand in the proto comments and are applied here.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvserve.v1 import cache_admin_pb2 as pb
from server.engine import admin_messages as ops
from server.engine.admin_messages import PinType, PrefixRef
from server.rpc.prompt_convert import read_prompt
from server.rpc.requests import ModelLimits, Prompt
from server.rpc.validation import Violations

__all__ = [
    "Selected",
    "WarmDraft",
    "WatchFilter",
    "read_clear",
    "read_evict",
    "read_get_policy",
    "read_list",
    "read_lookup",
    "read_pin",
    "read_release",
    "read_restore",
    "read_save",
    "read_set_lifetime",
    "read_set_policy",
    "read_stats",
    "read_unpin",
    "read_warm",
    "read_watch",
]

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_TOKEN_CHARS = 512
MAX_TRIAL_POLICIES = 16
MAX_CANARY_SHARE = 0.5
MAX_EVENT_KINDS = 64
_INT64_MAX = 2**63 - 1
_TIERS = ("device", "host", "disk", "redis")

_PIN_TYPES = {pb.PIN_KIND_SOFT: PinType.SOFT, pb.PIN_KIND_HARD: PinType.HARD}


@dataclass(frozen=True, slots=True)
class Selected:
    """A prefix as a client names it; its text is not tokenized yet."""

    path: str
    """Of the selector in the request."""
    prefix_id: str = ""
    prompt: Prompt | None = None

    def ref(self, token_ids: list[int], limits: ModelLimits, *, salt: str) -> PrefixRef:
        """Return the prefix for the engine. Raises :class:`InvalidArgument` for an impossible length."""
        if self.prompt is None:
            return PrefixRef(prefix_id=self.prefix_id)
        limits.check_prompt_length(self.prompt.field, len(token_ids))
        return PrefixRef(token_ids=token_ids, salt=salt)


@dataclass(frozen=True, slots=True)
class WarmDraft:
    """A prefix to compute ahead."""

    prefix: Selected
    lifetime_s: float | None
    pin: PinType | None
    pin_lifetime_s: float | None


@dataclass(frozen=True, slots=True)
class WatchFilter:
    """Which events a watcher wants."""

    namespace: str = ""
    kinds: frozenset[int] = frozenset()
    """Empty: all."""


def read_stats(request: pb.GetStatsRequest) -> ops.ReadStats:
    """Validate."""
    violations = _begin(request.model)
    violations.namespace("namespace", request.namespace)
    violations.raise_if_any()
    return ops.ReadStats(namespace=request.namespace)


def read_list(request: pb.ListPrefixesRequest, *, viewer_salt: str) -> ops.ListPrefixes:
    """Validate."""
    violations = _begin(request.model)
    page_size = request.page_size if request.HasField("page_size") else DEFAULT_PAGE_SIZE
    violations.integer("page_size", page_size, low=1, high=MAX_PAGE_SIZE)
    violations.printable("page_token", request.page_token, max_chars=MAX_PAGE_TOKEN_CHARS)
    violations.namespace("namespace", request.namespace)
    min_age_s = _read_age(request, "min_age", violations)
    max_age_s = _read_age(request, "max_age", violations)
    if min_age_s is not None and max_age_s is not None and min_age_s > max_age_s:
        violations.add("min_age", "must be at most max_age")
    violations.integer("min_hits", request.min_hits, low=0, high=_INT64_MAX)
    violations.choice("tier", request.tier, _TIERS)
    violations.raise_if_any()
    return ops.ListPrefixes(
        page_size=page_size,
        page_token=request.page_token,
        namespace=request.namespace,
        min_age_s=min_age_s,
        max_age_s=max_age_s,
        min_hits=request.min_hits,
        is_pinned=request.pinned if request.HasField("pinned") else None,
        tier=request.tier,
        viewer_salt=viewer_salt,
    )


def read_lookup(request: pb.LookupPrefixRequest, limits: ModelLimits) -> tuple[Selected, ops.LookUpPrefix]:
    """Validate; return the prefix, and the operation without it."""
    return _read_prefix(request, limits), ops.LookUpPrefix(PrefixRef())


def read_warm(request: pb.WarmPrefixRequest, limits: ModelLimits) -> WarmDraft:
    """Validate."""
    violations = _begin(request.model)
    prefix = _read_selector(request.prefix, limits, violations, path="prefix")
    if prefix.prefix_id:
        violations.add("prefix.prefix_id", "cannot be computed; one of text, token_ids and chat is required")
    lifetime_s = _read_lifetime(request, "lifetime", violations)
    pin_lifetime_s = _read_lifetime(request, "pin_lifetime", violations)
    violations.enum("pin", request.pin, pb.PinKind.values())
    if request.HasField("pin_lifetime") and not request.pin:
        violations.add("pin_lifetime", "needs pin")
    violations.raise_if_any()
    return WarmDraft(prefix, lifetime_s, _PIN_TYPES.get(request.pin), pin_lifetime_s)


def read_pin(request: pb.PinPrefixRequest, limits: ModelLimits) -> tuple[Selected, ops.PinPrefix]:
    """Validate; return the prefix, and the operation without it."""
    violations = _begin(request.model)
    prefix = _read_selector(request.prefix, limits, violations, path="prefix")
    violations.enum("kind", request.kind, pb.PinKind.values())
    lifetime_s = _read_lifetime(request, "lifetime", violations)
    violations.raise_if_any()
    pin = _PIN_TYPES.get(request.kind, PinType.SOFT)
    return prefix, ops.PinPrefix(PrefixRef(), pin, lifetime_s)


def read_unpin(request: pb.UnpinPrefixRequest, limits: ModelLimits) -> tuple[Selected, ops.UnpinPrefix]:
    """Validate; return the prefix, and the operation without it."""
    return _read_prefix(request, limits), ops.UnpinPrefix(PrefixRef())


def read_set_lifetime(
    request: pb.SetLifetimeRequest, limits: ModelLimits
) -> tuple[Selected, ops.SetLifetime]:
    """Validate; return the prefix, and the operation without it."""
    violations = _begin(request.model)
    prefix = _read_selector(request.prefix, limits, violations, path="prefix")
    lifetime_s = _read_lifetime(request, "lifetime", violations)
    violations.raise_if_any()
    return prefix, ops.SetLifetime(PrefixRef(), lifetime_s)


def read_release(request: pb.ReleasePrefixRequest, limits: ModelLimits) -> tuple[Selected, ops.ReleasePrefix]:
    """Validate; return the prefix, and the operation without it."""
    return _read_prefix(request, limits), ops.ReleasePrefix(PrefixRef())


def read_evict(
    request: pb.EvictPrefixesRequest, limits: ModelLimits
) -> tuple[Selected | None, ops.EvictPrefixes]:
    """Validate; return the subtree, if one is given, and the operation without it."""
    violations = _begin(request.model)
    subtree = None
    if request.HasField("subtree"):
        subtree = _read_selector(request.subtree, limits, violations, path="subtree")
    violations.namespace("namespace", request.namespace)
    min_idle_s = _read_age(request, "min_idle", violations)
    violations.enum("in_use", request.in_use, pb.InUse.values())
    if subtree is None and not request.namespace and not request.HasField("min_idle"):
        violations.add("subtree", "one of subtree, namespace and min_idle is required; ClearCache takes all")
    violations.raise_if_any()
    return subtree, ops.EvictPrefixes(
        namespace=request.namespace,
        min_idle_s=min_idle_s,
        skip_in_use=request.in_use == pb.IN_USE_SKIP,
        tiers=request.tiers if request.HasField("tiers") else True,
    )


def read_clear(request: pb.ClearCacheRequest) -> ops.ClearCache:
    """Validate."""
    violations = _begin(request.model)
    violations.enum("in_use", request.in_use, pb.InUse.values())
    violations.raise_if_any()
    return ops.ClearCache(
        skip_in_use=request.in_use == pb.IN_USE_SKIP,
        tiers=request.tiers if request.HasField("tiers") else True,
    )


def read_get_policy(request: pb.GetPolicyRequest) -> ops.DescribePolicy:
    """Validate."""
    _begin(request.model).raise_if_any()
    return ops.DescribePolicy()


def read_set_policy(request: pb.SetPolicyRequest) -> ops.SetPolicy:
    """Validate. Whether a policy exists is the engine's to say."""
    violations = _begin(request.model)
    if request.policy:
        violations.policy_name("policy", request.policy)
    trial = canary = None
    if request.HasField("trial"):
        trial = list(request.trial.names)
        if violations.count("trial.names", len(trial), high=MAX_TRIAL_POLICIES):
            for index, name in enumerate(trial):
                violations.policy_name(f"trial.names[{index}]", name)
            violations.distinct("trial.names", trial)
    if request.HasField("canary"):
        share = request.canary.share
        violations.number("canary.share", share, low=0, high=MAX_CANARY_SHARE)
        if request.canary.policy or share:
            violations.policy_name("canary.policy", request.canary.policy)
        canary = (request.canary.policy, share)
    violations.raise_if_any()
    return ops.SetPolicy(policy=request.policy or None, trial=trial, canary=canary)


def read_watch(request: pb.WatchCacheRequest) -> WatchFilter:
    """Validate."""
    violations = _begin(request.model)
    violations.namespace("namespace", request.namespace)
    if violations.count("kinds", len(request.kinds), high=MAX_EVENT_KINDS):
        known = [kind for kind in pb.CacheEventKind.values() if kind]
        for index, kind in enumerate(request.kinds):
            violations.enum(f"kinds[{index}]", kind, known)
    violations.raise_if_any()
    return WatchFilter(request.namespace, frozenset(request.kinds))


def read_save(request: pb.SaveSnapshotRequest) -> ops.SaveSnapshot:
    """Validate."""
    violations = _begin(request.model)
    violations.plain_name("name", request.name)
    violations.namespace("namespace", request.namespace)
    violations.raise_if_any()
    return ops.SaveSnapshot(request.name, request.namespace, request.replace)


def read_restore(request: pb.RestoreSnapshotRequest) -> ops.RestoreSnapshot:
    """Validate."""
    violations = _begin(request.model)
    violations.plain_name("name", request.name)
    violations.raise_if_any()
    return ops.RestoreSnapshot(request.name)


def _begin(model: str) -> Violations:
    violations = Violations()
    violations.model_name("model", model)
    return violations


def _read_prefix(
    request: pb.LookupPrefixRequest | pb.UnpinPrefixRequest | pb.ReleasePrefixRequest, limits: ModelLimits
) -> Selected:
    violations = _begin(request.model)
    prefix = _read_selector(request.prefix, limits, violations, path="prefix")
    violations.raise_if_any()
    return prefix


def _read_selector(
    selector: pb.PrefixSelector, limits: ModelLimits, violations: Violations, *, path: str
) -> Selected:
    form = selector.WhichOneof("prefix")
    if form == "prefix_id":
        violations.prefix_id(f"{path}.prefix_id", selector.prefix_id)
        return Selected(path, prefix_id=selector.prefix_id)
    prompt = read_prompt(selector, form, limits, violations, path=f"{path}.")
    if prompt is None:
        violations.add(path, "one of prefix_id, text, token_ids and chat is required")
    return Selected(path, prompt=prompt)


def _read_lifetime(
    request: pb.WarmPrefixRequest | pb.PinPrefixRequest | pb.SetLifetimeRequest,
    field: str,
    violations: Violations,
) -> float | None:
    if not request.HasField(field):
        return None
    value = getattr(request, field)
    return violations.duration(field, value.seconds, value.nanos)


def _read_age(
    request: pb.ListPrefixesRequest | pb.EvictPrefixesRequest, field: str, violations: Violations
) -> float | None:
    if not request.HasField(field):
        return None
    return violations.age(field, getattr(request, field))
