"""The Open Inference Protocol, figure by figure: what is assumed, what a model declares and has counted."""

from __future__ import annotations

import struct
import time

import pytest

from kvcore.risk import RiskBudget, RiskMeter
from server.predict.messages import (
    ModelInfo,
    ModelPhase,
    ModelStats,
    ModelStatus,
    Output,
    PolicyReport,
    Task,
)
from server.predict.reuse.meters import describe_risk
from server.rpc.errors import InvalidArgument
from server.rpc.oip import open_inference_pb2 as pb
from server.rpc.oip.parameters import (
    MAX_CLASSES,
    InferOptions,
    check_model,
    check_repository,
    wanted_tensor,
    wanted_tensors,
)
from server.rpc.oip.signature import TensorSpec, classification_of, inputs_of, outputs_of, tensors_of
from server.rpc.oip.statistics import statistics_of

NO_RISK = describe_risk(RiskMeter(RiskBudget()))
LABELS = ("no", "perhaps", "yes")
CLASSIFIER = ModelInfo(task=Task.CLASSIFY, family="f", labels=LABELS)
SCORES = Output(struct.pack("<3f", 0.25, 0.0, 0.75))
Wanted = pb.ModelInferRequest.InferRequestedOutputTensor


def options(**parameters: pb.InferParameter) -> InferOptions:
    return InferOptions(pb.ModelInferRequest(parameters=parameters))


def test_nothing_is_cut_and_reuse_is_allowed_unless_the_request_says_otherwise() -> None:
    plain = options()
    assert (plain.truncate, plain.reuse, plain.timeout_s) == (False, True, None)


@pytest.mark.parametrize(
    ("parameter", "timeout_s"),
    [
        (pb.InferParameter(int64_param=1_500_000), 1.5),
        (pb.InferParameter(uint64_param=1_500_000), 1.5),
        (pb.InferParameter(int64_param=1), 1e-6),
        (pb.InferParameter(int64_param=0), None),
        (pb.InferParameter(uint64_param=0), None),
    ],
)
def test_a_timeout_is_microseconds_and_zero_is_none(
    parameter: pb.InferParameter, timeout_s: float | None
) -> None:
    found = options(timeout=parameter).timeout_s
    assert found == (None if timeout_s is None else pytest.approx(timeout_s))


def test_a_timeout_before_the_call_is_refused_and_so_is_one_in_words() -> None:
    for bad in (pb.InferParameter(int64_param=-1), pb.InferParameter(string_param="1s")):
        with pytest.raises(InvalidArgument, match="timeout"):
            options(timeout=bad)


def test_what_clients_of_triton_add_means_nothing_here() -> None:
    ignored = {
        name: pb.InferParameter(string_param="x") for name in ("sequence_id", "triton_enable", "priority")
    }
    assert options(**ignored).timeout_s is None
    with pytest.raises(InvalidArgument, match="parameters"):
        options(xtriton_enable=pb.InferParameter(bool_param=True))


def test_only_what_was_asked_for_is_answered_in_the_order_asked() -> None:
    tensors = tensors_of(CLASSIFIER, [SCORES])
    assert [tensor.name for tensor, _ in wanted_tensors([], tensors)] == ["label", "score", "scores"]
    asked = [Wanted(name="scores"), Wanted(name="label")]
    assert [(tensor.name, count) for tensor, count in wanted_tensors(asked, tensors)] == [
        ("scores", 0),
        ("label", 0),
    ]
    with pytest.raises(InvalidArgument, match="twice"):
        wanted_tensors([Wanted(name="label")] * 2, tensors)


def test_classes_are_asked_for_from_one_to_ten_thousand() -> None:
    tensors = tensors_of(CLASSIFIER, [SCORES])

    def classes(count: int) -> Wanted:
        return Wanted(name="scores", parameters={"classification": pb.InferParameter(int64_param=count)})

    assert MAX_CLASSES == 10_000
    for good in (1, MAX_CLASSES):
        assert wanted_tensor(classes(good), tensors) == (tensors["scores"], good)
    for bad in (0, -1, MAX_CLASSES + 1):
        with pytest.raises(InvalidArgument, match="between 1 and"):
            wanted_tensor(classes(bad), tensors)
    plain = Wanted(name="scores", parameters={"binary_data": pb.InferParameter(bool_param=True)})
    assert wanted_tensor(plain, tensors) == (tensors["scores"], 0)


