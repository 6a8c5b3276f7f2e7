"""What can be seen in a message's bytes alone: integers that parsing cuts, and a flood of sub-messages.

Protobuf cuts integers to 32 bits without a word.

An ``int32`` field given 2^40 + 5 parses as 5. A message that was cut so does not serialise to the bytes it
came from, which takes C speed to see; only then are the bytes themselves walked. Bytes may differ for good
reasons as well (another order of fields, defaults written out), so the walk decides. It does not enter
messages that have no such field anywhere below: rows of features cost it nothing.

A million empty sub-messages take two bytes each, and fifty times that once they are parsed. They are counted
before, and only in messages that are long enough to hold too many.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["MAX_MESSAGES", "find_flood", "find_overflow", "varint"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_FIELDS = 100_000
"""Fields walked at most; one that follows is not looked at. Bounds what hostile bytes cost."""
MAX_MESSAGES = 1 << 16
"""Sub-messages in a request. Services have lower limits of their own, which they check once it is parsed."""
_PACKED_INT32 = re.compile(
    rb"(?:[\x00-\x7f]|[\x80-\xff][\x00-\x7f]|[\x80-\xff]{2}[\x00-\x7f]|[\x80-\xff]{3}[\x00-\x7f]"
    rb"|[\x80-\xff]{4}[\x00-\x07]|[\x80-\xff]{4}[\xf8-\xff]\xff{4}\x01)*+"
)
"""Varints from -2^31 to 2^31 - 1; negative ones have ten bytes, of 64 bits."""


def find_flood(descriptor: Any, raw: bytes) -> str | None:
    """Return the path of the field where the sub-messages in ``raw`` become too many, if there is one."""
    if len(raw) < 2 * MAX_MESSAGES:
        return None
    return _flooded(descriptor, memoryview(raw), "", [MAX_MESSAGES, _MAX_FIELDS])


def _flooded(descriptor: Any, data: memoryview, path: str, budget: list[int]) -> str | None:
    position, fields = 0, descriptor.fields_by_number
    while position < len(data) and budget[1] > 0:
        budget[1] -= 1
        tag, position = _read_varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _read_varint(data, position)
        elif kind == _BYTES:
            length, position = _read_varint(data, position)
            field = fields.get(tag >> 3)
            if field is not None and field.message_type is not None:
                budget[0] -= 1
                if budget[0] < 0:
                    return path + str(field.name)
                if length:
                    body = data[position : position + length]
                    found = _flooded(field.message_type, body, f"{path}{field.name}.", budget)
                    if found is not None:
                        return found
            position += length
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        else:  # groups: parsing will say what it thinks of them
            return None
    return None


def find_overflow(message: Message, raw: bytes) -> str | None:
    """Return the path of an ``int32`` field that has more than 32 bits in ``raw``, if there is one."""
    if message.SerializeToString() == raw:
        # Whatever was cut would be shorter. (A value from 2^32 on, cut, never takes the same bytes.)
        return None
    return next(_overflows(message.DESCRIPTOR, memoryview(raw), "", [_MAX_FIELDS]), None)


def _overflows(descriptor: Any, data: memoryview, path: str, budget: list[int]) -> Iterator[str]:
    position = 0
    while position < len(data) and budget[0] > 0:
        budget[0] -= 1
        tag, position = _read_varint(data, position)
        field = descriptor.fields_by_number.get(tag >> 3)
        kind = tag & 7
        is_int32 = field is not None and field.type == FieldDescriptor.TYPE_INT32
        if kind == _VARINT:
            value, position = _read_varint(data, position)
            if field is not None and is_int32 and not _fits(value):
                yield path + field.name
        elif kind == _BYTES:
            length, position = _read_varint(data, position)
            body = data[position : position + length]
            position += length
            if field is None:
                continue
            if is_int32:
                if _PACKED_INT32.fullmatch(body) is None:
                    yield path + field.name
            elif field.type == FieldDescriptor.TYPE_MESSAGE and _has_int32(field.message_type):
                yield from _overflows(field.message_type, body, f"{path}{field.name}.", budget)
        elif kind == _FIXED64:
            position += 8
        elif kind == _FIXED32:
            position += 4
        else:  # groups: unknown fields of an old kind; what follows is not looked at
            return


@lru_cache
def _has_int32(descriptor: Any) -> bool:
    """Say whether a message may hold an ``int32``, itself or anywhere below."""
    waiting, seen = [descriptor], set()
    while waiting:
        message = waiting.pop()
        if message is None or message.full_name in seen:
            continue
        seen.add(message.full_name)
        for field in message.fields:
            if field.type == FieldDescriptor.TYPE_INT32:
                return True
            waiting.append(field.message_type)
    return False


def _fits(value: int) -> bool:
    return value < 2**31 or value >= 2**64 - 2**31


def varint(value: int) -> bytes:
    """Return a number that is not negative as protobuf writes it."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(data) and shift < 70:  # ten bytes: what is longer does not parse
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value & (2**64 - 1), position
