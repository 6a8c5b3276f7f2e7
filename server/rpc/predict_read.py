"""Read the requests of ``predict.proto``: cheap checks first, all violations reported together.

Repeated fields are counted before anything is made of them. Rows of features never become Python numbers:
packed floats stand in the serialised message as they travel to the predict process, little-endian.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import lru_cache

import msgspec
import numpy as np

from kvserve.v1 import predict_pb2 as pb
from server.predict.messages import Inputs, Task, TextItem
from server.rpc.validation import Violations
from server.rpc.wire import varint

__all__ = ["PredictAsk", "read_embed", "read_model_request", "read_predict"]

MAX_REQUEST_ID_CHARS = 128
MAX_TEXT_CHARS = 1 << 20
MAX_TOP_K = 10_000
_PACKED_FIELD_1 = b"\x0a"
"""Tag of field 1 with a length: ``FeatureRows.rows``, ``FeatureRow.values``."""
_FLOAT = np.dtype("<f4")


class PredictAsk(msgspec.Struct, frozen=True, kw_only=True):
    """A call's inputs and what is to be done with them, all valid by themselves."""

    model: str
    """Empty: the only one that is served."""
    version: str
    inputs: Inputs
    request_id: str
    """Never empty: drawn by the server where the client gave none."""
    inputs_path: str
    """Field with all inputs, and the repeated one of them: for errors that the model finds."""
    item_path: str
    task: Task | None = None
    truncate: bool = False
    reuse: bool = True
    top_k: int = 1


def read_predict(request: pb.PredictRequest, *, max_inputs: int) -> PredictAsk:
    """Validate. Raises :class:`InvalidArgument` with every violation."""
    violations = _names(request)
    kind = request.WhichOneof("input")
    options = request.options if request.HasField("options") else None
    top_k = 1
    if options is not None and options.HasField("top_k"):
        top_k = options.top_k
        violations.integer("options.top_k", top_k, low=0, high=MAX_TOP_K)
    inputs = Inputs()
    item_path = ""
    if kind == "features":
        item_path = "features.rows"
        if _count(violations, item_path, len(request.features.rows), max_inputs):
            inputs = _read_rows(request.features, violations)
    elif kind == "texts":
        item_path = "texts.items"
        if _count(violations, item_path, len(request.texts.items), max_inputs):
            inputs = _read_texts(request.texts.items, item_path, violations)
    else:
        violations.add("input", "one of texts and features is required")
    violations.raise_if_any()
    return PredictAsk(
        model=request.model,
        version=request.version,
        inputs=inputs,
        request_id=request.request_id or f"req-{secrets.token_hex(8)}",
        inputs_path=kind or "",
        item_path=item_path,
        truncate=options is not None and options.truncate,
        reuse=options.reuse if options is not None and options.HasField("reuse") else True,
        top_k=top_k,
    )


def read_embed(request: pb.EmbedRequest, *, max_inputs: int) -> PredictAsk:
    """Validate. Raises :class:`InvalidArgument` with every violation."""
    violations = _names(request)
    inputs = Inputs()
    if _count(violations, "inputs", len(request.inputs), max_inputs):
        inputs = _read_texts(request.inputs, "inputs", violations)
    violations.raise_if_any()
    return PredictAsk(
        model=request.model,
        version=request.version,
        inputs=inputs,
        request_id=request.request_id or f"req-{secrets.token_hex(8)}",
        inputs_path="inputs",
        item_path="inputs",
        task=Task.EMBED,
        truncate=request.options.truncate,
    )


def read_model_request(request: pb.GetPredictModelRequest) -> None:
    """Validate."""
    violations = Violations()
    violations.model_name("model", request.model)
    if request.version:
        violations.plain_name("version", request.version)
    violations.raise_if_any()


def _names(request: pb.PredictRequest | pb.EmbedRequest) -> Violations:
    violations = Violations()
    violations.model_name("model", request.model)
    if request.version:
        violations.plain_name("version", request.version)
    if request.request_id:
        violations.printable("request_id", request.request_id, max_chars=MAX_REQUEST_ID_CHARS)
    return violations


def _count(violations: Violations, field: str, num_inputs: int, max_inputs: int) -> bool:
    if num_inputs == 0:
        return violations.add(field, "must not be empty")
    return violations.count(field, num_inputs, high=max_inputs)


def _read_texts(items: Sequence[pb.TextInput], path: str, violations: Violations) -> Inputs:
    texts = []
    for index, item in enumerate(items):
        text, pair = item.text, item.pair if item.HasField("pair") else None
        if len(text) > MAX_TEXT_CHARS:
            violations.add(f"{path}[{index}].text", f"must have at most {MAX_TEXT_CHARS} characters")
        if pair is not None and len(pair) > MAX_TEXT_CHARS:
            violations.add(f"{path}[{index}].pair", f"must have at most {MAX_TEXT_CHARS} characters")
        texts.append(TextItem(text, pair))
    return Inputs(texts=tuple(texts))


def _read_rows(features: pb.FeatureRows, violations: Violations) -> Inputs:
    rows = features.rows
    num_rows, width = len(rows), len(rows[0].values)
    if width == 0:
        violations.add("features.rows[0].values", "must not be empty")
        return Inputs()
    data = _rows_of_wire(features, num_rows, width)
    if data is None:
        data = _rows_one_by_one(rows, width, violations)
        if data is None:
            return Inputs()
    is_finite = np.isfinite(np.frombuffer(data, _FLOAT)).tobytes()  # one byte each
    if 0 in is_finite:
        row, column = divmod(is_finite.index(0), width)
        violations.add(f"features.rows[{row}].values[{column}]", "must be a finite number")
    return Inputs(rows=data, num_rows=num_rows)


def _rows_of_wire(features: pb.FeatureRows, num_rows: int, width: int) -> bytes | None:
    """Return the numbers, cut from the message's own bytes; None if its rows are not all alike.

    A row of ``width`` values takes, with nothing else in it, exactly: tag, length, tag, length, the values.
    """
    wire = features.SerializeToString()
    header = _header_of_row(width)
    if len(wire) != num_rows * (len(header) + 4 * width):
        return None
    if num_rows == 1:
        return wire[len(header) :] if wire.startswith(header) else None
    table = np.frombuffer(wire, np.uint8).reshape(num_rows, -1)
    if not (table[:, : len(header)] == np.frombuffer(header, np.uint8)).all():
        return None
    return table[:, len(header) :].tobytes()


@lru_cache
def _header_of_row(width: int) -> bytes:
    inside = _PACKED_FIELD_1 + varint(4 * width)
    return _PACKED_FIELD_1 + varint(len(inside) + 4 * width) + inside


def _rows_one_by_one(rows: Sequence[pb.FeatureRow], width: int, violations: Violations) -> bytes | None:
    """Return the numbers of rows with unknown fields in them, or name the first that is not as long."""
    for index, row in enumerate(rows):
        if len(row.values) != width:
            violations.add(
                f"features.rows[{index}].values",
                f"has {len(row.values)} values, the first row has {width}; rows must have the same number",
            )
            return None
    return b"".join(np.array(row.values, _FLOAT).tobytes() for row in rows)
