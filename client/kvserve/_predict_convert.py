"""From messages about predictions to the client's own values."""

from __future__ import annotations

import sys
from array import array

from kvserve._copying import copy_fields
from kvserve._errors import Error, FieldViolation, Internal, error_from_code
from kvserve._predict_results import (
    Classification,
    Embedding,
    FeaturePrediction,
    LabelScore,
    Prediction,
    PredictModelInfo,
    PredictOutcome,
    PredictResult,
    PredictTask,
    PredictTimings,
    Regression,
    TokenClassification,
    TokenLabel,
)
from kvserve.v1 import predict_pb2 as pb

__all__ = [
    "check_count",
    "outcome_from_pb",
    "predict_model_from_pb",
    "predict_result_from_pb",
    "predict_timings_from_pb",
    "prediction_from_pb",
    "vector_from_pb",
]

_TASKS = {
    number: PredictTask(name.removeprefix("PREDICT_TASK_").lower())
    for name, number in pb.PredictTask.items()
    if number
}


def vector_from_pb(message: pb.Vector) -> array[float]:
    """Convert a vector.

    Its numbers are read from the message's own bytes (field 1: a tag, the length, then packed little-endian
    floats): many times faster than one by one.
    """
    vector = array("f")
    num_bytes = len(message.values) * vector.itemsize
    if num_bytes:
        begin = 1 + (num_bytes.bit_length() + 6) // 7
        vector.frombytes(message.SerializeToString()[begin : begin + num_bytes])
    if sys.byteorder == "big":
        vector.byteswap()
    return vector


def prediction_from_pb(message: pb.Prediction) -> Prediction:
    """Convert the answer to one input. Raises ``Internal`` for a kind that this client doesn't know."""
    num_tokens, truncated, cache_hit = message.num_tokens, message.truncated, message.cache_hit
    match message.WhichOneof("output"):
        case "classification":
            found = message.classification
            return Classification(
                label=found.label,
                score=found.score,
                scores=tuple(LabelScore(each.label, each.score) for each in found.scores),
                labels=tuple(found.labels),
                num_tokens=num_tokens,
                truncated=truncated,
                cache_hit=cache_hit,
            )
        case "tokens":
            return TokenClassification(
                tokens=tuple(copy_fields(TokenLabel, each) for each in message.tokens.tokens),
                num_tokens=num_tokens,
                truncated=truncated,
                cache_hit=cache_hit,
            )
        case "regression":
            return Regression(
                values=tuple(message.regression.values),
                num_tokens=num_tokens,
                truncated=truncated,
                cache_hit=cache_hit,
            )
        case "embedding":
            return Embedding(
                vector=vector_from_pb(message.embedding),
                num_tokens=num_tokens,
                truncated=truncated,
                cache_hit=cache_hit,
            )
        case "features":
            return FeaturePrediction(
                prediction=message.features.prediction,
                num_tokens=num_tokens,
                truncated=truncated,
                cache_hit=cache_hit,
            )
        case _:
            raise Internal("the answer holds a prediction of a kind that this client doesn't know")


def predict_timings_from_pb(message: pb.PredictTimings) -> PredictTimings:
    """Convert the timings of one call."""
    return PredictTimings(
        load_s=message.load_s,
        tokenize_s=message.tokenize_s,
        queue_s=message.queue_s,
        compute_s=message.compute_s,
        total_s=message.total_s,
        batch_size=message.batch_size,
        batch_tokens=message.batch_tokens,
    )


def check_count(num_outputs: int, num_inputs: int) -> None:
    """Raise ``Internal`` unless there are as many outputs as inputs."""
    if num_outputs != num_inputs:
        raise Internal(f"{num_inputs} inputs were answered with {num_outputs} outputs")


def predict_result_from_pb(message: pb.PredictResponse, *, num_inputs: int) -> PredictResult[Prediction]:
    """Convert a whole answer. Raises ``Internal`` unless it has as many predictions as there were inputs."""
    check_count(len(message.predictions), num_inputs)
    return PredictResult(
        predictions=tuple(map(prediction_from_pb, message.predictions)),
        model=message.model,
        version=message.version,
        policy=message.policy,
        request_id=message.request_id,
        timings=predict_timings_from_pb(message.timings),
    )


def outcome_from_pb(message: pb.StreamPredictResponse, *, num_inputs: int) -> PredictOutcome:
    """Convert what became of a request of a stream; an answer that breaks the contract is its error."""
    answer, error = None, None
    if message.HasField("error"):
        error = _error_from_pb(message.error)
    else:
        try:
            answer = predict_result_from_pb(message.response, num_inputs=num_inputs)
        except Internal as broken:
            error = broken
    return PredictOutcome(request_id=message.request_id, answer=answer, error=error)


def _error_from_pb(message: pb.PredictError) -> Error:
    description = message.message.removeprefix(f"{message.field}: ")
    return error_from_code(
        message.code,
        message.message,
        violations=[FieldViolation(message.field, description)] if message.field else [],
        reason=message.reason,
        retry_after_s=message.retry_after_s or None,
    )


def _task_from_pb(number: int) -> PredictTask | None:
    """Convert a task; None where it is not known yet."""
    return _TASKS.get(number, PredictTask.OTHER) if number else None


def predict_model_from_pb(message: pb.PredictModel) -> PredictModelInfo:
    """Convert the description of a model."""
    return copy_fields(
        PredictModelInfo,
        message,
        task=_task_from_pb(message.task),
        labels=tuple(message.labels),
        aliases=tuple(message.aliases),
    )
