"""What the client distribution offers: names, errors, methods. A change here is a change for users."""

import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

import kvserve
from kvserve import _calls, _follow_aio, _follow_sync, testing
from kvserve._errors import _BY_CODE
from kvserve.v1 import cache_admin_pb2, generate_pb2, predict_pb2

PUBLIC = [
    "Aborted",
    "AlreadyExists",
    "AsyncCache",
    "AsyncCacheWatch",
    "AsyncClient",
    "AsyncGenerateStream",
    "AsyncModels",
    "AsyncPredictStream",
    "AsyncProgress",
    "AsyncReuseWatch",
    "Cache",
    "CacheEvent",
    "CacheEventKind",
    "CacheReport",
    "CacheStats",
    "CacheWatch",
    "CanaryInfo",
    "Cancelled",
    "ChatMessage",
    "Classification",
    "Client",
    "ClientOptions",
    "DataLoss",
    "DeadlineExceeded",
    "Divergence",
    "EmbedResult",
    "Embedding",
    "Error",
    "EvictResult",
    "FailedPrecondition",
    "FeaturePrediction",
    "FeatureRows",
    "FieldViolation",
    "FinishReason",
    "GenerateEvent",
    "GenerateOptions",
    "GenerateResult",
    "GenerateStart",
    "GenerateStream",
    "HealthStatus",
    "Internal",
    "InvalidArgument",
    "LabelScore",
    "LifetimeResult",
    "LoadProgress",
    "MisuseError",
    "ModelInfo",
    "ModelList",
    "ModelState",
    "ModelStatus",
    "Models",
    "NamespaceStats",
    "NotFound",
    "OutOfRange",
    "PermissionDenied",
    "PinKind",
    "PinResult",
    "PinStats",
    "PolicyInfo",
    "PolicyReport",
    "PredictModelInfo",
    "PredictOptions",
    "PredictOutcome",
    "PredictRequest",
    "PredictResult",
    "PredictStream",
    "PredictTask",
    "PredictTimings",
    "Prediction",
    "PrefetchCounts",
    "PrefetchStats",
    "PrefixId",
    "PrefixInfo",
    "PrefixLookup",
    "Progress",
    "Regression",
    "ResourceExhausted",
    "Restore",
    "RestoreDecision",
    "RetryPolicy",
    "Retryable",
    "ReuseEvent",
    "ReuseEventKind",
    "ReuseKey",
    "ReusePolicy",
    "ReuseReport",
    "ReuseRisk",
    "ReuseWatch",
    "RiskInterval",
    "Sample",
    "SnapshotProgress",
    "TextInputs",
    "TierBlocks",
    "TierStats",
    "Timings",
    "Tls",
    "TokenClassification",
    "TokenLabel",
    "TokenLogprob",
    "TokenLogprobs",
    "Tokens",
    "TrialResult",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "Usage",
    "WarmProgress",
    "__version__",
]


def test_public_names_are_pinned():
    assert kvserve.__all__ == PUBLIC
    assert testing.__all__ == [
        "AsyncMockTransport",
        "Handler",
        "MockTransport",
        "classified",
        "embedded",
        "events",
    ]
    for name in PUBLIC:
        assert hasattr(kvserve, name)


def test_every_status_but_ok_has_its_error():
    assert set(_BY_CODE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    for code, error_type in _BY_CODE.items():
        assert error_type.code is code
        assert issubclass(error_type, kvserve.Error)


def test_errors_survive_a_process_border():
    error = kvserve.ResourceExhausted("queue full", retry_after_s=1.5, reason="QUEUE_FULL")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.retry_after_s) == (kvserve.ResourceExhausted, "queue full", 1.5)


def test_both_clients_have_the_same_methods_and_arguments():
    renamed = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__", "__aiter__": "__iter__"}
    for asynchronous, blocking in (
        (kvserve.AsyncClient, kvserve.Client),
        (kvserve.AsyncGenerateStream, kvserve.GenerateStream),
        (kvserve.AsyncCache, kvserve.Cache),
        (kvserve.AsyncCacheWatch, kvserve.CacheWatch),
        (kvserve.AsyncModels, kvserve.Models),
        (kvserve.AsyncPredictStream, kvserve.PredictStream),
        (kvserve.AsyncProgress, kvserve.Progress),
        (_follow_aio.AsyncWatch, _follow_sync.Watch),
    ):

        def methods(cls):
            return {
                renamed.get(name, name): list(inspect.signature(value).parameters)
                for name, value in vars(cls).items()
                if inspect.isfunction(value) and name != "__await__"
            }

        assert methods(asynchronous) == methods(blocking)


def test_generation_arguments_cover_the_contract():
    arguments = set(kvserve.GenerateOptions.__optional_keys__)
    parameters = set(generate_pb2.GenerationParameters.DESCRIPTOR.fields_by_name)
    cache = {field.name for field in generate_pb2.CacheOptions.DESCRIPTOR.fields} - {"lifetime"}
    request = set(generate_pb2.GenerateRequest.DESCRIPTOR.fields_by_name)
    request -= {"text", "chat", "parameters", "cache"}
    others = {"messages", "add_generation_prompt", "lifetime_s", "timeout_s"}
    assert arguments == parameters | cache | request | others


def test_methods_are_those_of_the_contract():
    known = {value.path for value in vars(_calls).values() if isinstance(value, _calls.Method)}
    paths = {
        f"/{service.full_name}/{method.name}"
        for file in (generate_pb2.DESCRIPTOR, predict_pb2.DESCRIPTOR, cache_admin_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    }
    assert paths == {path for path in known if path.startswith("/kvserve.v1.")}


def test_importing_the_client_loads_neither_torch_nor_telemetry_sdk():
    program = (
        "import kvserve, kvserve._cli, sys;"
        " print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(kvserve.__file__).parents[1])},
    )
    assert out.stdout.strip() == "[]"


def test_configuration_prefers_arguments_over_the_environment(monkeypatch):
    monkeypatch.setenv("KVSERVE_TARGET", "elsewhere:1")
    assert kvserve.Client(transport=testing.MockTransport(lambda *_: ())).target == "elsewhere:1"
    assert kvserve.Client("here:2", transport=testing.MockTransport(lambda *_: ())).target == "here:2"
    monkeypatch.delenv("KVSERVE_TARGET")
    assert kvserve.Client(transport=testing.MockTransport(lambda *_: ())).target == "localhost:50051"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"keepalive_s": -1}, "keepalive_s"),
        ({"max_message_bytes": 0}, "max_message_bytes"),
        ({"api_key": "two\nlines"}, "api_key"),
        ({"api_key": "ключ"}, "api_key"),
    ],
)
def test_configuration_that_cannot_work_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        kvserve.Client("localhost:1", **options)


def test_unknown_client_option_is_refused():
    with pytest.raises(TypeError, match="api_token"):
        kvserve.Client("localhost:1", api_token="x")  # type: ignore[call-arg]


def test_retry_policy_and_tls_check_themselves():
    with pytest.raises(ValueError, match="max_attempts"):
        kvserve.RetryPolicy(max_attempts=1)
    with pytest.raises(ValueError, match="backoff"):
        kvserve.RetryPolicy(initial_backoff_s=3, max_backoff_s=1)
    with pytest.raises(ValueError, match="go together"):
        kvserve.Tls(cert_file="cert.pem")