def test_no_more_classes_come_than_there_are() -> None:
    found = classification_of(CLASSIFIER, [SCORES, SCORES], 10)
    assert found.shape == (2, 3)
    assert found.data.count(b":2:yes") == 2


def test_of_equal_classes_the_first_is_the_best() -> None:
    equal = Output(struct.pack("<3f", 0.25, 0.375, 0.375))
    assert b"perhaps" in tensors_of(CLASSIFIER, [equal])["label"].data
    assert classification_of(CLASSIFIER, [equal], 1).data.endswith(b"0.375000:1:perhaps")


def test_a_model_declares_what_it_takes_and_gives() -> None:
    text = (TensorSpec("text", "BYTES"), TensorSpec("pair", "BYTES", is_optional=True))
    rows = ModelInfo(task=Task.FEATURES, family="f", num_features=32)
    assert inputs_of(rows) == (TensorSpec("features", "FP32", (32,)),)
    assert outputs_of(rows) == (TensorSpec("prediction", "FP32"), TensorSpec("cache_hit", "BOOL"))
    assert inputs_of(CLASSIFIER) == text
    assert outputs_of(CLASSIFIER) == (
        TensorSpec("label", "BYTES"),
        TensorSpec("score", "FP32"),
        TensorSpec("scores", "FP32", (3,)),
    )
    for task, name in ((Task.REGRESS, "values"), (Task.EMBED, "embedding")):
        info = ModelInfo(task=task, family="f", num_dimensions=7)
        assert (inputs_of(info), outputs_of(info)) == (text, (TensorSpec(name, "FP32", (7,)),))
    tagger = ModelInfo(task=Task.CLASSIFY_TOKENS, family="f", labels=LABELS)
    assert (inputs_of(tagger), outputs_of(tagger)) == (text, (TensorSpec("tokens", "BYTES"),))


def test_names_are_checked_and_there_is_one_repository() -> None:
    check_model("model_name", "m", "model_version", "1")
    check_model("model_name", "m", "model_version", "")
    check_repository("")
    for fields in (("", ""), ("../m", ""), ("m", ".."), ("m", "a/b")):
        with pytest.raises(InvalidArgument):
            check_model("model_name", fields[0], "model_version", fields[1])
    with pytest.raises(InvalidArgument, match="repository"):
        check_repository("other")


def model(phase: ModelPhase = ModelPhase.READY, idle_s: float | None = None) -> ModelStatus:
    return ModelStatus(name="m", version="2", phase=phase, source_kind="folder", idle_s=idle_s)


def test_a_model_that_did_nothing_has_no_figures() -> None:
    found = statistics_of(model(), None)
    assert (found.name, found.version, found.last_inference, found.inference_count) == ("m", "2", 0, 0)
    assert not found.memory_usage


def test_the_last_inference_is_a_time_in_milliseconds() -> None:
    before = time.time()
    found = statistics_of(model(idle_s=100.0), None).last_inference
    assert (before - 100) * 1000 - 1 <= found <= (time.time() - 100) * 1000


def test_calls_inputs_batches_hits_and_times_are_told_as_they_were_counted() -> None:
    stats = ModelStats(
        name="m",
        version="2",
        num_calls=10,
        num_failed=2,
        num_cancelled=1,
        num_inputs=50,
        num_batches=5,
        queue_s=1.5,
        compute_s=2.25,
        num_bytes=4096,
        policies=(
            PolicyReport(name="main", traffic_share=0.5, risk=NO_RISK, num_lookups=30, num_hits=20),
            PolicyReport(name="other", traffic_share=0.5, risk=NO_RISK, num_lookups=8, num_hits=3),
        ),
    )
    found = statistics_of(model(), stats)
    assert (found.inference_count, found.execution_count) == (50, 5)
    told = found.inference_stats
    assert {
        name: (getattr(told, name).count, getattr(told, name).ns)
        for name in ("success", "fail", "queue", "compute_infer", "cache_hit", "cache_miss")
    } == {
        "success": (7, 3_750_000_000),
        "fail": (2, 0),
        "queue": (7, 1_500_000_000),
        "compute_infer": (7, 2_250_000_000),
        "cache_hit": (23, 0),
        "cache_miss": (15, 0),
    }
    assert [(usage.type, usage.byte_size) for usage in found.memory_usage] == [("CPU", 4096)]
    assert not statistics_of(model(ModelPhase.UNLOADED), stats).memory_usage
