"""What a model takes and gives in terms of tensors, and its answers as tensors.

============== ============================ =========================================================
task           inputs                       outputs
============== ============================ =========================================================
classify       text, pair: BYTES [N]        label BYTES [N], score FP32 [N], scores FP32 [N, labels]
regress        text, pair: BYTES [N]        values FP32 [N, D]
embed          text, pair: BYTES [N]        embedding FP32 [N, D]
classify_tokens text, pair: BYTES [N]       tokens BYTES [N]: JSON, a list of {label, score, start, end, part}
features       features: FP32 [N, F]        prediction FP32 [N], cache_hit BOOL [N]
============== ============================ =========================================================
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from server.predict.messages import ModelInfo, Output, Task
from server.rpc.oip.tensors import OutputTensor, bytes_tensor, float_tensor

__all__ = ["TensorSpec", "classification_of", "inputs_of", "outputs_of", "tensors_of"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its first dimension, the inputs of the call. -1: any size."""

    name: str
    datatype: str
    dims: tuple[int, ...] = ()
    is_optional: bool = False


def inputs_of(info: ModelInfo) -> tuple[TensorSpec, ...]:
    """Return what the model takes."""
    if info.task is Task.FEATURES:
        return (TensorSpec("features", "FP32", (info.num_features,)),)
    return (TensorSpec("text", "BYTES"), TensorSpec("pair", "BYTES", is_optional=True))


def outputs_of(info: ModelInfo) -> tuple[TensorSpec, ...]:
    """Return what the model gives."""
    match info.task:
        case Task.CLASSIFY:
            return (
                TensorSpec("label", "BYTES"),
                TensorSpec("score", "FP32"),
                TensorSpec("scores", "FP32", (len(info.labels),)),
            )
        case Task.CLASSIFY_TOKENS:
            return (TensorSpec("tokens", "BYTES"),)
        case Task.REGRESS:
            return (TensorSpec("values", "FP32", (info.num_dimensions,)),)
        case Task.EMBED:
            return (TensorSpec("embedding", "FP32", (info.num_dimensions,)),)
        case Task.FEATURES:
            return (TensorSpec("prediction", "FP32"), TensorSpec("cache_hit", "BOOL"))


def tensors_of(info: ModelInfo, outputs: Sequence[Output]) -> dict[str, OutputTensor]:
    """Return an answer's tensors by name."""
    count = len(outputs)
    if info.task is Task.CLASSIFY_TOKENS:
        texts = [_tokens_json(info, output) for output in outputs]
        return {"tokens": bytes_tensor("tokens", (count,), texts)}
    data = b"".join(output.values for output in outputs)
    width = len(data) // (4 * count)
    if info.task is Task.FEATURES:
        hits = bytes(output.cache_hit for output in outputs)
        return {
            "prediction": float_tensor("prediction", (count,), data),
            "cache_hit": OutputTensor("cache_hit", "BOOL", (count,), hits),
        }
    if info.task is Task.CLASSIFY:
        rows = [_floats(output.values) for output in outputs]
        best = [max(range(width), key=row.__getitem__) for row in rows]
        labels = [info.labels[index] for index in best]
        scores = array("f", [row[index] for row, index in zip(rows, best, strict=True)])
        return {
            "label": bytes_tensor("label", (count,), labels),
            "score": float_tensor("score", (count,), scores.tobytes()),
            "scores": float_tensor("scores", (count, width), data),
        }
    name = "embedding" if info.task is Task.EMBED else "values"
    return {name: float_tensor(name, (count, width), data)}


def classification_of(info: ModelInfo, outputs: Sequence[Output], count: int) -> OutputTensor:
    """Return the ``count`` best classes of each input as texts ``score:index:label``: Triton's extension."""
    count = min(count, len(info.labels))
    texts = []
    for output in outputs:
        row = _floats(output.values)
        best = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:count]
        texts += [f"{row[index]:f}:{index}:{info.labels[index]}" for index in best]
    return bytes_tensor("scores", (len(outputs), count), texts)


def _tokens_json(info: ModelInfo, output: Output) -> str:
    scores = _floats(output.values)
    return json.dumps(
        [
            {"label": info.labels[label], "score": score, "start": start, "end": end, "part": part}
            for (label, start, end, part), score in zip(output.tokens, scores, strict=True)
        ],
        ensure_ascii=False,
    )


def _floats(data: bytes) -> array[float]:
    values = array("f")
    values.frombytes(data)
    return values
