"""Tensors of the Open Inference Protocol: what a hostile request may say, and the answers."""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from typing import Any

import pytest

from server.predict.messages import ModelInfo, Output, Task, TextItem
from server.rpc.errors import InvalidArgument
from server.rpc.oip import open_inference_pb2 as pb
from server.rpc.oip.parameters import InferOptions, wanted_tensor
from server.rpc.oip.signature import classification_of, inputs_of, outputs_of, tensors_of
from server.rpc.oip.tensors import read_inputs

Tensor = pb.ModelInferRequest.InferInputTensor


def packed(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def request(*tensors: Any, raw: Sequence[bytes] = ()) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name="m", inputs=tensors, raw_input_contents=raw)


def text(shape: Sequence[int] = (1,), name: str = "text", **fields: Any) -> Any:
    return Tensor(name=name, datatype="BYTES", shape=shape, **fields)


def features(shape: Sequence[int], datatype: str = "FP32", **fields: Any) -> Any:
    return Tensor(name="features", datatype=datatype, shape=shape, **fields)


def floats(data: bytes) -> list[float]:
    values = array("f")
    values.frombytes(data)
    return list(values)


def test_texts_come_raw_or_as_contents() -> None:
    raw = request(text((2, 1)), raw=[packed("ä".encode(), b"")])
    plain = request(text((2,), contents=pb.InferTensorContents(bytes_contents=["ä".encode(), b""])))
    for each in (raw, plain):
        assert read_inputs(each, max_inputs=10).texts == (TextItem("ä"), TextItem(""))


def test_pairs_belong_to_texts() -> None:
    found = read_inputs(
        request(text((2,)), text((2,), "pair"), raw=[packed(b"a", b"b"), packed(b"c", b"d")]), max_inputs=10
    )
    assert found.texts == (TextItem("a", "c"), TextItem("b", "d"))


