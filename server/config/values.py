"""How the text of a setting becomes a value. Each raises ``ValueError`` that says what it must be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = [
    "Parse",
    "integer_between",
    "one_of",
    "parse_bytes",
    "parse_seconds",
    "read_block_size",
    "read_endpoint",
    "read_flag",
    "read_name",
    "read_names",
    "read_path",
    "read_positive_seconds",
    "read_redis_url",
    "read_share",
    "read_canary",
    "read_text",
    "seconds_of_at_least",
]

Parse = Callable[[object], Any]


_SIZE_UNITS = {"": 1, "B": 1}
_SIZE_UNITS |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
_SIZE_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_TIME_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def parse_bytes(value: object) -> int:
    """Return a size: ``4GiB``, ``500 MB``, ``1.5GiB`` or a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    units = {name.lower(): factor for name, factor in _SIZE_UNITS.items()}
    if found is None or found[2].lower() not in units or isinstance(value, bool):
        raise ValueError("must be a size such as 4GiB or 500MB")
    size = int(float(found[1]) * units[found[2].lower()])
    if not 1 <= size <= 1 << 50:
        raise ValueError("must be between 1 byte and 1024 TiB")
    return size


def parse_seconds(value: object) -> float:
    """Return a duration in seconds: ``10m``, ``1.5h``, ``250ms`` or a number of seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value))
    if found is None or found[2] not in _TIME_UNITS or isinstance(value, bool):
        raise ValueError("must be a duration such as 30s, 10m or 2h")
    seconds = float(found[1]) * _TIME_UNITS[found[2]]
    if seconds > 10 * 366 * 86_400:
        raise ValueError("must be at most 10 years")
    return seconds


def read_positive_seconds(value: object) -> float:
    """Return a duration of more than 0 seconds."""
    seconds = parse_seconds(value)
    if seconds <= 0:
        raise ValueError("must be more than 0")
    return seconds


def seconds_of_at_least(low: float) -> Parse:
    """Return a reader of durations that are not shorter than ``low`` seconds."""

    def parse(value: object) -> float:
        seconds = parse_seconds(value)
        if seconds < low:
            raise ValueError(f"must be at least {low:g}s")
        return seconds

    return parse


def integer_between(low: int, high: float = math.inf) -> Parse:
    """Return a reader of whole numbers between ``low`` and ``high``, both included."""

    def parse(value: object) -> int:
        text = str(value).strip()
        if isinstance(value, bool | float) or re.fullmatch(r"[+-]?\d{1,18}", text) is None:
            raise ValueError("must be a whole number")
        if not low <= int(text) <= high:
            raise ValueError(
                f"must be at least {low}" if high == math.inf else f"must be between {low} and {high}"
            )
        return int(text)

    return parse


def one_of(*names: str) -> Parse:
    """Return a reader of one of ``names``."""

    def parse(value: object) -> str:
        # YAML reads a bare on and off as booleans.
        text = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value).strip().lower()
        if text not in names:
            raise ValueError(f"must be {', '.join(names[:-1])} or {names[-1]}")
        return text

    return parse


def read_text(value: object) -> str:
    """Return a printable text that is not empty."""
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError("must be a text")
    return value


def read_name(value: object) -> str:
    """Return a name that can stand in a metric, a log and a path without quoting."""
    text = read_text(value)
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,255}", text) is None or ".." in text:
        raise ValueError("must be a name of letters, digits and . _ : @ / -")
    return text


def read_path(value: object) -> Path:
    """Return a path; ``~`` is the home folder."""
    return Path(read_text(value)).expanduser()


def read_flag(value: object) -> bool:
    """Return true or false."""
    text = str(value).strip().lower()
    if text not in {"true", "false", "1", "0", "yes", "no", "on", "off"}:
        raise ValueError("must be true or false")
    return text in {"true", "1", "yes", "on"}


def read_block_size(value: object) -> int:
    """Return a power of two."""
    size: int = integer_between(1, 256)(value)
    if size & (size - 1):
        raise ValueError("must be a power of two")
    return size


def read_endpoint(value: object) -> str:
    """Return the address of a collector."""
    text = read_text(value)
    if re.fullmatch(r"https?://[^\s/]+", text) is None:
        raise ValueError("must look like http://host:port")
    return text


def read_names(value: object) -> tuple[str, ...]:
    """Return names: a YAML list, or text with commas between them."""
    parts = value if isinstance(value, list) else str(value).split(",")
    return tuple(read_name(str(part).strip()) for part in parts if str(part).strip())


def read_share(value: object) -> float:
    """Return a share: ``25%`` or ``0.25``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(value))
    share = math.nan if found is None else float(found[1]) / (100 if found[2] else 1)
    if isinstance(value, bool) or not 0 < share <= 1:
        raise ValueError("must be a share such as 25% or 0.25")
    return share


def read_canary(value: object) -> tuple[str, float]:
    """Return a policy and the share of namespaces that run it: ``arc:10%``."""
    name, colon, share = read_text(value).rpartition(":")
    if not colon:
        raise ValueError("must be a policy and a share, such as arc:10%")
    wanted = read_share(share)
    if wanted > 0.5:
        raise ValueError("must leave at least half of the namespaces to the live policy")
    return read_name(name), wanted


def read_redis_url(value: object) -> str:
    """Return the address of a Redis server."""
    url = str(value)
    if re.fullmatch(r"(redis|rediss|unix)://\S+", url) is None:
        raise ValueError("must look like redis://host:6379/0, rediss://... or unix:///path")
    return url
