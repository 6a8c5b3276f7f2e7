"""What ``kvctl`` writes: answers to standard output, everything about them to standard error."""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import kvserve
from kvserve._config import resolve_config
from kvserve._results import GenerateResult, Restore

__all__ = [
    "complain",
    "describe_error",
    "harmless",
    "note",
    "plain",
    "say",
    "stats_line",
    "table",
    "write_json",
]


_HARMLESS = dict.fromkeys((*range(32), *range(127, 160)), "�")
for _code in map(ord, "\n\t"):
    del _HARMLESS[_code]


def say(text: str, *, end: str = "\n") -> None:
    """Write to standard output at once; to a terminal without the control characters that could steer it."""
    sys.stdout.write((text.translate(_HARMLESS) if sys.stdout.isatty() else text) + end)
    sys.stdout.flush()


def harmless(text: str) -> str:
    """Return text of somebody else's on one line, without characters that could steer a terminal."""
    return " ".join(text.translate(_HARMLESS).split())


def note(text: str) -> None:
    """Write a line beside the answer, dim on a terminal."""
    dim = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    sys.stderr.write(f"\x1b[2m{text}\x1b[0m\n" if dim else text + "\n")
    sys.stderr.flush()


def complain(text: str) -> None:
    """Write an error, on one line."""
    sys.stderr.write(f"kvctl: {' '.join(text.split())}\n")


def describe_error(error: kvserve.Error, *, target: str | None) -> str:
    """Say what went wrong, for a user of the command."""
    if isinstance(error, kvserve.Unavailable):
        return f"{resolve_config(target, {}).target} is unavailable: {error.message}"
    text = error.message
    missing = [v for v in error.violations if v.field not in text or v.description not in text]
    if missing:
        text += "; " + "; ".join(f"{violation.field}: {violation.description}" for violation in missing)
    if error.retry_after_s is not None:
        text += f" (try again in {error.retry_after_s:g} s)"
    return text


def stats_line(result: GenerateResult, *, first_token_s: float | None, elapsed_s: float) -> str:
    """Summarise an answer: where the prompt came from, how long the first token took, how fast the rest was.

    ``first_token_s`` and ``elapsed_s`` are measured here, from opening the call.
    """
    usage = result.usage
    prompt = f"prompt {usage.prompt_tokens} tokens, {usage.cached_tokens} cached"
    if usage.restored_tokens:
        prompt += f" ({usage.restored_tokens} restored)"
    parts = [prompt]
    if result.timings.restore is not None:
        parts.append(_restore_text(result.timings.restore))
    if first_token_s is not None:
        server_ms = result.timings.first_token_s * 1000
        parts.append(f"first token {first_token_s * 1000:.1f} ms (server {server_ms:.1f} ms)")
        rest_s = elapsed_s - first_token_s
        speed = (
            f" at {(usage.generated_tokens - 1) / rest_s:.1f}/s"
            if usage.generated_tokens > 1 and rest_s > 0
            else ""
        )
        parts.append(f"{usage.generated_tokens} tokens{speed}")
    parts.append(str(result.finish_reason))
    return "[" + " | ".join(parts) + "]"


def _restore_text(restore: Restore) -> str:
    expected = (
        f"expected {restore.expected_fetch_s * 1000:.1f} ms,"
        f" computing {restore.expected_recompute_s * 1000:.1f} ms"
    )
    if restore.decision is not kvserve.RestoreDecision.FETCH:
        return f"{restore.found_tokens} tokens in {restore.tier} left there: {expected}"
    # A server before the cap counted the hold from its beginning, which may be before the fetch's.
    wait_s = min(restore.wait_s, restore.fetch_s)
    waited = f"{wait_s * 1000:.1f} ms of it waited for" if wait_s else "none of it waited for"
    return (
        f"restored {restore.restored_tokens} of {restore.found_tokens} tokens from {restore.tier}"
        f" in {restore.fetch_s * 1000:.1f} ms ({waited}; {expected})"
    )


def write_json(value: object) -> None:
    """Write one value as one line of JSON."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def plain(value: Any) -> Any:
    """Turn a result into what JSON knows: fields by name, ids as text."""
    if isinstance(value, kvserve.PrefixId):
        return value.value
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, array):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align columns; a name in the header that begins with ">" has its column flush right."""
    names = [name.removeprefix(">") for name in header]
    cells = [names, *(list(map(harmless, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name.startswith(">") else cell.ljust(width)
            for name, cell, width in zip(header, row, widths, strict=True)
        ).rstrip()
        for row in cells
    )
