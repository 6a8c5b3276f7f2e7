"""Rows of features as people have them: numbers on the command line, CSV, lines of JSON."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_features"]


def read_features(source: str) -> list[list[float]]:
    """Read rows: ``source`` is a row of numbers, a file's name, or "-" for standard input.

    A file has a row on each line: numbers with commas, or JSON (a row, a list of rows, or an object with
    either as ``features``). A first line of CSV without any number is taken for a header. Raises
    ValueError, with the line, for what is no row; OSError for a file that can't be read.
    """
    try:
        return [_numbers(source.replace(",", " ").split())]
    except ValueError:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    rows = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows += list(_rows_of_line(line, is_first=number == 1))
        except ValueError as error:
            raise ValueError(f"features, line {number}: {error}") from None
    if not rows:
        raise ValueError("features: no row in there")
    return rows


def _rows_of_line(line: str, *, is_first: bool) -> Iterator[list[float]]:
    if line.lstrip().startswith(("[", "{")):
        yield from _rows_of_json(json.loads(line))
        return
    [cells] = csv.reader([line])
    if is_first and not any(map(_is_number, cells)):
        return
    yield _numbers(cells)


def _rows_of_json(value: Any) -> Iterator[list[float]]:
    if isinstance(value, dict):
        if "features" not in value:
            raise ValueError("an object needs features")
        value = value["features"]
    if not isinstance(value, list):
        raise ValueError("expected a list of numbers")  # noqa: TRY004  # wrong input, not a wrong program
    for row in value if value and isinstance(value[0], list) else [value]:
        if not isinstance(row, list):
            raise ValueError("expected a list of numbers")  # noqa: TRY004
        yield _numbers(row)


def _numbers(cells: Sequence[Any]) -> list[float]:
    if not cells:
        raise ValueError("no numbers")
    numbers = []
    for cell in cells:
        if isinstance(cell, bool) or not _is_number(cell):
            raise ValueError(f"{cell!r} is no number")
        numbers.append(float(cell))
    return numbers


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True
