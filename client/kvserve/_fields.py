"""Filling request messages, one field at a time, naming the field that can't hold what it is given.

Only what can't be written into a message is refused with ``InvalidArgument``; ranges are the server's to
judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from kvserve._errors import FieldViolation, InvalidArgument
from kvserve._options import ChatMessage, Messages
from kvserve.v1 import common_pb2

__all__ = ["check_one_input", "check_seconds", "fill_chat", "fill_duration", "refusing", "set_field"]


def set_field(message: Message, name: str, value: object, *, prefix: str = "") -> None:
    """Fill one field; None leaves it absent."""
    if value is not None:
        with refusing(prefix + name):
            setattr(message, name, value)


def fill_duration(duration: Duration, seconds: float | None, *, field: str) -> None:
    """Fill a duration; None leaves it absent."""
    if seconds is not None:
        with refusing(field):
            duration.FromNanoseconds(round(seconds * 1e9))
        duration.SetInParent()  # Zero seconds are something else than no duration.


def fill_chat(chat: common_pb2.Chat, messages: Messages, add_generation_prompt: bool | None) -> None:
    """Fill in a conversation."""
    chat.SetInParent()
    for position, message in enumerate(messages):
        with refusing(f"chat.messages[{position}]"):
            if isinstance(message, ChatMessage):
                chat.messages.add(role=message.role, content=message.content)
            elif set(message) == {"role", "content"}:
                chat.messages.add(role=message["role"], content=message["content"])
            else:
                raise TypeError("expected a ChatMessage or a mapping with the keys role and content")
    set_field(chat, "add_generation_prompt", add_generation_prompt, prefix="chat.")


def check_one_input(method: str, **inputs: object) -> None:
    """Raise TypeError unless exactly one kind of prompt is given."""
    given = [name for name, value in inputs.items() if value is not None]
    if len(given) != 1:
        raise TypeError(
            f"{method}() takes exactly one of {', '.join(inputs)}; got {', '.join(given) or 'none'}"
        )


def check_seconds(name: str, seconds: float | None, *, is_zero_allowed: bool = True) -> None:
    """Raise ValueError for a time that no clock can show: negative, infinite, not a number."""
    if seconds is None:
        return
    is_right = math.isfinite(seconds) and (seconds >= 0 if is_zero_allowed else seconds > 0)
    if not is_right:
        raise ValueError(f"{name} must be {'at least' if is_zero_allowed else 'above'} 0 seconds")


@contextmanager
def refusing(field: str) -> Iterator[None]:
    """Name the field of a value that a message can't hold: out of its range, not text, wrong type."""
    try:
        yield
    except UnicodeEncodeError:
        raise _invalid(field, "is not valid Unicode text") from None
    except (ValueError, OverflowError) as error:
        raise _invalid(field, str(error)) from None
    except TypeError as error:
        raise TypeError(f"{field}: {error}") from None


def _invalid(field: str, description: str) -> InvalidArgument:
    return InvalidArgument(f"{field}: {description}", violations=[FieldViolation(field, description)])
