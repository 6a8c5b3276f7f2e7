"""Structured logs: one line per record, whatever is in it.

The front end and the engine process write to the same stream, alike; the engine's lines say so in a field.
Records carry fields by ``extra={...}``. Prompts, outputs and keys are never logged. Control characters are
escaped in both formats, so that no value can begin a line of its own or colour a terminal.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO

__all__ = ["configure_logs"]

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_MAX_VALUE_CHARS = 4096


class _FieldFormatter(logging.Formatter):
    def __init__(self, fields: Mapping[str, object] | None = None) -> None:
        """``fields`` are those of every line."""
        super().__init__()
        self._own_fields = dict(fields or {})

    def fields_of(self, record: logging.LogRecord) -> dict[str, object]:
        own = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        return self._own_fields | own


class JsonFormatter(_FieldFormatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry: dict[str, object] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        entry.update({name: _plain(value) for name, value in self.fields_of(record).items()})
        if record.exc_info:
            entry["exception"] = _cut(self.formatException(record.exc_info), 8 * _MAX_VALUE_CHARS)
        return json.dumps(entry, ensure_ascii=True)


class TextFormatter(_FieldFormatter):
    """``time level message name=value ...``; a traceback follows in the same line, escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        parts = [_time_of(record), f"{record.levelname.lower():7}", _escape(_cut(record.getMessage()))]
        parts += [f"{name}={_escape(str(_plain(value)))}" for name, value in self.fields_of(record).items()]
        if record.exc_info:
            parts.append(
                "exception=" + _escape(_cut(self.formatException(record.exc_info), 8 * _MAX_VALUE_CHARS))
            )
        return " ".join(parts)


def configure_logs(
    *,
    format_name: str,
    level: str,
    stream: TextIO | None = None,
    fields: Mapping[str, object] | None = None,
) -> None:
    """Send all logging of this process to ``stream`` (stderr), as ``text`` or ``json``.

    ``fields`` stand in every line.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(fields) if format_name == "json" else TextFormatter(fields))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for noisy in ("httpx", "httpcore", "filelock", "urllib3", "huggingface_hub", "asyncio", "grpc"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _plain(value: object) -> str | int | float | bool | None:
    if value is None or isinstance(value, int | float | bool):
        return value
    return _cut(str(value))


def _cut(text: str, limit: int = _MAX_VALUE_CHARS) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _time_of(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