def test_rows_come_raw_or_as_contents_in_both_precisions() -> None:
    numbers = [0.5, -1.0, 2.25, 3.0]
    for each in (
        request(features((2, 2)), raw=[struct.pack("<4f", *numbers)]),
        request(features((2, 2), "FP64"), raw=[struct.pack("<4d", *numbers)]),
        request(features((2, 2), contents=pb.InferTensorContents(fp32_contents=numbers))),
        request(features((2, 2), "FP64", contents=pb.InferTensorContents(fp64_contents=numbers))),
    ):
        found = read_inputs(each, max_inputs=10)
        assert (found.num_rows, floats(found.rows)) == (2, numbers)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request(), "inputs"),
        (request(*[text(name=f"t{i}") for i in range(9)]), "inputs"),
        (request(text(name="other")), "inputs[0].name"),
        (request(text(), text()), "inputs[1].name"),
        (request(text(name="pair"), raw=[packed(b"a")]), "inputs"),
        (request(text(), features((1, 2)), raw=[packed(b"a"), b""]), "inputs"),
        (request(text(), raw=[b"", b""]), "raw_input_contents"),
        (request(Tensor(name="text", datatype="FP32", shape=[1])), "inputs[0].datatype"),
        (request(features((1, 1), "INT32")), "inputs[0].datatype"),
        (request(text(())), "inputs[0].shape"),
        (request(text((0,))), "inputs[0].shape"),
        (request(text((-1,))), "inputs[0].shape"),
        (request(text((11,))), "inputs[0].shape"),
        (request(text((1, 2))), "inputs[0].shape"),
        (request(text([1] * 100)), "inputs[0].shape"),
        (request(features((4,))), "inputs[0].shape"),
        (request(features((2, 2**62))), "inputs[0].shape"),
        (request(features((2, 2**63 - 1))), "inputs[0].shape"),
        (request(features((2, 2)), raw=[b"\0" * 15]), "raw_input_contents"),
        (request(features((2, 2)), raw=[b"\0" * 17]), "raw_input_contents"),
        (
            request(features((2, 2), contents=pb.InferTensorContents(fp32_contents=[1.0]))),
            "inputs[0].contents",
        ),
        (request(text((2,)), raw=[packed(b"a")]), "inputs[0].contents"),
        (request(text((1,)), raw=[packed(b"a", b"b")]), "inputs[0].contents"),
        (request(text((1,)), raw=[b"\xff\xff\xff\xffabc"]), "inputs[0].contents"),
        (request(text((1,)), raw=[b"\x01"]), "inputs[0].contents"),
        (request(text((1,)), raw=[packed(b"\xff")]), "inputs[0].contents[0]"),
        (request(text(), text((2,), "pair"), raw=[packed(b"a"), packed(b"a", b"b")]), "inputs[1].shape"),
        (
            request(text(parameters={"shared_memory_region": pb.InferParameter(string_param="x")})),
            "inputs[0].parameters",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field(bad: pb.ModelInferRequest, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read_inputs(bad, max_inputs=10)
    assert refused.value.violations[0].field == field


def test_number_beyond_float32_is_infinite_and_left_to_the_model() -> None:
    found = read_inputs(request(features((1, 1), "FP64"), raw=[struct.pack("<d", 1e300)]), max_inputs=1)
    assert floats(found.rows) == [float("inf")]


def test_known_parameters_are_read_and_others_refused() -> None:
    parameter = pb.InferParameter
    options = InferOptions(
        pb.ModelInferRequest(
            parameters={
                "truncate": parameter(bool_param=True),
                "reuse": parameter(bool_param=False),
                "timeout": parameter(int64_param=2_000_000),
                "priority": parameter(uint64_param=1),
            }
        )
    )
    assert (options.truncate, options.reuse, options.timeout_s) == (True, False, 2.0)
    for name, bad in (("trunc", parameter(bool_param=True)), ("truncate", parameter(string_param="yes"))):
        with pytest.raises(InvalidArgument):
            InferOptions(pb.ModelInferRequest(parameters={name: bad}))


CLASSIFIER = ModelInfo(task=Task.CLASSIFY, family="bert", labels=("no", "perhaps", "yes"))


def test_classification_has_labels_scores_and_tritons_classes() -> None:
    outputs = [Output(struct.pack("<3f", 0.25, 0.25, 0.5)), Output(struct.pack("<3f", 0.75, 0.0, 0.25))]
    tensors = tensors_of(CLASSIFIER, outputs)
    assert list(tensors) == [spec.name for spec in outputs_of(CLASSIFIER)]
    assert tensors["label"].data == packed(b"yes", b"no")
    assert floats(tensors["score"].data) == [0.5, 0.75]
    assert tensors["scores"].shape == (2, 3)
    classes = classification_of(CLASSIFIER, outputs, 2)
    assert classes.shape == (2, 2)
    assert classes.data == packed(b"0.500000:2:yes", b"0.250000:0:no", b"0.750000:0:no", b"0.250000:2:yes")


def test_requested_output_must_be_one_of_the_model() -> None:
    tensors = tensors_of(CLASSIFIER, [Output(struct.pack("<3f", 1.0, 0.0, 0.0))])
    asked = pb.ModelInferRequest.InferRequestedOutputTensor
    assert wanted_tensor(asked(name="score"), tensors) == (tensors["score"], 0)
    classes = {"classification": pb.InferParameter(int64_param=2)}
    assert wanted_tensor(asked(name="scores", parameters=classes), tensors)[1] == 2
    for bad in (asked(name="logits"), asked(name="label", parameters=classes)):
        with pytest.raises(InvalidArgument):
            wanted_tensor(bad, tensors)


def test_every_task_gives_the_tensors_that_it_declares() -> None:
    numbers = struct.pack("<2f", 0.5, 0.25)
    for info, output in (
        (ModelInfo(task=Task.REGRESS, family="f", num_dimensions=2), Output(numbers)),
        (ModelInfo(task=Task.EMBED, family="f", num_dimensions=2), Output(numbers)),
        (ModelInfo(task=Task.FEATURES, family="f", num_features=3), Output(numbers[:4], cache_hit=True)),
        (
            ModelInfo(task=Task.CLASSIFY_TOKENS, family="f", labels=("O", "X")),
            Output(numbers, tokens=((1, 0, 3, 0), (0, 4, 6, 1))),
        ),
    ):
        tensors = tensors_of(info, [output, output])
        for spec in outputs_of(info):
            tensor = tensors.pop(spec.name)
            assert (tensor.datatype, tensor.shape) == (spec.datatype, (2, *spec.dims))
        assert not tensors
        assert inputs_of(info)


def test_tokens_are_json() -> None:
    info = ModelInfo(task=Task.CLASSIFY_TOKENS, family="f", labels=("O", "ÄX"))
    output = Output(struct.pack("<f", 0.5), tokens=((1, 0, 3, 1),))
    data = tensors_of(info, [output])["tokens"].data
    assert json.loads(data[4:]) == [{"label": "ÄX", "score": 0.5, "start": 0, "end": 3, "part": 1}]
