"""Triton's own client, unmodified and in a process of its own, against a real server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvserve import Classification, Client
from tests.e2e.server_process import server
from tests.model.predict_models import make_model

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("tritonclient") is None,
        reason="the package tritonclient[grpc] is not installed",
    )
]
SESSION = Path(__file__).with_name("triton_session.py")
TEXTS = ["the small river", "a quick doctor writes", "naïve café", "your some engine"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the client saw, and beside it what ours saw before."""
    root = tmp_path_factory.mktemp("models")
    make_model("bert", root / "topic")
    with server("--port", "0", "--model-root", str(root), "--threads", "1") as running:
        running.wait_ready()
        with Client(f"127.0.0.1:{running.port}") as client:
            ours = client.predict(TEXTS, model="topic", top_k=0, output=Classification)
            joined = list(zip(TEXTS[:2], TEXTS[2:], strict=True))
            pairs = client.predict(joined, model="topic", top_k=0, output=Classification)
            finished = subprocess.run(
                [sys.executable, str(SESSION), str(running.port), "topic", "builtin-encoder"],
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert finished.returncode == 0, finished.stderr
            found: dict[str, Any] = json.loads(finished.stdout)
            found["ours"] = [[score.score for score in each.scores] for each in ours]
            found["our_labels"] = [each.label for each in ours]
            found["our_pairs"] = [[score.score for score in each.scores] for each in pairs]
            rows = client.predict_features(found["rows"], model="builtin-encoder", reuse=False)
            found["our_predictions"] = [each.prediction for each in rows]
    return found


def test_server_and_models_are_ready(seen: dict[str, Any]) -> None:
    assert (seen["live"], seen["ready"], seen["model_ready"]) == (True, True, [True, True])
    assert seen["server"]["name"] == "kvserve"
    assert "statistics" in seen["server"]["extensions"]


def test_metadata_describes_tensors(seen: dict[str, Any]) -> None:
    metadata, config = seen["metadata"], seen["config"]["config"]
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["text", "pair"]
    assert [tensor["name"] for tensor in metadata["outputs"]] == ["label", "score", "scores"]
    assert metadata["versions"] == ["1"]
    assert (config["backend"], config["input"][0]["dims"]) == ("kvserve", ["32"])


def test_answers_are_those_of_our_own_client(seen: dict[str, Any]) -> None:
    classified = seen["classified"]
    assert (classified["id"], classified["version"]) == ("mine", "1")
    assert classified["labels"] == seen["our_labels"]
    for theirs, ours in zip(
        classified["scores"] + seen["pairs"], seen["ours"] + seen["our_pairs"], strict=True
    ):
        assert theirs == pytest.approx(ours, abs=1e-5)
    assert classified["score"] == pytest.approx([max(row) for row in classified["scores"]])


def test_classification_extension_gives_the_best_classes(seen: dict[str, Any]) -> None:
    best, second = (each.split(":") for each in seen["classes"])
    scores = seen["classified"]["scores"][0]
    assert float(best[0]) == pytest.approx(max(scores), abs=1e-5)
    assert int(best[1]) == scores.index(max(scores))
    assert best[2] == seen["classified"]["labels"][0]
    assert float(second[0]) < float(best[0])


def test_rows_of_features_are_predicted_and_reused(seen: dict[str, Any]) -> None:
    assert seen["predictions"] == pytest.approx(seen["our_predictions"], abs=1e-6)
    predictions, hits = seen["again"]
    assert predictions == pytest.approx(seen["predictions"], abs=1e-6)
    assert hits == [True] * 3


def test_stream_answers_in_order_and_survives_a_bad_request(seen: dict[str, Any]) -> None:
    answers = seen["stream"]
    assert [answer[0] for answer in answers] == ["0", "1", "error", "3", "4"]
    assert answers[2][1].endswith("no such model is served here")
    assert answers[0][1] == seen["classified"]["labels"][0]


@pytest.mark.parametrize(
    ("what", "code", "text"),
    [
        ("unknown", "NOT_FOUND", "no such model"),
        ("version", "NOT_FOUND", "no such version"),
        ("tensor", "INVALID_ARGUMENT", "inputs[0].name"),
        ("width", "INVALID_ARGUMENT", "32"),
        ("nan", "INVALID_ARGUMENT", "finite"),
        ("long", "INVALID_ARGUMENT", "64"),
        ("load", "NOT_FOUND", "no such model"),
        ("config", "INVALID_ARGUMENT", "parameters"),
    ],
)
def test_failures_have_codes_and_reasons(seen: dict[str, Any], what: str, code: str, text: str) -> None:
    status, message = seen["failures"][what]
    assert status == f"StatusCode.{code}"
    assert text in message


def test_long_text_is_cut_when_asked(seen: dict[str, Any]) -> None:
    assert seen["cut"] == [1, 3]


def test_unloaded_model_is_refused_until_it_is_loaded(seen: dict[str, Any]) -> None:
    is_ready, [status, _] = seen["unloaded"]
    assert (is_ready, status) == (False, "StatusCode.FAILED_PRECONDITION")
    states = {model["name"]: model.get("state") for model in seen["index"]["models"]}
    assert states["topic"] == "UNAVAILABLE"
    assert states["builtin-encoder"] == "READY"
    assert seen["loaded"] is True


def test_statistics_count(seen: dict[str, Any]) -> None:
    [stats] = seen["statistics"]["model_stats"]
    assert stats["name"] == "topic"
    assert int(stats["inference_count"]) >= len(TEXTS)
    assert int(stats["execution_count"]) >= 1
