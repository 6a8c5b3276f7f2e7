"""What an experiment says: figures, each beside its peer, its limit and its target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

__all__ = ["Figure", "Report", "markdown_lines"]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One measured number. ``target`` bounds ``value`` from below, or from above where lower is better."""

    experiment: str
    shape: str
    name: str
    value: float
    unit: str
    target: float | None = None
    lower_is_better: bool = False
    ours: float | None = None
    """What ``value`` is made of, where it is a ratio."""
    other: float | None = None
    """The peer's figure, or the limit."""
    other_name: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Say whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


class Report(msgspec.Struct, kw_only=True):
    """One run of the benchmark."""

    started_at: str
    mode: str
    machine: dict[str, str | int | float]
    figures: list[Figure] = []
    details: dict[str, object] = {}
    """Everything the figures were made of, by experiment."""
    tables: dict[str, str] = {}
    """In Markdown, by experiment: what is better read as a table of its own."""
    problems: list[str] = []
    """Experiments that could not be run, and why."""
    skipped: list[str] = []
    """Experiments for which something was not at hand, and what."""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    sign = "≤" if figure.lower_is_better else "≥"
    return f"{sign} {_number(figure.target)} {'met' if figure.is_met else '**missed**'}"


def _rows(figures: Iterable[Figure]) -> Iterator[str]:
    yield "| experiment | shape | figure | value | target | ours | beside | note |"
    yield "|---|---|---|---:|---|---:|---:|---|"
    for f in figures:
        beside = f"{_number(f.other)} {f.other_name}".strip()
        yield (
            f"| {f.experiment} | {f.shape} | {f.name} | {_number(f.value)} {f.unit} | {_target(f)} "
            f"| {_number(f.ours)} | {beside} | {f.note} |"
        )


def markdown_lines(report: Report) -> Iterator[str]:
    """Yield the report as Markdown."""
    yield "# Measurements"
    yield ""
    yield f"{report.started_at}, {report.mode} mode. Ratios are of medians over runs in alternating order."
    yield ""
    yield "| machine | |"
    yield "|---|---|"
    for name, value in report.machine.items():
        yield f"| {name} | {value if isinstance(value, str) else _number(value)} |"
    yield ""
    yield from _rows(report.figures)
    for name, table in report.tables.items():
        yield from ("", f"## {name}", "", table)
    if report.problems:
        yield ""
        yield "Not measured:"
        yield ""
        for problem in report.problems:
            yield f"- {problem}"
    if report.skipped:
        yield ""
        yield "Left out:"
        yield ""
        for reason in report.skipped:
            yield f"- {reason}"
