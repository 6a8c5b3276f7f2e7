"""Times and sizes, as people write and read them."""

from __future__ import annotations

import argparse
import re

__all__ = ["seconds", "show_bytes", "show_rate", "show_seconds"]

_TIME_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """Read ``90s``, ``10m``, ``1.5h``, ``250ms``, ``7d`` or a number of seconds: the type of an option."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.ASCII)
    if found is None or found[2] not in _TIME_UNITS:
        raise argparse.ArgumentTypeError(f"must be a time such as 30s, 10m or 2h; not {text!r}")
    return float(found[1]) * _TIME_UNITS[found[2]]


def show_seconds(duration_s: float | None) -> str:
    """Return a time in at most two units; a dash for None."""
    if duration_s is None:
        return "-"
    if duration_s < 1:
        return f"{duration_s * 1000:.0f}ms"
    if duration_s < 60:
        return f"{duration_s:.0f}s" if duration_s >= 10 else f"{duration_s:.1f}s"
    minutes, rest_s = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes}m{rest_s:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 48 else f"{hours // 24}d{hours % 24:02}h"


def show_bytes(size: float) -> str:
    """Return a size in binary units, three digits or so."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def show_rate(share: float | None) -> str:
    """Return a share as a percentage; a dash for None."""
    return "-" if share is None else f"{share * 100:.1f}%"
