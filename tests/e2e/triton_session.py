"""What an unmodified ``tritonclient`` sees of a server, as JSON on standard output.

Run in a process of its own: the client brings its own copy of the protocol, and two copies cannot be loaded
together.

    python triton_session.py PORT CLASSIFIER FEATURES
"""

from __future__ import annotations

import json
import queue
import sys
import time
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

TEXTS = ["the small river", "a quick doctor writes", "naïve café", "your some engine"]


def text_input(name: str, texts: list[str]) -> Any:
    tensor = triton.InferInput(name, [len(texts)], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_))
    return tensor


def feature_input(rows: Any, datatype: str = "FP32") -> Any:
    tensor = triton.InferInput("features", list(rows.shape), datatype)
    tensor.set_data_from_numpy(rows)
    return tensor


def failure(call: Any, *args: Any, **kwargs: Any) -> list[str]:
    try:
        call(*args, **kwargs)
    except InferenceServerException as error:
        return [error.status() or "", error.message()]
    return ["", "no error"]


def stream(client: Any, classifier: str) -> list[Any]:
    """Send five requests of which one is bad; return ids with labels or errors, in the order of answers."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for index, text in enumerate([*TEXTS, "x"]):
        model = classifier if index != 2 else "nobody"
        client.async_stream_infer(model, [text_input("text", [text])], request_id=str(index))
    seen = []
    for _ in range(5):
        result, error = answers.get(timeout=60)
        if error is not None:
            seen.append(["error", error.message()])
        else:
            seen.append([result.get_response().id, result.as_numpy("label")[0].decode()])
    client.stop_stream()
    return seen


def statistics(client: Any, model: str) -> Any:
    """Ask until the calls of a moment ago are counted: the figures are those of about a second before."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = client.get_inference_statistics(model, as_json=True)
        if int(found["model_stats"][0].get("inference_count", 0)) >= len(TEXTS):
            break
        time.sleep(0.1)
    return found


def main(port: str, classifier: str, features: str) -> dict[str, Any]:
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    seen: dict[str, Any] = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "server": client.get_server_metadata(as_json=True),
        "model_ready": [client.is_model_ready(name) for name in (classifier, features)],
        "metadata": client.get_model_metadata(classifier, as_json=True),
        "config": client.get_model_config(features, as_json=True),
    }
    answer = client.infer(classifier, [text_input("text", TEXTS)], request_id="mine")
    response = answer.get_response()
    seen["classified"] = {
        "id": response.id,
        "version": response.model_version,
        "labels": [label.decode() for label in answer.as_numpy("label")],
        "score": answer.as_numpy("score").tolist(),
        "scores": answer.as_numpy("scores").tolist(),
    }
    pair = client.infer(classifier, [text_input("text", TEXTS[:2]), text_input("pair", TEXTS[2:])])
    seen["pairs"] = pair.as_numpy("scores").tolist()
    classes = client.infer(
        classifier,
        [text_input("text", TEXTS[:1])],
        outputs=[triton.InferRequestedOutput("scores", class_count=2)],
    )
    seen["classes"] = [each.decode() for each in classes.as_numpy("scores")[0]]

    rows = np.random.default_rng(7).normal(size=(3, 32)).astype(np.float32)
    seen["rows"] = rows.tolist()
    predicted = client.infer(features, [feature_input(rows)])
    seen["predictions"] = predicted.as_numpy("prediction").tolist()
    again = client.infer(features, [feature_input(rows.astype(np.float64), "FP64")])
    seen["again"] = [again.as_numpy("prediction").tolist(), again.as_numpy("cache_hit").tolist()]

    seen["stream"] = stream(client, classifier)
    seen["failures"] = {
        "unknown": failure(client.infer, "nobody", [text_input("text", ["x"])]),
        "version": failure(client.infer, classifier, [text_input("text", ["x"])], model_version="99"),
        "tensor": failure(client.infer, classifier, [text_input("words", ["x"])]),
        "width": failure(client.infer, features, [feature_input(rows[:, :31].copy())]),
        "nan": failure(client.infer, features, [feature_input(np.full((1, 32), np.nan, np.float32))]),
        "long": failure(client.infer, classifier, [text_input("text", ["word " * 5000])]),
        "load": failure(client.load_model, "nobody"),
        "config": failure(client.load_model, classifier, config="{}"),
    }
    cut = client.infer(classifier, [text_input("text", ["word " * 5000])], parameters={"truncate": True})
    seen["cut"] = cut.as_numpy("scores").shape

    client.unload_model(classifier)
    seen["unloaded"] = [
        client.is_model_ready(classifier),
        failure(client.infer, classifier, [text_input("text", ["x"])]),
    ]
    seen["index"] = client.get_model_repository_index(as_json=True)
    client.load_model(classifier)
    seen["loaded"] = client.is_model_ready(classifier)
    seen["statistics"] = statistics(client, classifier)
    client.close()
    return seen


if __name__ == "__main__":
    json.dump(main(*sys.argv[1:4]), sys.stdout)
