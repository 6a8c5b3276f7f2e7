"""Eviction policies on a recorded trace, at eight cache sizes, through the policy code that serves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from loadgen.experiments.figures import Figure
from loadgen.experiments.processes import run_json

__all__ = ["CAPACITIES_TOKENS", "Simulated", "measure_policies", "policy_names", "policy_table"]

CAPACITIES_TOKENS = (260_000, 500_000, 1_000_000, 2_000_000, 3_000_000, 6_500_000, 13_000_000, 26_000_000)
BEST, BASELINE, BOUND = "best", "lru", "optimal"
TARGET_EVENTS_PER_S = 50_000.0
ASKED_AT = ("mooncake_synthetic.jsonl", 3_000_000)
ASKED_RATE = 37.6
"""A quarter of the way from LRU to the bound; at other sizes and on other traces LRU is the target."""


class Simulated(msgspec.Struct, frozen=True, kw_only=True):
    """What ``kvcore.simulate`` says of one policy at one size."""

    policy: str
    capacity_tokens: int
    token_hit_rate: float
    """Percent."""
    request_hit_rate: float
    events_per_s: float


def measure_policies(
    trace: Path, *, capacities: Sequence[int] = CAPACITIES_TOKENS, timeout_s: float
) -> tuple[list[Figure], dict[str, object]]:
    """Return our policy beside LRU and the clairvoyant bound at every size, and the speed of the replay."""
    table: dict[str, list[Simulated]] = {}
    for name in policy_names(timeout_s):
        sizes = ["--policy", name, "--capacity-tokens", ",".join(map(str, capacities)), "--json"]
        said = run_json(["kvcore.simulate", str(trace), *sizes], timeout_s=timeout_s)
        # One object for one size, a list for several.
        table[name] = msgspec.convert(said if isinstance(said, list) else [said], list[Simulated])
    figures = [
        _hit_rate_figure(trace, capacity, *(table[name][index] for name in (BEST, BASELINE, BOUND)))
        for index, capacity in enumerate(capacities)
    ]
    slowest = min((each for rows in table.values() for each in rows), key=lambda each: each.events_per_s)
    figures.append(
        Figure(
            experiment="eviction policies",
            shape=trace.name,
            name="block events a second, the slowest policy and size",
            value=slowest.events_per_s,
            unit="events/s",
            target=TARGET_EVENTS_PER_S,
            note=f"{slowest.policy} at {slowest.capacity_tokens:,} tokens",
        )
    )
    return figures, {"table": table, "markdown": policy_table(table)}


def policy_names(timeout_s: float) -> list[str]:
    """Return the policies that the simulator names, ours, the baseline and the bound among them."""
    listed = run_json(["kvcore.simulate", "--policy", "list", "--json"], timeout_s=timeout_s)
    return list(dict.fromkeys([*listed, BASELINE, BEST, BOUND]))


def policy_table(table: dict[str, list[Simulated]]) -> str:
    """Return the token hit rates as Markdown: a row for each policy, a column for each size."""
    capacities = [each.capacity_tokens for each in next(iter(table.values()))]
    lines = [
        f"| token hit rate, % | {' | '.join(f'{c / 1e6:.2f} M' for c in capacities)} | events/s |",
        f"|---|{'---:|' * (len(capacities) + 1)}",
    ]
    for name, rows in table.items():
        rates = " | ".join(f"{each.token_hit_rate:.1f}" for each in rows)
        lines.append(f"| {name} | {rates} | {min(each.events_per_s for each in rows):,.0f} |")
    return "\n".join(lines)


def _hit_rate_figure(
    trace: Path, capacity: int, ours: Simulated, baseline: Simulated, bound: Simulated
) -> Figure:
    """Never below LRU; and at the size that others are known at, what was asked for."""
    is_asked = (trace.name, capacity) == ASKED_AT
    return Figure(
        experiment="eviction policies",
        shape=trace.name,
        name=f"token hit rate of the best policy, {capacity / 1e6:.2f} M tokens",
        value=ours.token_hit_rate,
        unit="%",
        target=ASKED_RATE if is_asked else baseline.token_hit_rate,
        other=bound.token_hit_rate,
        other_name="% clairvoyant",
        note=f"LRU: {baseline.token_hit_rate:.1f}%" + ("" if is_asked else ", the target"),
    )
