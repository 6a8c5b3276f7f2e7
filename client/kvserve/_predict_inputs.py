"""What predict calls take, and how it becomes messages: texts, pairs of texts, rows of features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from kvserve._fields import refusing
from kvserve._options import TimeoutOptions
from kvserve.v1 import predict_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Buffer
else:
    Buffer = Any  # In the standard library from 3.12 on.

__all__ = [
    "FeatureRows",
    "PredictOptions",
    "PredictRequest",
    "TextInputs",
    "feature_messages",
    "text_messages",
]


class SupportsArray(Protocol):
    """What numpy could make an array of: its own arrays, tensors, data frames."""

    def __array__(self) -> Any: ...


TextInputs: TypeAlias = str | Iterable[str | tuple[str, str]]
"""One text, or several; each of these a text or a pair. A pair on its own is ``[("one", "other")]``."""
FeatureRows: TypeAlias = Buffer | SupportsArray | Iterable[Buffer | Iterable[float]]
"""Rows of numbers: lists, tuples, arrays; or a matrix (a buffer of two dimensions, such as a numpy array)."""

_MATRIX, _ROW = 2, 1
_NOT_ROWS = (str, bytes, bytearray, Mapping)


class ModelOptions(TimeoutOptions, total=False):
    """Which version of a model a call is about."""

    version: str | None
    """A version, or an alias such as "canary". Default: the latest, or the canary for its share of calls."""


class PredictOptions(ModelOptions, total=False):
    """Keyword arguments of ``predict``, ``predict_features`` and ``embed``.

    None and absent mean the same, the server's default, which is named beside each.
    """

    truncate: bool | None
    """Cut what is longer than the model's limit. Default: False, refuse it with ``InvalidArgument``."""
    top_k: int | None
    """Of classifications: how many of the likeliest labels to return, with scores; 0: all. Default: 1."""
    reuse: bool | None
    """False: reuse nothing that was computed for other inputs, and leave nothing behind. Default: True."""
    request_id: str
    """Names the call in logs. Default: the server makes one."""


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """One request of a stream: texts or rows of features. What is None is as in the stream's arguments."""

    texts: TextInputs | None = None
    _: KW_ONLY
    features: FeatureRows | None = None
    model: str | None = None
    version: str | None = None
    truncate: bool | None = None
    top_k: int | None = None
    reuse: bool | None = None
    request_id: str | None = None
    """Its name in the outcome; unique among the stream's requests. None: the stream gives it a number."""


def text_messages(inputs: TextInputs, *, field: str) -> list[pb.TextInput]:
    """Turn texts and pairs into messages. ``field`` is their path in the request.

    Raises TypeError for what is neither, ``InvalidArgument`` for text that is not valid Unicode.
    """
    if isinstance(inputs, str):
        inputs = [inputs]
    elif isinstance(inputs, bytes | bytearray | Mapping) or not isinstance(inputs, Iterable):
        raise TypeError(f"{field}: expected texts or pairs of texts, not {type(inputs).__name__}")
    return [_text_message(item, f"{field}[{position}]") for position, item in enumerate(inputs)]


def _text_message(item: object, field: str) -> pb.TextInput:
    if isinstance(item, str):
        with refusing(f"{field}.text"):
            return pb.TextInput(text=item)
    if isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(part, str) for part in item):
        with refusing(field):
            return pb.TextInput(text=item[0], pair=item[1])
    raise TypeError(f"{field}: expected a text or a pair of two texts, not {_described(item)}")


def _described(item: object) -> str:
    return f"{type(item).__name__} of {len(item)}" if isinstance(item, tuple | list) else type(item).__name__


def feature_messages(rows: FeatureRows, *, field: str) -> list[pb.FeatureRow]:
    """Turn rows of numbers into messages. ``field`` is their path in the request.

    Whatever holds numbers will do: lists, tuples, anything with the buffer protocol, anything that numpy
    takes. They are sent as float32. Raises TypeError for what holds none.
    """
    if isinstance(rows, _NOT_ROWS):
        raise TypeError(f"{field}: expected rows of numbers, not {type(rows).__name__}")
    matrix = _numbers_of(rows, _MATRIX, field)
    if matrix is not None:
        with refusing(field):
            return [pb.FeatureRow(values=row) for row in matrix]
    return [_row_message(row, f"{field}[{position}]") for position, row in enumerate(_iterate(rows, field))]


def _row_message(row: object, field: str) -> pb.FeatureRow:
    if isinstance(row, _NOT_ROWS):
        raise TypeError(f"{field}: expected a row of numbers, not {type(row).__name__}")
    numbers = _numbers_of(row, _ROW, field)
    message = pb.FeatureRow()
    with refusing(f"{field}.values"):
        message.values.extend(_iterate(row if numbers is None else numbers, field))
    return message


def _iterate(rows: object, field: str) -> Iterator[Any]:
    if not isinstance(rows, Iterable):
        # What a row of its own, not inside a list, comes to.
        raise TypeError(f"{field}: expected a row of numbers, not {type(rows).__name__}; one row is [row]")
    return iter(rows)


def _numbers_of(value: object, num_dimensions: int, field: str) -> list[Any] | None:
    """Read a buffer, or what can be made one, at once; None if the value is neither."""
    if isinstance(value, list | tuple):
        return None
    try:
        view = _view_of(value)
    except ValueError as error:  # A buffer whose elements have no format that others could read.
        raise TypeError(f"{field}: {error}; convert it to float32") from None
    if view is None:
        return None
    if view.ndim != num_dimensions:
        wanted = "a matrix; one row is [row]" if num_dimensions == _MATRIX else "a row"
        raise TypeError(f"{field}: has {view.ndim} dimensions, expected {wanted}")
    try:
        numbers: list[Any] = view.tolist()
    except NotImplementedError:
        raise TypeError(f"{field}: elements of format {view.format!r}; convert them to float32") from None
    return numbers


def _view_of(value: Any) -> memoryview | None:
    try:
        return memoryview(value)
    except TypeError:  # Tensors and data frames are no buffers themselves.
        return memoryview(value.__array__()) if hasattr(value, "__array__") else None
