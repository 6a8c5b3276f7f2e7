"""The drift experiment says what it measured, and what it measures behaves as it must."""

from __future__ import annotations

import numpy as np

from server.predict.options import BudgetSpec
from server.predict.reuse.drift import DriftSpec, make_stream
from server.predict.reuse.experiment import measure_alarms, measure_certificate, run_stream
from tests.unit.reuse_world import BUILTIN

SPEC = DriftSpec(num_requests=2500, num_entities=50, wander_s=60.0, jump_every_s=100.0)
STREAM = make_stream(SPEC)
FRESH = BUILTIN.head.predict(BUILTIN.encoder.encode(STREAM.rows), STREAM.rows)


def run(lifetime_s, prefix=24, **more):
    settings = {
        "lifetime_s": lifetime_s,
        "min_lifetime_s": lifetime_s,
        "max_lifetime_s": lifetime_s,
        "budget": BudgetSpec(max_changed=None),
        "prefix": prefix,
    }
    return run_stream(BUILTIN, STREAM, FRESH, batch=4, **settings | more)


def test_the_same_seed_gives_the_same_rows():
    again = make_stream(SPEC)
    assert again.rows.tobytes() == STREAM.rows.tobytes()
    assert (np.diff(STREAM.times_s) > 0).all()
    assert make_stream(DriftSpec(num_requests=2500, seed=1)).rows.tobytes() != STREAM.rows.tobytes()


def test_longer_lifetimes_hit_more_and_risk_more():
    short, long = run(1.0), run(60.0)
    assert short["hit_rate"] < long["hit_rate"]
    assert short["risk"] < long["risk"]
    assert short["error"] < long["error"]


def test_longer_keys_hit_less_and_risk_less():
    short, long = run(60.0, prefix=16), run(60.0, prefix=24)
    assert short["hit_rate"] > long["hit_rate"]
    assert short["error"] > long["error"]


def test_the_estimate_from_samples_covers_the_true_risk():
    found = run(60.0, sample_share=0.3)
    lower, _, upper = found["estimated_risk"]
    assert lower <= found["risk"] <= upper


def test_the_certificate_is_never_broken_and_certifies_less_the_further_rows_move():
    found = measure_certificate(BUILTIN, 7_000)
    assert found["num_inputs"] == 7_000
    assert found["violations"] == 0
    assert found["tightest"] <= 1.0
    shares = [row["certified"]["0.05"] for row in found["by_spread"]]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99
    assert shares[-1] < 0.01


def test_alarms_are_rare_below_the_budget_and_sure_above_it():
    below, _, _, _, twice, five = measure_alarms(20, 1_000)
    assert below["alarmed"] == 0.0
    assert twice["alarmed"] > 0.8
    assert five["alarmed"] == 1.0
    assert five["median_comparisons"] < 60
