"""From a message to a value of the client's own whose fields have the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from google.protobuf.message import Message

__all__ = ["copy_fields"]

Value = TypeVar("Value")


def copy_fields(value_type: Callable[..., Value], message: Message, **converted: object) -> Value:
    """Make a value from the message's fields of the same names, with ``converted`` in place of some.

    A field that was not sent and knows it (``optional``, or a message) is None.
    """
    values = dict(converted)
    for field in fields(value_type):  # type: ignore[arg-type]
        if field.name not in values:
            value: Any = getattr(message, field.name)
            if message.DESCRIPTOR.fields_by_name[field.name].has_presence:
                value = value if message.HasField(field.name) else None
            values[field.name] = dict(value) if isinstance(value, Mapping) else value
    return value_type(**values)
