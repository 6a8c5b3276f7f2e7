"""The experiment's results as Markdown: tables, from which the pictures are drawn too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["to_markdown"]


def to_markdown(results: dict[str, Any]) -> str:
    """Return the report."""
    settings, certificate = results["settings"], results["certificate"]
    lines = [
        "# Reuse under drift",
        "",
        f"Changed: on the other side of 0.5, or off by more than {settings['tolerance']:g}.",
        f"Budget of adaptive lifetimes: {settings['budget']:.0%} of the reuses.",
        "",
        "## Fixed lifetimes and key lengths",
        "",
        *_table(
            (
                "drift",
                "K",
                "TTL, s",
                "hit rate, %",
                "changed, %",
                "mean error",
                "CPU, us",
                "p50, us",
                "p95, us",
            ),
            (
                (
                    row["speed"],
                    row["prefix"],
                    f"{row['fixed_lifetime_s']:g}",
                    f"{100 * row['hit_rate']:.1f}",
                    f"{100 * row['risk']:.1f}",
                    f"{row['error']:.4f}",
                    f"{row['cpu_us']:.0f}",
                    f"{row['p50_us']:.0f}",
                    f"{row['p95_us']:.0f}",
                )
                for row in results["drift"]
            ),
        ),
        "",
        "### By speed of drift, K = 24",
        "",
        "<!-- table: reuse-speed -->",
        *_curves("speed", [row for row in results["drift"] if row["prefix"] == 24], ""),
        "",
        "### By K, medium drift",
        "",
        "<!-- table: reuse-prefix -->",
        *_curves("prefix", [row for row in results["drift"] if row["speed"] == "medium"], "K = "),
        "",
        "## Adaptive lifetimes",
        "",
        "The second half of each run; K = 24.",
        "",
        *_table(
            ("drift", "lifetime", "hit rate, %", "changed, %", "lifetime at the end, s", "alarms"),
            (
                (
                    row["speed"],
                    row["way"],
                    f"{100 * row['late_hit_rate']:.1f}",
                    f"{100 * row['late_risk']:.2f}",
                    f"{row['lifetime_s']:g}",
                    row["num_alarms"],
                )
                for row in results["adaptive"]
            ),
        ),
        "",
        "## Certificate",
        "",
        f"{certificate['num_inputs']:,} inputs, {certificate['violations']} violations.",
        f"No error was more than {certificate['tightest']:.0%} of its bound.",
        "The last 8 features are displaced by normal noise.",
        "",
        *_table(
            (
                "noise",
                *(f"certified within {x}, % (truly)" for x in certificate["by_spread"][0]["certified"]),
            ),
            (
                (
                    f"{row['spread']:g}",
                    *(
                        f"{100 * row['certified'][x]:.1f} ({100 * row['truly_within'][x]:.1f})"
                        for x in row["certified"]
                    ),
                )
                for row in certificate["by_spread"]
            ),
        ),
        "",
        "## Alarms",
        "",
        *_table(
            ("true share / budget", "runs with an alarm, %", "median comparisons to it"),
            (
                (
                    f"{row['share_of_budget']:g}",
                    f"{100 * row['alarmed']:.1f}",
                    "-" if row["median_comparisons"] is None else f"{row['median_comparisons']:.0f}",
                )
                for row in results["alarms"]
            ),
        ),
        "",
    ]
    return "\n".join(lines)


def _curves(by: str, rows: list[dict[str, Any]], prefix: str) -> list[str]:
    """Return a table of hit rate, risk and latency against the lifetime, a column for each curve."""
    names = list(dict.fromkeys(row[by] for row in rows))
    measures = (("hit rate", "hit_rate", 100.0), ("changed", "risk", 100.0), ("CPU us", "cpu_us", 1.0))
    cells = {(row["fixed_lifetime_s"], row[by]): row for row in rows}
    return _table(
        ("TTL, s", *(f"{measure}, {prefix}{name}" for measure, _, _ in measures for name in names)),
        (
            (
                f"{lifetime:g}",
                *(
                    f"{scale * cells[lifetime, name][field]:.1f}"
                    for _, field, scale in measures
                    for name in names
                ),
            )
            for lifetime in dict.fromkeys(row["fixed_lifetime_s"] for row in rows)
        ),
    )


def _table(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join('---' for _ in heads)}|",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
