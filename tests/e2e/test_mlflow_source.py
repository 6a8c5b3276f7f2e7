"""Models of a real MLflow registry on loopback, logged by its own client; and of a registry that lies."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import psutil
import pytest

from server.predict.errors import ModelRefusedError
from server.predict.options import ModelSpec
from server.predict.sources import SourceFolder, Sources
from server.worker.checkpoint import check_config_files, read_weight_files
from server.worker.errors import ModelLoadError

Step = tuple[str, int, int]
Files = list[dict[str, Any]]


@dataclass(frozen=True)
class Registry:
    """A running registry with the models of ``mlflow_publish.py``."""

    uri: str
    scratch: Path
    canary: Path


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    folder = tmp_path_factory.mktemp("registry")
    (folder / "scratch").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    made = Registry(f"http://127.0.0.1:{port}", folder / "scratch", folder / "canary")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "NO_PROXY": "127.0.0.1",
    }
    command = [
        *(
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ),
        *("--backend-store-uri", f"sqlite:///{folder}/registry.db", "--serve-artifacts"),
        *("--artifacts-destination", str(folder / "artifacts")),
    ]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=folder, start_new_session=True
        )
    try:
        publish = [sys.executable, str(Path(__file__).with_name("mlflow_publish.py"))]
        done = subprocess.run(
            [*publish, made.uri, str(made.scratch), str(made.canary)],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:] + (folder / "server.log").read_text()[-4000:]
        yield made
    finally:
        for child in psutil.Process(server.pid).children(recursive=True):
            child.kill()
        server.kill()
        server.wait()
    assert not made.canary.exists(), "code of a model ran"


def resolve(uri: str, cache: Path, source: str, steps: list[Step] | None = None, **spec: Any) -> SourceFolder:
    sources = Sources(model_root=None, mlflow_uri=uri, cache_folder=cache)
    noted: list[Step] = [] if steps is None else steps
    return sources.resolve(
        ModelSpec(name="m", source=source, **spec), on_progress=lambda *step: noted.append(step)
    )


def reason_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ModelRefusedError as error:
        return error.reason
    return ""


def test_a_registered_model_is_fetched_once_and_is_the_model_that_was_logged(
    registry: Registry, tmp_path: Path
) -> None:
    steps: list[Step] = []
    found = resolve(registry.uri, tmp_path, "models:/good/1", steps)
    assert found.kind == "mlflow"
    assert found.is_verified
    assert found.folder == found.root
    assert found.folder.parent == tmp_path / "contents"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in found.files}
    fetching = [(done, total) for phase, done, total in steps if phase == "fetching"]
    assert fetching[-1][0] == fetching[-1][1] > found.folder.joinpath("model.safetensors").stat().st_size
    assert [done for done, _ in fetching] == sorted(done for done, _ in fetching)

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    check_config_files(found.folder)
    read_weight_files(found.folder, root=found.root)
    model = AutoModelForSequenceClassification.from_pretrained(found.folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(found.folder, local_files_only=True)
    with torch.no_grad():
        logits = model(**tokenizer("good day", return_tensors="pt")).logits
    assert torch.allclose(logits, torch.tensor(json.loads((registry.scratch / "logits.json").read_text())))
    found.check_unchanged()

    # The alias is the same version, and is not fetched again.
    again: list[Step] = []
    by_alias = resolve(registry.uri, tmp_path, "models:/good@champion", again)
    assert by_alias.folder == found.folder
    assert by_alias.notes == ("the alias 'champion' is version 1",)
    assert [step for step in again if step[0] == "fetching"] == [("fetching", 0, 0)]


def test_a_damaged_copy_is_fetched_again_and_a_dead_registry_is_no_harm(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    proxy = LyingRegistry(registry.uri, lambda path, body: body)
    with proxy:
        found = resolve(proxy.uri, tmp_path, "models:/good/2")
        inode = found.folder.stat().st_ino
        weights = bytearray((found.folder / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (found.folder / "model.safetensors").write_bytes(weights)
        steps: list[Step] = []
        mended = resolve(proxy.uri, tmp_path, "models:/good/2", steps)
        assert mended.folder == found.folder
        assert mended.folder.stat().st_ino != inode
        assert max(done for phase, done, _ in steps if phase == "fetching") > 0

    # From here on the registry is gone. Digests of the catalogue that do not fit refuse the model.
    with pytest.raises(ModelRefusedError, match="SHA-256 differs"):
        resolve(proxy.uri, tmp_path, "models:/good/2", sha256={file.name: "0" * 64 for file in mended.files})
    offline = resolve(proxy.uri, tmp_path, "models:/good/2")
    assert offline.folder == found.folder
    assert "can not be reached" in offline.notes[0]
    # An alias may have moved meanwhile: nobody can say.
    with pytest.raises(ModelRefusedError, match="can not be reached"):
        resolve(proxy.uri, tmp_path, "models:/good@champion")


def test_whatever_could_run_code_is_refused_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    expected = {
        "models:/function/1": "python_model.pkl: pickled",
        "models:/code/1": "code/helper.py: the MLflow model brings code",
        "models:/loader/1": "a loader of its own",
        "models:/pickle beside/1": "model/pytorch_model.bin: pickled",
        "models:/yaml/1": "can not be read as YAML",
        "models:/none/1": "no such model, version or alias",
        "models:/good@none": "no such model, version or alias",
    }
    with ThreadPoolExecutor(4) as pool:
        asked = {
            source: pool.submit(reason_of, partial(resolve, registry.uri, tmp_path, source))
            for source in expected
        }
    for source, reason in expected.items():
        assert reason in asked[source].result(), source
    assert list((tmp_path / "contents").iterdir()) == []
    assert list((tmp_path / "staging").iterdir()) == []
    assert not registry.canary.exists()


def test_a_renamed_pickle_is_refused_by_the_loader(registry: Registry, tmp_path: Path) -> None:
    found = resolve(registry.uri, tmp_path, "models:/renamed pickle/1")
    with pytest.raises(ModelLoadError, match="not a safetensors file"):
        read_weight_files(found.folder, root=found.root)
    assert not registry.canary.exists()


class LyingRegistry:
    """Between a client and a real registry: what it answers may be another thing. A context manager."""

    def __init__(self, uri: str, change: Callable[[str, bytes], bytes]) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._forward(None)

            def do_POST(self) -> None:
                self._forward(self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                pass

            def _forward(self, sent: bytes | None) -> None:
                request = urllib.request.Request(uri + self.path, sent, method=self.command)
                request.add_header("Content-Type", "application/json")
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        code, body = answer.status, answer.read()
                except urllib.error.HTTPError as error:
                    with error:
                        code, body = error.code, error.read()
                body = change(urllib.parse.unquote(self.path), body)
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.uri = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _in_listing(
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> Callable[[str, bytes], bytes]:
    """Change what is listed of the artifact's files."""

    def lie(path: str, body: bytes) -> bytes:
        if "/mlflow-artifacts/artifacts?" not in path:
            return body
        return json.dumps({"files": change(json.loads(body).get("files", []))}).encode()

    return lie


