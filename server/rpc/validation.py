"""Checks of single values, collecting every violation instead of stopping at the first.

Plain Python values in, field paths out: no protobuf here. What proto3 itself loses cannot be checked from
values: an ``int32`` sent as 2^32 + 5 arrives as 5 (``server.rpc.wire`` looks for that in the bytes).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

from server.rpc.errors import FieldViolation, InvalidArgument

__all__ = ["MAX_LIFETIME_S", "PlainDuration", "Violations", "is_namespace_id"]

MAX_LIFETIME_S = 10 * 365.25 * 86_400
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]*")
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PREFIX_ID = re.compile(r"[0-9a-f]{8,64}")
_NAMESPACE = re.compile(r"[0-9a-f]{16}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_POLICY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def is_namespace_id(value: str) -> bool:
    """Say whether this has the form of a namespace's id."""
    return _NAMESPACE.fullmatch(value) is not None


class PlainDuration(Protocol):
    """A ``google.protobuf.Duration``, as it stands in a message."""

    @property
    def seconds(self) -> int: ...
    @property
    def nanos(self) -> int: ...


class Violations:
    """What is wrong with one request. Check methods return whether the value may be used further."""

    def __init__(self) -> None:
        self._found: list[FieldViolation] = []

    def add(self, field: str, description: str) -> bool:
        """Record a violation; return False, for the tail of a check."""
        self._found.append(FieldViolation(field, description))
        return False

    def __len__(self) -> int:
        return len(self._found)

    def raise_if_any(self) -> None:
        """Raise :class:`InvalidArgument` with everything found so far."""
        if self._found:
            raise InvalidArgument(self._found)

    def integer(self, field: str, value: int, *, low: int, high: int) -> bool:
        """Check ``low <= value <= high``."""
        if low <= value <= high:
            return True
        return self.add(field, f"must be between {low} and {high}")

    def number(self, field: str, value: float, *, low: float, high: float, exclude_low: bool = False) -> bool:
        """Check that a float is finite and in ``[low, high]``, or ``(low, high]``."""
        if not math.isfinite(value):
            return self.add(field, "must be a finite number")
        if value > high or value < low or (exclude_low and value == low):
            opening = "(" if exclude_low else "["
            return self.add(field, f"must be in {opening}{low:g}, {high:g}]")
        return True

    def printable(self, field: str, value: str, *, max_chars: int) -> bool:
        """Check a name: short, no control, formatting (bidirectional marks) or separator characters."""
        if len(value) > max_chars:
            return self.add(field, f"must have at most {max_chars} characters")
        if not value.isprintable():
            return self.add(field, "must have printable characters only")
        return True

    def model_name(self, field: str, value: str) -> bool:
        """Check that a model's name could be one: no blanks, no way out of a folder."""
        if not self.printable(field, value, max_chars=256):
            return False
        if value and (_MODEL_NAME.fullmatch(value) is None or ".." in value):
            return self.add(field, "is not a model name")
        return True

    def role(self, field: str, value: str) -> bool:
        """Check a chat role: an identifier, so that it cannot smuggle control tokens into a template."""
        if _ROLE.fullmatch(value) is None:
            return self.add(field, "must be 1 to 64 letters, digits, '_', '.' or '-'")
        return True

    def count(self, field: str, value: int, *, high: int) -> bool:
        """Check the length of a repeated field."""
        if value <= high:
            return True
        return self.add(field, f"must have at most {high} items")

    def token_ids(self, field: str, ids: Sequence[int], *, vocab_size: int) -> bool:
        """Check that every id is in the vocabulary; names the first that is not."""
        if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
            return True
        index = next(i for i, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
        return self.add(
            f"{field}[{index}]", f"must be between 0 and {vocab_size - 1}, the model's vocabulary"
        )

    def distinct(self, field: str, values: Sequence[object]) -> bool:
        """Check that no value occurs twice."""
        if len(set(values)) == len(values):
            return True
        return self.add(field, "must not contain duplicates")

    def duration(self, field: str, seconds: int, nanos: int) -> float | None:
        """Check a ``google.protobuf.Duration`` of a lifetime; return its seconds if it is good."""
        if not -999_999_999 <= nanos <= 999_999_999 or (seconds and nanos and (seconds < 0) != (nanos < 0)):
            self.add(field, "is not a valid duration")
            return None
        total_s = seconds + nanos * 1e-9
        if not 0 < total_s <= MAX_LIFETIME_S:
            self.add(field, "must be more than 0 and at most 10 years")
            return None
        return total_s

    def age(self, field: str, value: PlainDuration) -> float | None:
        """Check a duration of which 0 is as good as any; return its seconds if it is good."""
        if value.seconds == 0 and value.nanos == 0:
            return 0.0
        return self.duration(field, value.seconds, value.nanos)

    def prefix_id(self, field: str, value: str) -> bool:
        """Check the id of a prefix, or the beginning of one."""
        if _PREFIX_ID.fullmatch(value) is None:
            return self.add(field, "must be 8 to 64 hexadecimal digits, in lower case")
        return True

    def namespace(self, field: str, value: str) -> bool:
        """Check the id of a namespace; empty stands for all."""
        if value and not is_namespace_id(value):
            return self.add(field, "must be 16 hexadecimal digits, in lower case, or a tenant's name")
        return True

    def plain_name(self, field: str, value: str) -> bool:
        """Check a name that becomes a folder's: no separator, nothing hidden, no way up."""
        if _PLAIN_NAME.fullmatch(value) is None or ".." in value or value.endswith("."):
            return self.add(
                field, "must be 1 to 128 letters, digits, '.', '_' or '-', and begin with a letter or digit"
            )
        return True

    def policy_name(self, field: str, value: str) -> bool:
        """Check that this could be an eviction policy's name."""
        if _POLICY_NAME.fullmatch(value) is None:
            return self.add(field, "is not the name of a policy")
        return True

    def choice(self, field: str, value: str, choices: Sequence[str]) -> bool:
        """Check that a name is empty or one of those known."""
        if value and value not in choices:
            return self.add(field, f"must be {', '.join(choices[:-1])} or {choices[-1]}")
        return True

    def enum(self, field: str, value: int, known: Sequence[int]) -> bool:
        """Check an enum's value: proto3 lets unknown ones through."""
        if value not in known:
            return self.add(field, "is not a known value")
        return True
