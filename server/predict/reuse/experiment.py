"""What reuse costs and brings under drift: ``python -m server.predict.reuse.experiment [--out reports]``.

Four parts, all with the built-in predictor, through the model as it is served:

1. risk, hit rate and latency of fixed lifetimes and key lengths, at three speeds of drift;
2. lifetimes that adapt, against fixed ones;
3. the certificate over a million random inputs: share that is certified, and violations;
4. how often the alarm is wrong, and how soon it is right.

Risk is counted over *all* reuses against a fresh prediction, not estimated. Latencies are those of single
requests in this process, without transport: the mean of the processor's time, which a busy machine changes
least, and quantiles of the wall's. Writes ``predict_reuse.json`` and ``predict_reuse.md``;
takes some five minutes, ``--quick`` half of one.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kvcore.clock import ManualClock
from kvcore.risk import RiskBudget
from server.predict.messages import Inputs, ReuseEvent
from server.predict.options import BudgetSpec, FeatureSpec
from server.predict.reuse.build import make_feature_model
from server.predict.reuse.builtin import make_builtin
from server.predict.reuse.compare import CHANGE_TOLERANCE
from server.predict.reuse.drift import DriftSpec, Stream, make_stream
from server.predict.reuse.experiment_report import to_markdown
from server.predict.reuse.meters import make_meter
from server.predict.reuse.predictor import Predictor, Singles

__all__ = ["main", "measure_alarms", "measure_certificate", "run_stream"]

SPEEDS = {"slow": 600.0, "medium": 120.0, "fast": 30.0}
"""Seconds after which the wandering features have forgotten where they were."""
LIFETIMES_S = (2.0, 5.0, 15.0, 60.0, 240.0)
PREFIXES = (16, 20, 24)
BUDGET = 0.05
SPREADS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
MAX_ERRORS = (0.01, 0.02, 0.05)


def run_stream(
    predictor: Predictor, stream: Stream, fresh: Singles, *, batch: int = 1, **features: Any
) -> dict[str, Any]:
    """Let a stream through a model with these settings; return what came of it. ``fresh``: the truth."""
    clock = ManualClock()
    events: list[ReuseEvent] = []
    model = make_feature_model(
        "drift", "1", FeatureSpec(**features), predictor, clock=clock, on_event=events.append
    )
    got, hits, walls, busy_s = [], [], [], 0.0
    for start in range(0, len(stream.rows), batch):
        part = stream.rows[start : start + batch]
        clock.advance(float(stream.times_s[start]) - clock.now())
        inputs = Inputs(rows=part.tobytes(), num_rows=len(part))
        before, busy_before = time.perf_counter(), time.thread_time()
        outputs = model.run(model.prepare(inputs, truncate=False, reuse=True, tenant=""))
        busy_s += time.thread_time() - busy_before
        walls.append(time.perf_counter() - before)
        got += [np.frombuffer(output.values, "<f4")[0] for output in outputs]
        hits += [output.cache_hit for output in outputs]
    model.check_integrity()
    (report,) = model.reuse_report(max_keys=0).policies
    answers, reused = np.array(got), np.array(hits)
    error = np.abs(answers - fresh)
    changed = ((answers >= 0.5) != (fresh >= 0.5)) | (error > CHANGE_TOLERANCE)
    late = np.arange(len(reused)) >= len(reused) // 2
    return {
        "hit_rate": float(reused.mean()),
        "risk": _mean(changed[reused]),
        "error": _mean(error[reused]),
        "late_hit_rate": float(reused[late].mean()),
        "late_risk": _mean(changed[reused & late]),
        "cpu_us": 1e6 * busy_s / len(stream.rows),
        "p50_us": 1e6 * float(np.median(walls)),
        "p95_us": 1e6 * float(np.quantile(walls, 0.95)),
        "lifetime_s": report.lifetime_s,
        "num_alarms": sum(event.kind.value == "alarm" and not event.key for event in events),
        "num_stopped": report.num_stopped,
        "estimated_risk": [
            report.risk.changed.lower,
            report.risk.changed.estimate,
            report.risk.changed.upper,
        ],
    }


def measure_drift(predictor: Predictor, num_requests: int) -> list[dict[str, Any]]:
    """Return a row for each speed, key length and fixed lifetime."""
    found = []
    for name, wander_s in SPEEDS.items():
        stream = make_stream(
            DriftSpec(
                num_requests=num_requests, requests_per_s=25, wander_s=wander_s, jump_every_s=2 * wander_s
            )
        )
        fresh = _truth(predictor, stream)
        for prefix in PREFIXES:
            for lifetime_s in LIFETIMES_S:
                settings = _fixed(lifetime_s) | {"prefix": prefix, "sample_share": 0.0}
                row = run_stream(predictor, stream, fresh, **settings)
                found.append({"speed": name, "prefix": prefix, "fixed_lifetime_s": lifetime_s} | row)
    return found


def measure_adaptive(predictor: Predictor, num_requests: int) -> list[dict[str, Any]]:
    """Return a row for each speed and way of setting the lifetime."""
    found = []
    adaptive = {
        "lifetime_s": 60.0,
        "min_lifetime_s": 1.0,
        "max_lifetime_s": 960.0,
        "budget": BudgetSpec(max_changed=BUDGET),
        "sample_share": 0.1,
    }
    for name, wander_s in SPEEDS.items():
        spec = DriftSpec(
            num_requests=num_requests, wander_s=wander_s, jump_every_s=5 * wander_s, wander_size=0.15
        )
        stream = make_stream(spec)
        fresh = _truth(predictor, stream)
        for way, settings in (
            ("fixed, 5 s", _fixed(5.0)),
            ("fixed, 60 s", _fixed(60.0)),
            ("adaptive from 60 s", adaptive),
            ("adaptive, certificate 0.05", adaptive | {"max_error": 0.05}),
        ):
            row = run_stream(predictor, stream, fresh, batch=8, prefix=24, **settings)
            found.append({"speed": name, "way": way} | row)
    return found


def measure_certificate(
    predictor: Predictor, num_inputs: int, *, fresh_features: int = 8, seed: int = 0
) -> dict[str, Any]:
    """Displace the last features of random rows; count bounds that are broken, and shares certified."""
    assert predictor.certificate is not None
    draw = np.random.default_rng(seed)
    per_spread = -(-num_inputs // len(SPREADS))
    violations, total, rows_out, tightest = 0, 0, [], 0.0
    for spread in SPREADS:
        within = dict.fromkeys(MAX_ERRORS, 0)
        truly = dict.fromkeys(MAX_ERRORS, 0)
        count = 0
        while count < per_spread:
            many = min(20_000, per_spread - count)
            cached = draw.standard_normal((-(-many // 4), predictor.num_features)).astype(np.float32)
            encodings, anchors = predictor.encoder.encode(cached), predictor.certificate.anchors(cached)
            pick = np.arange(many) // 4
            rows = cached[pick]
            rows[:, -fresh_features:] += (spread * draw.standard_normal((many, fresh_features))).astype(
                np.float32
            )
            bounds = predictor.certificate.bounds(anchors[pick], cached[pick], encodings[pick], rows)
            reused = predictor.head.predict(encodings[pick], rows).astype(np.float64)
            error = np.abs(reused - predictor.head.predict(predictor.encoder.encode(rows), rows))
            violations += int((error > bounds).sum())
            tightest = max(tightest, float((error / bounds).max()))
            for limit in MAX_ERRORS:
                within[limit] += int((bounds <= limit).sum())
                truly[limit] += int((error <= limit).sum())
            count += many
        total += count
        rows_out.append(
            {
                "spread": spread,
                "certified": {f"{limit:g}": within[limit] / count for limit in MAX_ERRORS},
                "truly_within": {f"{limit:g}": truly[limit] / count for limit in MAX_ERRORS},
            }
        )
    return {"num_inputs": total, "violations": violations, "tightest": tightest, "by_spread": rows_out}


def measure_alarms(num_seeds: int, num_compared: int) -> list[dict[str, Any]]:
    """Feed meters with shares below and above the budget; count those that alarm, and how soon."""
    found = []
    for factor in (0.5, 0.8, 1.0, 1.5, 2.0, 5.0):
        firsts = []
        for seed in range(num_seeds):
            draw = random.Random(f"{factor}/{seed}")  # noqa: S311 - a simulation
            meter = make_meter(RiskBudget(max_changed=BUDGET), max_keys=1)
            for number in range(num_compared):
                meter.observe("all", 1.0, 0.0, draw.random() < factor * BUDGET)
                if meter.num_alarms:
                    firsts.append(number + 1)
                    break
        found.append(
            {
                "share_of_budget": factor,
                "alarmed": len(firsts) / num_seeds,
                "median_comparisons": float(np.median(firsts)) if firsts else None,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; write the reports."""
    parser = argparse.ArgumentParser(prog="python -m server.predict.reuse.experiment", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder for the reports")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    chosen = parser.parse_args(arguments)
    scale = 10 if chosen.quick else 1
    predictor = make_builtin()
    logging.getLogger("kvserve").addHandler(logging.NullHandler())  # alarms are what is counted here
    certificate = measure_certificate(predictor, 1_000_000 // scale)
    results: dict[str, Any] = {
        "settings": {"budget": BUDGET, "tolerance": CHANGE_TOLERANCE, "quick": chosen.quick},
        "drift": measure_drift(predictor, 12_000 // scale),
        "adaptive": measure_adaptive(predictor, 120_000 // scale),
        "certificate": certificate,
        "alarms": measure_alarms(400 // scale, 2_000),
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "predict_reuse.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    text = to_markdown(results)
    (chosen.out / "predict_reuse.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 1 if certificate["violations"] else 0


def _fixed(lifetime_s: float) -> dict[str, Any]:
    """Return settings with which nothing adapts."""
    return {
        "lifetime_s": lifetime_s,
        "min_lifetime_s": lifetime_s,
        "max_lifetime_s": lifetime_s,
        "budget": BudgetSpec(max_changed=None),
    }


def _truth(predictor: Predictor, stream: Stream) -> Singles:
    return predictor.head.predict(predictor.encoder.encode(stream.rows), stream.rows)


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else 0.0


if __name__ == "__main__":
    sys.exit(main())