def _smaller(files: Files) -> Files:
    weights = [file for file in files if "safetensors" in file["path"]]
    for file in weights:
        file["file_size"] = int(file["file_size"]) - 1
    return files


def _climbing(files: Files) -> Files:
    return [*files, {"path": "../../climbed.json", "is_dir": False, "file_size": 2}]


def _not_ready(path: str, body: bytes) -> bytes:
    return body.replace(b'"READY"', b'"PENDING_REGISTRATION"')


# What else it may say is asked of a scripted client, without MLflow: tests/unit/test_predict_sources.py.
LIES: dict[str, tuple[Callable[[str, bytes], bytes], str]] = {
    "a file is larger than listed": (_in_listing(_smaller), "the file that"),
    "a name that climbs": (_in_listing(_climbing), "can not be used"),
    "no JSON": (lambda path, body: b"<html>", "can not be used"),
    "not ready": (_not_ready, "not ready"),
}


def test_a_registry_that_lies_is_refused_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    def ask(lie: Callable[[str, bytes], bytes], cache: Path) -> str:
        with LyingRegistry(registry.uri, lie) as liar:
            return reason_of(lambda: resolve(liar.uri, cache, "models:/good/1"))

    with ThreadPoolExecutor(4) as pool:
        asked = {
            name: pool.submit(ask, lie, tmp_path / str(i)) for i, (name, (lie, _)) in enumerate(LIES.items())
        }
    for name, (_, reason) in LIES.items():
        assert reason in asked[name].result(), name
        assert str(tmp_path) not in asked[name].result()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_fetch_that_is_given_up_ends_the_client(registry: Registry, tmp_path: Path) -> None:
    class GivenUp(Exception):
        pass

    def give_up(phase: str, num_done: int, num_bytes: int) -> None:
        if num_done:
            raise GivenUp

    before = {child.pid for child in psutil.Process().children()}
    sources = Sources(model_root=None, mlflow_uri=registry.uri, cache_folder=tmp_path)
    with pytest.raises(GivenUp):
        sources.resolve(ModelSpec(name="m", source="models:/good/1"), on_progress=give_up)
    assert {child.pid for child in psutil.Process().children()} <= before
    assert list((tmp_path / "staging").iterdir()) == []
