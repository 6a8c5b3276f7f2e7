"""What an operator may ask of reuse, and which predictors there are."""

from __future__ import annotations

import numpy as np
import pytest

from kvcore.clock import ManualClock
from server.predict import reuse
from server.predict.errors import ModelRefusedError
from server.predict.messages import Inputs
from server.predict.options import BudgetSpec, CanarySpec, FeatureSpec, ModelSpec
from server.predict.reuse import Predictor, build_feature_model, register_predictor, registry
from tests.unit.reuse_world import Half, Turning


def build(**spec):
    return build_feature_model(
        ModelSpec(name="risk", features=FeatureSpec(**spec)), clock=ManualClock(), on_event=lambda _: None
    )


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"prefix": 0}, "prefix"),
        ({"prefix": 33}, "prefix"),
        ({"bin_width": -1.0}, "bin_width"),
        ({"bin_width": float("nan")}, "bin_width"),
        ({"lifetime_s": 0.0}, "lifetime_s"),
        ({"lifetime_s": 1e9}, "lifetime_s"),
        ({"min_lifetime_s": 0.0}, "min_lifetime_s"),
        ({"min_lifetime_s": 10.0, "max_lifetime_s": 5.0}, "max_lifetime_s"),
        ({"sample_share": 1.1}, "sample_share"),
        ({"max_entries": 0}, "max_entries"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_error": 0.0}, "max_error"),
        ({"budget": BudgetSpec(max_changed=1.0)}, "budget"),
        ({"budget": BudgetSpec(max_changed=0.999)}, "budget"),  # no alarm could ever fire
        ({"canaries": (CanarySpec(name="main", share=0.1),)}, "canaries"),
        ({"canaries": (CanarySpec(name="a", share=0.6), CanarySpec(name="b", share=0.4))}, "canaries"),
        ({"canaries": (CanarySpec(name="a", share=0.0),)}, "canaries"),
        ({"canaries": (CanarySpec(name="a", share=1.5), CanarySpec(name="b", share=-0.7))}, "canaries"),
        ({"canaries": (CanarySpec(name="a", share=0.1, prefix=40),)}, "canary 'a': prefix"),
        ({"predictor": "nobody"}, "nobody"),
    ],
)
def test_what_cannot_be_is_refused_by_name(spec, named):
    with pytest.raises(ModelRefusedError, match=named):
        build(**spec)


def test_a_canary_has_what_it_says_and_the_rest_from_the_main_policy():
    own = CanarySpec(name="own", share=0.2, lifetime_s=0.5, bin_width=0.5, budget=BudgetSpec(max_l2=0.25))
    model = build(
        min_lifetime_s=0.25,
        prefix=8,
        max_error=0.125,
        budget=BudgetSpec(max_changed=0.05),
        canaries=(own, CanarySpec(name="same", share=0.2)),
    )
    main, canary, same = model.reuse_report(max_keys=0).policies
    assert (canary.lifetime_s, canary.bin_width, canary.max_changed, canary.max_l2) == (0.5, 0.5, 0.01, 0.25)
    for each in (main, same):
        assert (each.lifetime_s, each.bin_width, each.max_changed, each.max_l2) == (60.0, 0.0, 0.05, 0.0)
    assert {each.num_key_features for each in (main, canary, same)} == {8}
    assert {each.max_error for each in (main, canary, same)} == {0.125}


def test_rows_in_one_bin_of_a_canary_go_to_one_policy():
    """Whichever policy has the coarsest key decides what goes together."""
    rows = np.zeros((60, 32), np.float32)
    rows[:, 0] = np.linspace(-0.2, 0.2, 60)
    for number in range(5):
        rows[:, 1] = 10.0 * number
        model = build(prefix=2, canaries=(CanarySpec(name="coarse", share=0.5, bin_width=1.0),))
        inputs = Inputs(rows=rows.tobytes(), num_rows=60)
        model.run(model.prepare(inputs, truncate=False, reuse=True, tenant=""))
        assert {each.num_lookups for each in model.reuse_report(max_keys=0).policies} == {0, 60}


def test_a_model_without_features_is_none_of_these():
    with pytest.raises(ModelRefusedError):
        build_feature_model(ModelSpec(name="x", source="x"), clock=ManualClock(), on_event=lambda _: None)


def make_turning():
    return Predictor(2, 2, Turning(ManualClock()), Half())


@pytest.fixture
def names(monkeypatch):
    monkeypatch.setattr(registry, "_factories", dict(registry._factories))


def test_a_registered_predictor_is_built(names):
    register_predictor("turning", make_turning)
    assert build(predictor="turning", prefix=1).info.num_features == 2
    with pytest.raises(ValueError, match="turning"):
        register_predictor("turning", make_turning)
    with pytest.raises(ModelRefusedError, match="no certificate"):
        build(predictor="turning", prefix=1, max_error=0.1)


def test_an_installed_package_brings_one_by_entry_point(tmp_path, monkeypatch):
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\ntheirs = {__name__}:make_turning\n")
    with pytest.raises(ModelRefusedError, match="theirs"):
        build(predictor="theirs", prefix=1)
    monkeypatch.syspath_prepend(tmp_path)
    assert build(predictor="theirs", prefix=1).info.num_features == 2


@pytest.mark.parametrize("made", [None, RuntimeError("their secret")])
def test_a_predictor_that_cannot_be_made_refuses_the_model_alone(names, made):
    def factory():
        if made is not None:
            raise made

    register_predictor("odd", factory)
    with pytest.raises(ModelRefusedError, match="odd") as caught:
        build(predictor="odd")
    assert "secret" not in caught.value.reason


def test_what_the_package_offers():
    assert sorted(reuse.__all__) == [
        "Certificate",
        "Encoder",
        "Head",
        "LipschitzCertificate",
        "Predictor",
        "SemanticModel",
        "build_feature_model",
        "register_predictor",
    ]
    assert all(hasattr(reuse, name) for name in reuse.__all__)
