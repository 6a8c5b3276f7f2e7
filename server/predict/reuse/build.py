"""From what an operator wrote to a model that reuses."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvcore.clock import Clock
from server.predict.errors import ModelRefusedError
from server.predict.messages import ReuseEvent
from server.predict.model import ReusingModel
from server.predict.options import CanarySpec, FeatureSpec, ModelSpec
from server.predict.reuse.features import FeatureModel
from server.predict.reuse.keys import KeyRule
from server.predict.reuse.lifetimes import Ladder
from server.predict.reuse.meters import make_budget, make_meter
from server.predict.reuse.policy import PolicySettings
from server.predict.reuse.predictor import Predictor
from server.predict.reuse.registry import make_predictor

__all__ = ["MAIN", "build_feature_model", "make_feature_model"]

MAIN = "main"
"""The policy of the rows that go to no canary."""


def build_feature_model(
    spec: ModelSpec, *, clock: Clock, on_event: Callable[[ReuseEvent], None]
) -> ReusingModel:
    """Make the model that ``spec.features`` describes. Raises ``ModelRefusedError``, naming the field."""
    if spec.features is None:
        raise ModelRefusedError("features: there is no stateful encoder to build")
    predictor = make_predictor(spec.features.predictor)
    return make_feature_model(
        spec.name, spec.version, spec.features, predictor, clock=clock, on_event=on_event
    )


def make_feature_model(
    name: str,
    version: str,
    spec: FeatureSpec,
    predictor: Predictor,
    *,
    clock: Clock,
    on_event: Callable[[ReuseEvent], None],
) -> FeatureModel:
    """Make the model of a predictor at hand. Raises ``ModelRefusedError``, naming the field."""
    names = [MAIN, *(canary.name for canary in spec.canaries)]
    if len(set(names)) < len(names) or "" in names:
        raise ModelRefusedError(f"canaries: each needs a name of its own, and {MAIN!r} is taken")
    shares = [canary.share for canary in spec.canaries]
    if not all(0 < share < 1 for share in shares) or sum(shares) >= 1:
        raise ModelRefusedError("canaries: shares are between 0 and 1, and leave some for the main policy")
    main = _settings(spec, None, predictor, share=1 - sum(shares))
    canaries = [_settings(spec, canary, predictor, share=canary.share) for canary in spec.canaries]
    rules = [policy.rule for policy in (main, *canaries)]
    return FeatureModel(
        name,
        version,
        predictor,
        (main, *canaries),
        # The least that keys have in common, so that rows with one key do not go to different policies.
        routing=KeyRule(min(r.num_features for r in rules), max(r.bin_width for r in rules)),
        clock=clock,
        on_event=on_event,
    )


def _settings(
    spec: FeatureSpec, canary: CanarySpec | None, predictor: Predictor, *, share: float
) -> PolicySettings:
    where = "" if canary is None else f"canary {canary.name!r}: "

    def chosen(field: str) -> object:
        own = None if canary is None else getattr(canary, field)
        return getattr(spec, field) if own is None else own

    prefix, bin_width, lifetime, max_error = (
        chosen(field) for field in ("prefix", "bin_width", "lifetime_s", "max_error")
    )
    budget_spec = spec.budget if canary is None or canary.budget is None else canary.budget
    assert isinstance(prefix, int)
    if not 1 <= prefix <= predictor.num_features:
        raise ModelRefusedError(f"{where}prefix: from 1 to {predictor.num_features} features make a key")
    width = _number(bin_width, f"{where}bin_width", least=0.0)
    start = math.inf if lifetime is None else _number(lifetime, f"{where}lifetime_s", above=0.0)
    least = _number(spec.min_lifetime_s, "min_lifetime_s", above=0.0)
    most = _number(spec.max_lifetime_s, "max_lifetime_s", least=least)
    if math.isfinite(start) and not least <= start <= most:
        raise ModelRefusedError(f"{where}lifetime_s: it lies between min_lifetime_s and max_lifetime_s")
    if not 0 <= spec.sample_share <= 1:
        raise ModelRefusedError("sample_share: a share is between 0 and 1")
    if spec.max_entries < 1:
        raise ModelRefusedError("max_entries: there must be room for one")
    if spec.max_bytes < 1:
        raise ModelRefusedError("max_bytes: there must be room for one entry")
    if max_error is not None:
        if predictor.certificate is None:
            raise ModelRefusedError(f"{where}max_error: this predictor has no certificate")
        max_error = _number(max_error, f"{where}max_error", above=0.0)
    try:
        budget = make_budget(budget_spec)
        make_meter(budget, max_keys=1)
    except ValueError as fault:
        raise ModelRefusedError(f"{where}budget: {fault}") from fault
    return PolicySettings(
        name=MAIN if canary is None else canary.name,
        traffic_share=share,
        rule=KeyRule(prefix, width),
        ladder=Ladder(start, min_s=least, max_s=most),
        min_lifetime_s=least,
        max_lifetime_s=most,
        budget=budget,
        sample_share=spec.sample_share,
        max_error=max_error,
        max_entries=spec.max_entries,
        max_bytes=spec.max_bytes,
        seed=spec.seed,
    )


def _number(value: object, field: str, *, least: float | None = None, above: float | None = None) -> float:
    """Return a finite number within bounds."""
    assert isinstance(value, (int, float))
    if not math.isfinite(value):
        raise ModelRefusedError(f"{field}: a finite number is needed")
    if least is not None and value < least:
        raise ModelRefusedError(f"{field}: at least {least:g}")
    if above is not None and value <= above:
        raise ModelRefusedError(f"{field}: more than {above:g}")
    return float(value)
