"""From arguments to the calls of PredictService, for both clients.

Only what can't be written into a message is refused here; ranges are the server's to judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from kvserve import _calls
from kvserve._calls import Call
from kvserve._errors import InvalidArgument
from kvserve._fields import check_one_input, set_field
from kvserve._options import TimeoutOptions, check_options
from kvserve._predict_convert import (
    check_count,
    predict_timings_from_pb,
    prediction_from_pb,
    vector_from_pb,
)
from kvserve._predict_inputs import (
    FeatureRows,
    ModelOptions,
    PredictOptions,
    PredictRequest,
    TextInputs,
    feature_messages,
    text_messages,
)
from kvserve._predict_results import EmbedResult, Prediction, PredictResult
from kvserve._predict_split import SplitCall, SplitLimits
from kvserve._requests import CallFactory
from kvserve.v1 import predict_pb2 as pb

__all__ = ["PredictCalls", "StreamItem"]

AnyPrediction = TypeVar("AnyPrediction", bound=Prediction)
StreamItem = PredictRequest | TextInputs
"""What a stream takes: a request, or what ``predict`` takes."""

_OPTIONS = ("truncate", "top_k", "reuse")
_TEXTS, _FEATURES, _INPUTS = "texts.items", "features.rows", "inputs"
_FIRST_TEXTS = 256
"""In the first call of a long list of texts: vectors and labels of tokens make large answers."""


class PredictCalls:
    """Makes the calls of PredictService."""

    def __init__(self, factory: CallFactory, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._factory = factory
        self._clock = clock

    def predict(
        self, inputs: TextInputs, model: str | None, output: type[AnyPrediction], options: PredictOptions
    ) -> SplitCall[pb.PredictResponse, PredictResult[AnyPrediction]]:
        """Make the calls of Predict for texts."""
        check_options(options, PredictOptions, method="predict")
        template = _predict_template(model, options)
        template.texts.SetInParent()
        return self._split_predict(text_messages(inputs, field=_TEXTS), template, output, options)

    def predict_features(
        self, rows: FeatureRows, model: str | None, output: type[AnyPrediction], options: PredictOptions
    ) -> SplitCall[pb.PredictResponse, PredictResult[AnyPrediction]]:
        """Make the calls of Predict for rows of features."""
        check_options(options, PredictOptions, method="predict_features")
        template = _predict_template(model, options)
        template.features.SetInParent()
        return self._split_predict(feature_messages(rows, field=_FEATURES), template, output, options)

    def embed(
        self, inputs: TextInputs, model: str | None, options: PredictOptions
    ) -> SplitCall[pb.EmbedResponse, EmbedResult]:
        """Make the calls of Embed."""
        check_options(options, PredictOptions, method="embed")
        template = pb.EmbedRequest(request_id=options.get("request_id") or "")
        _fill_target(template, model, options)
        _fill_options(template.options, options)

        def make_call(
            items: Sequence[pb.TextInput], number: int, version: str | None, timeout_s: float | None
        ) -> Call[Any, pb.EmbedResponse]:
            request = _numbered(template, number, version)
            request.inputs.extend(items)
            return self._factory.call(_calls.EMBED, request, {"timeout_s": timeout_s})

        items = text_messages(inputs, field=_INPUTS)
        return SplitCall(
            items,
            make_call,
            lambda answers, timings: _join_vectors(answers, timings, num_inputs=len(items)),
            field=_INPUTS,
            base_bytes=template.ByteSize(),
            limits=SplitLimits(max_bytes=self._factory.max_message_bytes, first_inputs=_FIRST_TEXTS),
            timeout_s=self._factory.timeout_s(options),
            clock=self._clock,
        )

    def predict_model(
        self, name: str, options: ModelOptions
    ) -> Call[pb.GetPredictModelRequest, pb.PredictModel]:
        """Make a call of GetPredictModel."""
        check_options(options, ModelOptions, method="predict_model")
        request = pb.GetPredictModelRequest()
        _fill_target(request, name, options)
        return self._factory.call(_calls.GET_PREDICT_MODEL, request, options)

    def stream_predict(
        self, model: str | None, options: PredictOptions
    ) -> Call[pb.PredictRequest, pb.StreamPredictResponse]:
        """Make a call of StreamPredict: without a deadline unless it names one of its own.

        Its request is what the requests of the stream begin with.
        """
        check_options(options, PredictOptions, method="stream_predict")
        if "request_id" in options:
            raise TypeError("stream_predict(): a request_id belongs into a PredictRequest")
        template = _predict_template(model, options)
        unending: TimeoutOptions = {"timeout_s": options.get("timeout_s")}
        return self._factory.call(_calls.STREAM_PREDICT, template, unending)

    def stream_request(self, template: pb.PredictRequest, item: StreamItem) -> pb.PredictRequest:
        """Make one request of a stream; ``request_id`` is empty if the item has none.

        Raises ``InvalidArgument`` for what no request can hold.
        """
        wanted = item if isinstance(item, PredictRequest) else PredictRequest(item)
        check_one_input("PredictRequest", texts=wanted.texts, features=wanted.features)
        request = pb.PredictRequest()
        request.CopyFrom(template)
        for name in ("model", "version", "request_id"):
            set_field(request, name, getattr(wanted, name))
        for name in _OPTIONS:
            set_field(request.options, name, getattr(wanted, name), prefix="options.")
        if wanted.texts is not None:
            request.texts.items.extend(text_messages(wanted.texts, field=_TEXTS))
            request.texts.SetInParent()
        if wanted.features is not None:
            request.features.rows.extend(feature_messages(wanted.features, field=_FEATURES))
            request.features.SetInParent()
        if request.ByteSize() > self._factory.max_message_bytes:
            raise InvalidArgument(
                f"the request has {request.ByteSize()} bytes; max_message_bytes is"
                f" {self._factory.max_message_bytes}"
            )
        return request

    def _split_predict(
        self,
        items: Sequence[pb.TextInput] | Sequence[pb.FeatureRow],
        template: pb.PredictRequest,
        output: type[AnyPrediction],
        options: PredictOptions,
    ) -> SplitCall[pb.PredictResponse, PredictResult[AnyPrediction]]:
        has_texts = template.HasField("texts")

        def make_call(
            items: Sequence[Any], number: int, version: str | None, timeout_s: float | None
        ) -> Call[Any, pb.PredictResponse]:
            request = _numbered(template, number, version)
            (request.texts.items if has_texts else request.features.rows).extend(items)
            return self._factory.call(_calls.PREDICT, request, {"timeout_s": timeout_s})

        max_bytes = self._factory.max_message_bytes
        return SplitCall(
            items,
            make_call,
            lambda answers, timings: _join_predictions(answers, timings, output, num_inputs=len(items)),
            field=_TEXTS if has_texts else _FEATURES,
            base_bytes=template.ByteSize(),
            limits=SplitLimits(max_bytes=max_bytes, first_inputs=_FIRST_TEXTS)
            if has_texts
            else SplitLimits(max_bytes=max_bytes),
            timeout_s=self._factory.timeout_s(options),
            clock=self._clock,
        )


def _predict_template(model: str | None, options: PredictOptions) -> pb.PredictRequest:
    template = pb.PredictRequest(request_id=options.get("request_id") or "")
    _fill_target(template, model, options)
    _fill_options(template.options, options)
    return template


def _fill_target(
    request: pb.PredictRequest | pb.EmbedRequest | pb.GetPredictModelRequest,
    model: str | None,
    options: ModelOptions,
) -> None:
    set_field(request, "model", model)
    set_field(request, "version", options.get("version"))


def _fill_options(message: pb.PredictOptions, options: PredictOptions) -> None:
    for name in _OPTIONS:
        set_field(message, name, options.get(name), prefix="options.")


_Template = TypeVar("_Template", pb.PredictRequest, pb.EmbedRequest)


def _numbered(template: _Template, number: int, version: str | None) -> _Template:
    """Return a copy for one of several calls; those after the first get ids and a version of their own."""
    request = type(template)()
    request.CopyFrom(template)
    if number and template.request_id:
        request.request_id = f"{template.request_id}-{number + 1}"
    if version is not None:
        request.version = version
    return request


def _join_predictions(
    answers: Sequence[pb.PredictResponse],
    timings: pb.PredictTimings,
    output: type[AnyPrediction],
    *,
    num_inputs: int,
) -> PredictResult[AnyPrediction]:
    predictions = tuple(prediction_from_pb(each) for answer in answers for each in answer.predictions)
    check_count(len(predictions), num_inputs)
    result = PredictResult(
        predictions=predictions,
        model=answers[0].model,
        version=answers[0].version,
        policy=_join_policies(answers),
        request_id=answers[0].request_id,
        timings=predict_timings_from_pb(timings),
        num_calls=len(answers),
    )
    return result.expect(output)


def _join_policies(answers: Sequence[pb.PredictResponse]) -> str:
    names = [name for answer in answers for name in answer.policy.split(",") if name]
    return ",".join(dict.fromkeys(names))


def _join_vectors(
    answers: Sequence[pb.EmbedResponse], timings: pb.PredictTimings, *, num_inputs: int
) -> EmbedResult:
    vectors = tuple(vector_from_pb(vector) for answer in answers for vector in answer.vectors)
    check_count(len(vectors), num_inputs)
    return EmbedResult(
        vectors=vectors,
        model=answers[0].model,
        version=answers[0].version,
        request_id=answers[0].request_id,
        num_tokens=sum(answer.num_tokens for answer in answers),
        num_truncated=sum(answer.num_truncated for answer in answers),
        timings=predict_timings_from_pb(timings),
        num_calls=len(answers),
    )
