"""Reading traces: one request a line (Mooncake's format), or agent sessions as JSON files or a folder.

Nothing in a trace is trusted: every field is checked, and an error names the file's line or request.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

__all__ = ["LINE_BLOCK_TOKENS", "Trace", "TraceError", "TraceRequest", "read_trace"]

LINE_BLOCK_TOKENS = 512
"""What one id stands for in a trace of lines."""
MAX_TOKENS = 1 << 31
MAX_LINE_BYTES = 1 << 26


class TraceError(ValueError):
    """A trace cannot be read. The text is for people and names the place."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Times are seconds from the trace's beginning."""

    time_s: float
    session: int
    """Ids of different sessions have nothing to do with each other."""
    num_tokens: int
    num_output_tokens: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival."""

    requests: list[TraceRequest]
    block_tokens: int


def read_trace(path: Path, *, block_tokens: int | None = None) -> Trace:
    """Read a trace; raise ``TraceError``. ``block_tokens`` overrides what the trace says of its blocks."""
    try:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise TraceError(f"{path}: no .json files in this folder")
        if path.is_dir() or is_session(path):
            return read_sessions(files, block_tokens)
        requests = list(read_lines(path))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    if not requests:
        raise TraceError(f"{path}: the trace is empty")
    return Trace(in_order(requests), block_tokens or LINE_BLOCK_TOKENS)


def in_order(requests: list[TraceRequest]) -> list[TraceRequest]:
    if all(a.time_s <= b.time_s for a, b in pairwise(requests)):
        return requests
    return sorted(requests, key=lambda request: request.time_s)


def is_session(path: Path) -> bool:
    """Say whether a file is one JSON object with a list of requests, by its first line."""
    with path.open(encoding="utf-8") as file:
        head = file.read(4096).lstrip()
    return head.startswith("{") and '"hash_ids"' not in head.split('"requests"')[0] and '"requests"' in head


def read_lines(path: Path) -> Iterator[TraceRequest]:
    """Yield the requests of a trace of lines."""
    with path.open(encoding="utf-8") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            fields = parse(line, place)
            timestamp_ms = number_of(fields, "timestamp", place)
            yield TraceRequest(
                timestamp_ms / 1000.0,
                0,
                integer_of(fields, "input_length", place),
                integer_of(fields, "output_length", place) if "output_length" in fields else 0,
                ids_of(fields, place),
            )


def read_sessions(files: list[Path], block_tokens: int | None) -> Trace:
    """Read agent sessions; all begin at 0 and run side by side."""
    requests, sizes = [], set()
    for session, path in enumerate(files):
        document = parse(path.read_text(encoding="utf-8"), str(path))
        entries = document.get("requests")
        if not isinstance(entries, list):
            raise TraceError(f"{path}: requests is not a list")
        sizes.add(integer_of(document, "block_size", str(path)))
        for index, fields in enumerate(entries):
            place = f"{path}, request {index + 1}"
            if not isinstance(fields, dict):
                raise TraceError(f"{place}: not an object")
            if "hash_ids" not in fields:
                continue  # a step of the agent without a prompt of its own
            requests.append(
                TraceRequest(
                    number_of(fields, "t", place),
                    session,
                    integer_of(fields, "in", place),
                    integer_of(fields, "out", place) if "out" in fields else 0,
                    ids_of(fields, place),
                )
            )
    if len(sizes) > 1:
        raise TraceError(f"{files[0].parent}: the files' block sizes differ: {sorted(sizes)}")
    size = sizes.pop()
    if size < 1:
        raise TraceError(f"{files[0]}: block_size must be at least 1")
    if not requests:
        raise TraceError(f"{files[0]}: the trace is empty")
    return Trace(in_order(requests), block_tokens or size)


def parse(text: str, place: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{place}: not valid JSON") from error
    if not isinstance(fields, dict):
        raise TraceError(f"{place}: not an object")
    return fields


def number_of(fields: dict[str, Any], name: str, place: str) -> float:
    """Return a field that is a time: a finite number from 0."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TraceError(f"{place}: {name} is missing or not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise TraceError(f"{place}: {name} must be finite and not negative")
    return number


def integer_of(fields: dict[str, Any], name: str, place: str) -> int:
    """Return a field that is a number of tokens."""
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TraceError(f"{place}: {name} is missing or not an integer")
    if not 0 <= value <= MAX_TOKENS:
        raise TraceError(f"{place}: {name} must be from 0 to {MAX_TOKENS}")
    return value


def ids_of(fields: dict[str, Any], place: str) -> tuple[int, ...]:
    value = fields.get("hash_ids")
    if not isinstance(value, list):
        raise TraceError(f"{place}: hash_ids is missing or not a list")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise TraceError(f"{place}: hash_ids must be integers from 0")
    return tuple(value)
