"""Sources of models: names, folders, links, manifests, the hub, MLflow's files. Nothing of them may run."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import itertools
import json
import os
import pickle
import random
import re
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from server.predict.errors import ModelRefusedError, ModelTooLargeError
from server.predict.options import ModelSpec
from server.predict.sources import SourceFolder, Sources, check_remote_source, registry_process, source_kind
from server.predict.sources.content_cache import ContentCache, HeldFolder
from server.predict.sources.folder import MAX_DEPTH, MAX_ENTRIES
from server.predict.sources.manifest import parse_sums
from server.predict.sources.mlmodel import (
    ArtifactFile,
    check_listing,
    check_location,
    choose_files,
    read_mlmodel,
)
from server.predict.sources.registry import bytes_below
from server.worker.checkpoint import read_weight_files
from server.worker.errors import ModelLoadError

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "f" * 40


def safetensors_bytes(fill: int = 0, num_bytes: int = 64) -> bytes:
    """A file of one tensor."""
    header = {"weight": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes([fill]) * num_bytes


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def make_model(folder: Path, *, weights: bytes | None = None) -> Path:
    """What a loader needs at least; it also has a subfolder, as sentence encoders do."""
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights or safetensors_bytes())
    return folder


def digests_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "SHA256SUMS"
    }


def write_sums(folder: Path) -> None:
    """As a user does."""
    command = "find . -type f ! -name SHA256SUMS -exec sha256sum {} + > SHA256SUMS"
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)


class Progress:
    """What was reported."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, int]] = []

    def __call__(self, phase: str, num_done: int, num_bytes: int) -> None:
        self.steps.append((phase, num_done, num_bytes))


@pytest.fixture
def model_root(tmp_path: Path) -> Path:
    root = tmp_path / "models"
    make_model(root / "minilm")
    return root


def resolve(
    source: str, model_root: Path | None = None, *, progress: Progress | None = None, **spec: Any
) -> SourceFolder:
    sources = Sources(model_root=None if model_root is None else str(model_root), mlflow_uri=None)
    return sources.resolve(
        ModelSpec(name="m", source=source, **spec),
        on_progress=progress if progress is not None else Progress(),
    )


def refusal(call: Callable[[], object], *secrets: Path) -> str:
    """The reason of a refusal; it holds no path."""
    with pytest.raises(ModelRefusedError) as caught:
        call()
    for secret in secrets:
        assert str(secret) not in caught.value.reason
    return caught.value.reason


class TestNames:
    def test_three_forms_are_told_apart(self) -> None:
        assert source_kind("minilm") == "folder"
        assert source_kind("team/minilm/2") == "folder"
        assert source_kind("/srv/models/minilm") == "folder"
        assert source_kind(f"hf:owner/name@{COMMIT}") == "hub"
        assert source_kind("models:/churn/3") == "mlflow"
        assert source_kind("models:/churn rate@champion") == "mlflow"

    @pytest.mark.parametrize(
        "trick",
        [
            "",
            ".",
            "..",
            "../x",
            "a/../b",
            "a/..",
            "a/./b",
            "a//b",
            "a/",
            "/",
            "//etc",
            "/a/../etc",
            "~/models",
            "~root",
            "a\0b",
            "..%2f..%2fetc",
            "%2e%2e/x",
            "a%00b",
            "..\\x",
            "a\\b",
            "C:\\models",
            "C:/models",
            "a\nb",
            "a\x7fb",
            "a\u202eb",
            "a\ufeffb",
            "a\udc80b",
            "x" * 10_240,
            "/".join(["x"] * 600),
            "/".join(["x"] * 17),
            "é" * 200,
            "file:///etc",
            "file:etc",
            "http://127.0.0.1/x",
            "https://hub/x",
            "s3://bucket/x",
            "HF:owner/name",
            "runs:/0/model",
        ],
    )
    def test_path_tricks_are_refused_from_everybody(self, trick: str, model_root: Path) -> None:
        refusal(lambda: source_kind(trick))
        refusal(lambda: check_remote_source(trick))
        if not trick:
            return  # no specification has it
        reason = refusal(lambda: resolve(trick, model_root), model_root)
        assert len(reason) < 200

    @pytest.mark.parametrize("source", ["/etc", "/srv/models/minilm", "/"])
    def test_absolute_folders_are_the_operators_alone(self, source: str) -> None:
        refusal(lambda: check_remote_source(source))

    @pytest.mark.parametrize(
        "source", ["minilm", f"hf:o/n@{COMMIT}", "models:/churn/3", "models:/churn@best"]
    )
    def test_what_may_come_over_rpc(self, source: str) -> None:
        check_remote_source(source)

    @pytest.mark.parametrize(
        "revision", ["main", "v1.0", "refs/pr/1", COMMIT[:7], COMMIT.upper(), COMMIT + "0"]
    )
    def test_a_branch_or_tag_is_no_revision(self, revision: str) -> None:
        assert "branches and tags can move" in refusal(lambda: source_kind(f"hf:owner/name@{revision}"))

    @pytest.mark.parametrize(
        "source",
        [
            "hf:",
            "hf:owner/name",
            f"hf:name@{COMMIT}",
            f"hf:a/b/c@{COMMIT}",
            f"hf:../name@{COMMIT}",
            f"hf:owner/..@{COMMIT}",
            f"hf:owner/a--b@{COMMIT}",
            f"hf:owner/a.git@{COMMIT}",
            f"hf:owner/a%2fb@{COMMIT}",
            f"hf:{'o' * 97}/name@{COMMIT}",
            f"hf:owner/name@{COMMIT}\n",
        ],
    )
    def test_hub_names_are_read_strictly(self, source: str) -> None:
        refusal(lambda: source_kind(source))

    @pytest.mark.parametrize(
        "source",
        [
            "models:",
            "models:/",
            "models:/churn",
            "models:/churn/",
            "models:/churn/0",
            "models:/churn/-1",
            "models:/churn/Production",
            "models:/churn/latest",
            "models:/churn/3/model",
            "models:/m-0123456789abcdef0123456789abcdef",
            "models:/../3",
            "models:/a%2fb/3",
            "models:/churn@",
            "models:/churn@a/b",
            "models://host/churn/3",
            f"models:/churn/{2**64}",
        ],
    )
    def test_registered_names_are_read_strictly(self, source: str) -> None:
        refusal(lambda: source_kind(source))


class TestFolder:
    def test_a_folder_below_the_model_root(self, model_root: Path) -> None:
        found = resolve("minilm", model_root)
        assert (found.folder, found.root, found.kind) == (model_root / "minilm", model_root, "folder")
        assert [file.name for file in found.files] == [
            "1_Pooling/config.json",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ]
        assert found.num_bytes == sum(p.stat().st_size for p in found.folder.rglob("*") if p.is_file())
        assert not found.is_verified
        found.check_unchanged()

    def test_the_operators_own_folder_is_its_own_root(self, model_root: Path) -> None:
        found = resolve(str(model_root / "minilm"))
        assert found.folder == found.root == model_root / "minilm"

    def test_without_a_model_root_relative_sources_are_refused(self, model_root: Path) -> None:
        assert "model root" in refusal(lambda: resolve("minilm"))

    def test_what_is_not_there_is_refused(self, model_root: Path) -> None:
        assert refusal(lambda: resolve("other", model_root), model_root) == "the source is not a folder"
        refusal(lambda: resolve("minilm/config.json", model_root), model_root)
        refusal(lambda: resolve(str(model_root / "none")), model_root)

    def test_a_folder_that_links_out_of_the_root_is_refused(self, model_root: Path, tmp_path: Path) -> None:
        make_model(tmp_path / "secret")
        (model_root / "link").symlink_to(tmp_path / "secret")
        (model_root / "up").symlink_to("..")
        assert "below the model root" in refusal(lambda: resolve("link", model_root), tmp_path)
        assert "below the model root" in refusal(lambda: resolve("up/secret", model_root), tmp_path)

    def test_a_folder_that_links_to_a_neighbour_is_served(self, model_root: Path) -> None:
        (model_root / "latest").symlink_to("minilm")
        assert resolve("latest", model_root).folder == model_root / "minilm"

    def test_a_root_that_is_a_link_itself_is_followed(self, model_root: Path, tmp_path: Path) -> None:
        (tmp_path / "root").symlink_to(model_root)
        assert resolve("minilm", tmp_path / "root").root == model_root

    @pytest.mark.parametrize("name", ["weights.safetensors", "notes.txt", "1_Pooling/extra.json", ".hidden"])
    def test_a_file_that_links_out_is_refused(self, name: str, model_root: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        (model_root / "minilm" / name).symlink_to(tmp_path / "secret")
        assert "links to a file outside" in refusal(lambda: resolve("minilm", model_root), tmp_path)
        assert "links to a file outside" in refusal(lambda: resolve(str(model_root / "minilm")), tmp_path)

    def test_a_link_to_a_neighbours_file_is_below_the_root_but_not_below_the_folder(
        self, model_root: Path
    ) -> None:
        (model_root / "shared.txt").write_text("words")
        (model_root / "minilm" / "vocab.txt").symlink_to("../shared.txt")
        found = resolve("minilm", model_root)
        assert next(f.path for f in found.files if f.name == "vocab.txt") == model_root / "shared.txt"
        refusal(lambda: resolve(str(model_root / "minilm")), model_root)

    def test_links_to_nothing_in_circles_and_to_folders_are_refused(self, model_root: Path) -> None:
        link = model_root / "minilm" / "link.json"
        for target in ("nowhere", "link.json", "1_Pooling"):
            link.symlink_to(target)
            assert "link.json" in refusal(lambda: resolve("minilm", model_root), model_root)
            link.unlink()
        (model_root / "circle").symlink_to("circle")
        refusal(lambda: resolve("circle", model_root), model_root)

    def test_a_pipe_is_refused_instead_of_waited_for(self, model_root: Path) -> None:
        os.mkfifo(model_root / "minilm" / "pipe.json")
        assert "not a plain file" in refusal(lambda: resolve("minilm", model_root), model_root)

    def test_a_hundred_thousand_files_are_not_listed_to_the_end(self, model_root: Path) -> None:
        folder = model_root / "minilm"
        for i in range(MAX_ENTRIES):
            (folder / f"{i}.txt").touch()
        assert str(MAX_ENTRIES) in refusal(lambda: resolve("minilm", model_root))

    def test_deep_nesting_is_refused(self, model_root: Path) -> None:
        folder = model_root / "minilm"
        (folder / "/".join(["d"] * (MAX_DEPTH - 1))).mkdir(parents=True)
        resolve("minilm", model_root)
        (folder / "/".join(["d"] * MAX_DEPTH)).mkdir()
        assert "nested" in refusal(lambda: resolve("minilm", model_root))

    def test_a_strange_file_name_is_not_repeated(self, model_root: Path) -> None:
        (model_root / "minilm" / "\x1b[31m\n").symlink_to("nowhere")
        assert "a file with a strange name" in refusal(lambda: resolve("minilm", model_root))

    def test_version_control_is_not_looked_into(self, model_root: Path) -> None:
        git = model_root / "minilm" / ".git"
        git.mkdir()
        (git / "link").symlink_to("/etc/passwd")
        assert not [file for file in resolve("minilm", model_root).files if ".git" in file.name]

    def test_a_folder_that_anybody_may_write_to_is_noted(self, model_root: Path) -> None:
        (model_root / "minilm").chmod(0o777)
        assert any("anybody" in note for note in resolve("minilm", model_root).notes)

    def test_a_folder_without_configuration_or_weights_is_refused(self, model_root: Path) -> None:
        (model_root / "minilm" / "model.safetensors").unlink()
        assert "no safetensors weights" in refusal(lambda: resolve("minilm", model_root))
        (model_root / "minilm" / "config.json").unlink()
        assert "no config.json" in refusal(lambda: resolve("minilm", model_root))

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "sub/model.ckpt"])
    def test_pickles_alone_are_refused_and_not_opened(
        self, name: str, model_root: Path, tmp_path: Path
    ) -> None:
        folder = model_root / "minilm"
        (folder / "model.safetensors").unlink()
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        assert name in refusal(lambda: resolve("minilm", model_root))
        assert not (tmp_path / "canary").exists()

    def test_a_renamed_pickle_reaches_the_loader_and_is_refused_there(
        self, model_root: Path, tmp_path: Path
    ) -> None:
        planted = pickle.dumps(Canary(tmp_path / "canary"))
        (model_root / "minilm" / "model.safetensors").write_bytes(planted)
        found = resolve("minilm", model_root)
        with pytest.raises(ModelLoadError, match="not a safetensors file"):
            read_weight_files(found.folder, root=found.root)
        assert not (tmp_path / "canary").exists()
        pickle.loads(planted)
        assert (tmp_path / "canary").exists(), "the canary is a real one"


class TestManifest:
    def test_the_catalogues_digests_are_compared(self, model_root: Path) -> None:
        digests = digests_of(model_root / "minilm")
        found = resolve("minilm", model_root, sha256=digests)
        assert found.is_verified
        assert {file.name: file.sha256 for file in found.files} == digests
        assert resolve("minilm", model_root, sha256={k: v.upper() for k, v in digests.items()}).is_verified

    @pytest.mark.parametrize("way", ["catalogue", "sums", "both"])
    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "1_Pooling/config.json"])
    def test_one_flipped_bit_is_noticed(self, way: str, name: str, model_root: Path) -> None:
        folder = model_root / "minilm"
        digests = digests_of(folder)
        if way != "catalogue":
            write_sums(folder)
            digests |= {"SHA256SUMS": hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()}
        spec = {} if way == "sums" else {"sha256": digests}
        assert resolve("minilm", model_root, **spec).is_verified
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
        reason = refusal(lambda: resolve("minilm", model_root, **spec), model_root)
        assert name in reason
        assert "SHA-256 differs" in reason

    @pytest.mark.parametrize("way", ["catalogue", "sums"])
    @pytest.mark.parametrize(
        "name", ["more.safetensors", "model.safetensors.index.json", "2_Dense/x.json", "a.py"]
    )
    def test_an_extra_file_is_refused(self, way: str, name: str, model_root: Path) -> None:
        folder = model_root / "minilm"
        spec = {"sha256": digests_of(folder)} if way == "catalogue" else {}
        if way == "sums":
            write_sums(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
        assert repr(name) in refusal(lambda: resolve("minilm", model_root, **spec))

    @pytest.mark.parametrize("way", ["catalogue", "sums"])
    def test_a_missing_file_is_refused(self, way: str, model_root: Path) -> None:
        folder = model_root / "minilm"
        spec = {"sha256": digests_of(folder)} if way == "catalogue" else {}
        if way == "sums":
            write_sums(folder)
        (folder / "tokenizer.json").unlink()
        assert "tokenizer.json is missing" in refusal(lambda: resolve("minilm", model_root, **spec))

    def test_both_manifests_must_hold(self, model_root: Path) -> None:
        folder = model_root / "minilm"
        before = digests_of(folder)
        (folder / "tokenizer.json").write_text("[]")
        write_sums(folder)
        assert resolve("minilm", model_root).is_verified
        assert "the manifest" in refusal(lambda: resolve("minilm", model_root, sha256=before))

    @pytest.mark.parametrize(
        "manifest",
        [
            {},
            {"config.json": "0" * 63},
            {"config.json": "g" * 64},
            {"config.json": ""},
            {"../config.json": "0" * 64},
            {"/etc/passwd": "0" * 64},
            {"": "0" * 64},
            {"x" * 10_240: "0" * 64},
            {"a\0b": "0" * 64},
        ],
    )
    def test_a_malformed_manifest_is_refused(self, manifest: dict[str, str], model_root: Path) -> None:
        refusal(lambda: resolve("minilm", model_root, sha256=manifest))

    @pytest.mark.parametrize(
        "line",
        [
            b"\\" + b"0" * 64 + b"  a\\nb",
            b"SHA256 (config.json) = " + b"0" * 64,
            b"0" * 64 + b" config.json",
            b"0" * 63 + b"  config.json",
            b"0" * 64 + b"  ../config.json",
            b"0" * 64 + b"  /etc/passwd",
            b"\xff\xfe",
            b"",
            b"0" * 64 + b"  a\n" + b"1" * 64 + b"  a",
        ],
    )
    def test_what_sha256sum_does_not_write_is_refused(self, line: bytes, model_root: Path) -> None:
        (model_root / "minilm" / "SHA256SUMS").write_bytes(line + b"\n")
        assert "SHA256SUMS" in refusal(lambda: resolve("minilm", model_root))

    def test_both_modes_of_sha256sum_are_read(self) -> None:
        assert parse_sums(b"0" * 64 + b"  a b\n" + b"1" * 64 + b" *./c/d\n") == {
            "a b": "0" * 64,
            "c/d": "1" * 64,
        }

    def test_a_giant_list_of_digests_is_not_read(self, model_root: Path) -> None:
        with (model_root / "minilm" / "SHA256SUMS").open("wb") as stream:
            stream.truncate(1 << 40)
        assert "too large" in refusal(lambda: resolve("minilm", model_root))

    def test_every_byte_is_read_once_and_told(self, tmp_path: Path) -> None:
        folder = make_model(tmp_path / "m", weights=safetensors_bytes(7, 20 << 20))
        (folder / "more.safetensors").write_bytes(safetensors_bytes(8, 9 << 20))
        progress = Progress()
        found = resolve(str(folder), progress=progress, sha256=digests_of(folder))
        assert {phase for phase, _, _ in progress.steps} == {"checking"}
        done = [num_done for _, num_done, _ in progress.steps]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, found.num_bytes)
        assert {num_bytes for _, _, num_bytes in progress.steps} == {found.num_bytes}
        assert max(b - a for a, b in itertools.pairwise(done)) <= 8 << 20

    def test_without_a_manifest_nothing_is_read(self, model_root: Path) -> None:
        progress = Progress()
        resolve("minilm", model_root, progress=progress)
        assert progress.steps == []

    def test_empty_files_are_verified_too(self, model_root: Path) -> None:
        (model_root / "minilm" / "empty.txt").touch()
        assert resolve("minilm", model_root, sha256=digests_of(model_root / "minilm")).is_verified


class TestUnchanged:
    """What was verified is what is loaded, or loading fails."""

    def _refuses(self, found: SourceFolder) -> str:
        return refusal(found.check_unchanged, found.folder)

    def verified(self, model_root: Path) -> SourceFolder:
        found = resolve("minilm", model_root, sha256=digests_of(model_root / "minilm"))
        found.check_unchanged()
        return found

    def test_another_file_in_its_place(self, model_root: Path, tmp_path: Path) -> None:
        found = self.verified(model_root)
        (tmp_path / "evil").write_bytes(safetensors_bytes(1))
        (tmp_path / "evil").rename(found.folder / "model.safetensors")
        assert "model.safetensors changed" in self._refuses(found)

    def test_other_bytes_in_the_same_file_with_its_times_set_back(self, model_root: Path) -> None:
        found = self.verified(model_root)
        path = found.folder / "model.safetensors"
        before = path.stat()
        with path.open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\xff")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (before.st_ino, before.st_size, before.st_mtime_ns) == (
            after.st_ino,
            after.st_size,
            after.st_mtime_ns,
        )
        assert "model.safetensors changed" in self._refuses(found)

    def test_swapped_away_and_back(self, model_root: Path) -> None:
        found = self.verified(model_root)
        path, aside = found.folder / "model.safetensors", model_root / "aside"
        path.rename(aside)
        path.write_bytes(safetensors_bytes(1))
        path.unlink()
        aside.rename(path)
        self._refuses(found)

    def test_the_whole_folder_swapped_away_and_back(self, model_root: Path) -> None:
        found = self.verified(model_root)
        found.folder.rename(model_root / "aside")
        make_model(found.folder, weights=safetensors_bytes(1))
        shutil.rmtree(found.folder)
        (model_root / "aside").rename(found.folder)
        assert "folder changed" in self._refuses(found)

    def test_a_file_that_came_or_went(self, model_root: Path) -> None:
        found = self.verified(model_root)
        (found.folder / "adapter_config.json").write_text("{}")
        assert "folder changed" in self._refuses(found)
        found = self.verified(model_root)
        (found.folder / "1_Pooling" / "config.json").unlink()
        self._refuses(found)

    def test_a_link_that_leads_elsewhere(self, model_root: Path) -> None:
        (model_root / "a.txt").write_text("a")
        (model_root / "b.txt").write_text("b")
        link = model_root / "minilm" / "vocab.txt"
        link.symlink_to("../a.txt")
        found = self.verified(model_root)
        link.unlink()
        link.symlink_to("../b.txt")
        assert "vocab.txt changed" in self._refuses(found)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub's own layout, with one snapshot; the library is offline, as in every test."""
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    repository = cache / "models--owner--name"
    model = make_model(tmp_path / "made")
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for path in sorted(p for p in model.rglob("*") if p.is_file()):
        digest = hashlib.sha256(path.read_bytes() + path.name.encode()).hexdigest()
        path.rename(repository / "blobs" / digest)
        link = snapshot / path.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1), "blobs", digest))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return cache


class TestHubOffline:
    def test_a_cached_commit_is_found_with_its_links(self, hub_cache: Path) -> None:
        found = resolve(f"hf:owner/name@{COMMIT}")
        repository = hub_cache / "models--owner--name"
        assert (found.kind, found.folder, found.root) == (
            "hub",
            repository / "snapshots" / COMMIT,
            repository,
        )
        assert {file.path.parent for file in found.files} == {repository / "blobs"}
        found.check_unchanged()

    def test_its_digests_are_compared_through_the_links(self, hub_cache: Path) -> None:
        digests = digests_of(hub_cache / "models--owner--name" / "snapshots" / COMMIT)
        assert resolve(f"hf:owner/name@{COMMIT}", sha256=digests).is_verified
        digests["config.json"] = "0" * 64
        refusal(lambda: resolve(f"hf:owner/name@{COMMIT}", sha256=digests))

    @pytest.mark.parametrize("source", [f"hf:owner/name@{OTHER_COMMIT}", f"hf:owner/other@{COMMIT}"])
    def test_what_is_not_cached_is_refused(self, source: str, hub_cache: Path) -> None:
        assert "can not be reached" in refusal(lambda: resolve(source), hub_cache)

    def test_a_link_out_of_the_repositorys_cache_is_refused(self, hub_cache: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("secret")
        link = hub_cache / "models--owner--name" / "snapshots" / COMMIT / "vocab.txt"
        link.symlink_to(tmp_path / "secret")
        assert "links to a file outside" in refusal(lambda: resolve(f"hf:owner/name@{COMMIT}"), tmp_path)

    def test_a_snapshot_without_weights_is_refused(self, hub_cache: Path) -> None:
        (hub_cache / "models--owner--name" / "snapshots" / COMMIT / "model.safetensors").unlink()
        assert "weights" in refusal(lambda: resolve(f"hf:owner/name@{COMMIT}"))


class FakeHub(http.server.ThreadingHTTPServer):
    """The few endpoints of the hub that a fetch uses, over files of one folder; remembers what was asked."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.folder = folder
        self.paths: list[str] = []

    def listing(self, name: str) -> list[dict[str, Any]]:
        files = {
            p.relative_to(self.folder).as_posix(): p.read_bytes()
            for p in self.folder.rglob("*")
            if p.is_file()
        }
        if name == "owner/climbs":
            files["../../../climbed.json"] = b"{}"
        if name == "owner/many":
            files |= {f"{i}.json": b"{}" for i in range(MAX_ENTRIES + 1)}
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        if name == "owner/giant":
            entries[0]["size"] = 1 << 60
        return entries


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.paths.append(path)
        headers = {"X-Repo-Commit": COMMIT}
        code, body = 404, b"{}"
        if "/gated/" in path or path.endswith("/gated"):
            code, headers = 403, {"X-Error-Code": "GatedRepo"}
        elif "owner/none" in path:
            headers = {"X-Error-Code": "RepoNotFound"}
        elif OTHER_COMMIT in path:
            headers = {"X-Error-Code": "RevisionNotFound"}
        elif "owner/rubbish" in path:
            code, body = 200, b"<html>"
        elif path.startswith("/api/models/") and path.endswith(f"/tree/{COMMIT}"):
            name = path.removeprefix("/api/models/").removesuffix(f"/tree/{COMMIT}")
            code, body = 200, json.dumps(self.server.listing(name)).encode()
        elif f"/resolve/{COMMIT}/" in path:
            file = self.server.folder / path.split(f"/resolve/{COMMIT}/")[1]
            if file.is_file():
                code, body = 200, file.read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


# One process for all cases: importing the hub's library takes most of the time.
FETCH = """
import json, sys
from server.predict.errors import ModelRefusedError, ModelTooLargeError
from server.predict.options import ModelSpec
from server.predict.sources import Sources

answers = {}
for source in json.loads(sys.argv[1]):
    steps = []
    try:
        found = Sources(model_root=None, mlflow_uri=None).resolve(
            ModelSpec(name="m", source=source), on_progress=lambda *step: steps.append(step))
        found.check_unchanged()
        answers[source] = [str(found.folder), [file.name for file in found.files], steps]
    except ModelRefusedError as error:
        answers[source] = error.reason
print(json.dumps(answers))
"""


def fetch(home: Path, endpoint: str, *sources: str, offline: bool = False) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps(sources)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def fake_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    folder = make_model(tmp_path_factory.mktemp("served"), weights=safetensors_bytes(3, 300_000))
    canary = folder.parent / "canary"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w')")
    hub = FakeHub(folder)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()
    assert not canary.exists()


class TestHubFetching:
    def test_fetched_once_then_found_and_nothing_that_could_run(
        self, fake_hub: FakeHub, tmp_path: Path
    ) -> None:
        endpoint = f"http://127.0.0.1:{fake_hub.server_port}"
        good = f"hf:owner/name@{COMMIT}"
        hostile = {
            f"hf:owner/none@{COMMIT}": "is not on the hub",
            f"hf:owner/name@{OTHER_COMMIT}": "no such commit",
            f"hf:owner/gated@{COMMIT}": "licence",
            f"hf:owner/rubbish@{COMMIT}": "can not be used",
            f"hf:owner/climbs@{COMMIT}": "file name in the repository",
            f"hf:owner/many@{COMMIT}": "more than",
            f"hf:owner/giant@{COMMIT}": "the disk has less",
        }
        answers = fetch(tmp_path, endpoint, good, *hostile)
        for source, reason in hostile.items():
            assert reason in answers[source], source
        assert not list(tmp_path.rglob("climbed.json"))

        folder, names, steps = answers[good]
        assert Path(folder).name == COMMIT
        assert set(names) == {"config.json", "tokenizer.json", "model.safetensors", "1_Pooling/config.json"}
        assert not [path for path in fake_hub.paths if path.endswith((".bin", ".py"))]
        assert {phase for phase, _, _ in steps} == {"fetching"}
        assert steps[-1][1] == steps[-1][2] >= 300_000

        num_asked = len(fake_hub.paths)
        again = fetch(tmp_path, "http://127.0.0.1:9", good, offline=True)
        assert again[good][:2] == [folder, names]
        assert len(fake_hub.paths) == num_asked


def mlmodel(
    flavors: str = "", transformers: str = "", function: str = "loader_module: mlflow.transformers"
) -> bytes:
    """An ``MLmodel`` as MLflow writes it, and what is added."""
    return f"""
flavors:
  python_function:
    env: {{conda: conda.yaml}}
    {function}
  transformers:
    code: null
    components: [tokenizer]
    model_binary: model
    task: text-classification
{transformers}
{flavors}
mlflow_version: 3.17.2
""".encode()


def files_of(*paths: str, num_bytes: int = 10) -> list[ArtifactFile]:
    return [ArtifactFile(path, num_bytes) for path in paths]


GOOD_FILES = (
    "MLmodel",
    "requirements.txt",
    "conda.yaml",
    "model/config.json",
    "model/model.safetensors",
    "components/tokenizer/tokenizer.json",
    "components/tokenizer/tokenizer_config.json",
)


class TestMlflowFiles:
    def test_a_model_and_its_tokenizer_become_one_folder(self) -> None:
        check_listing(files_of(*GOOD_FILES))
        chosen = choose_files(
            read_mlmodel(mlmodel()), files_of(*GOOD_FILES, "components/tokenizer/config.json")
        )
        assert {name: file.path for name, file in chosen.items()} == {
            "config.json": "model/config.json",
            "model.safetensors": "model/model.safetensors",
            "tokenizer.json": "components/tokenizer/tokenizer.json",
            "tokenizer_config.json": "components/tokenizer/tokenizer_config.json",
        }

    @pytest.mark.parametrize(
        "path",
        [
            "model/pytorch_model.bin",
            "python_model.pkl",
            "model/deep/x.PKL",
            "model.cloudpickle",
            "data/model.pth",
            "model.onnx",
            "code/helper.txt",
            "code/helper.py",
            "model/modeling.py",
            "lib.so",
            "../MLmodel",
            "/etc/passwd",
            "model/../../x.json",
            "model/%2e%2e/x.json",
            "model\\x.json",
            "model/a\nb.json",
            "/".join(["d"] * 9),
        ],
    )
    def test_an_artifact_with_such_a_file_is_refused(self, path: str) -> None:
        refusal(lambda: check_listing(files_of(*GOOD_FILES, path)))

    def test_an_artifact_is_bounded(self) -> None:
        refusal(lambda: check_listing(files_of(*GOOD_FILES, *(f"{i}.txt" for i in range(1000)))))
        refusal(lambda: check_listing(files_of("MLmodel", num_bytes=1 << 30)))
        refusal(lambda: check_listing(files_of("model/config.json")))

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (b"\xff\xfe\x00", "YAML"),
            (b"a: [", "YAML"),
            (b"[" * 100_000, "YAML"),
            (b"!!python/object/apply:os.system ['touch /tmp/canary']", "YAML"),
            (b"just text", "no flavours"),
            (b"flavors: []", "no flavours"),
            (b"flavors: {transformers: 1}", "no flavours"),
            (
                b"flavors: {python_function: {loader_module: mlflow.pyfunc.model}}",
                "only MLflow's transformers",
            ),
            (b"flavors: {sklearn: {pickled_model: model.pkl}}", "only MLflow's transformers"),
            (mlmodel("  onnx: {data: model.onnx}"), "flavours besides"),
            (mlmodel("  pytorch: {model_data: data}"), "flavours besides"),
            (mlmodel(function="loader_module: evil"), "loader of its own"),
            (mlmodel(function="code: code"), "loader of its own"),
            (mlmodel(function="loader_module: mlflow.transformers\n    code: code"), "code of its own"),
            (
                mlmodel(function="loader_module: mlflow.transformers\n    python_model: x.pkl"),
                "code of its own",
            ),
            (mlmodel().replace(b"code: null", b"code: code"), "code of its own"),
            (mlmodel(transformers="    framework: tf"), "PyTorch"),
            (mlmodel(transformers="    peft: peft"), "adapter"),
            (mlmodel().replace(b"[tokenizer]", b"[tokenizer, image_processor]"), "over texts"),
            (mlmodel().replace(b"[tokenizer]", b"[]"), "over texts"),
            (mlmodel().replace(b"model_binary: model", b"source_model_name: o/n"), "no weights of its own"),
            (mlmodel().replace(b"model_binary: model", b"model_binary: ../model"), "folder of the weights"),
            (mlmodel().replace(b"model_binary: model", b"model_binary: /etc"), "folder of the weights"),
        ],
    )
    def test_an_mlmodel_that_could_run_something_is_refused(self, text: bytes, reason: str) -> None:
        assert reason in refusal(lambda: read_mlmodel(text))

    @pytest.mark.parametrize("missing", ["model/config.json", "model/model.safetensors"])
    def test_a_model_without_its_parts_is_refused(self, missing: str) -> None:
        files = files_of(*(path for path in GOOD_FILES if path != missing))
        refusal(lambda: choose_files(read_mlmodel(mlmodel()), files))

    def test_a_model_without_a_tokenizer_is_refused(self) -> None:
        files = files_of(*(path for path in GOOD_FILES if not path.startswith("components")))
        assert "tokenizer" in refusal(lambda: choose_files(read_mlmodel(mlmodel()), files))

    @pytest.mark.parametrize(
        ("location", "uri", "is_allowed"),
        [
            ("mlflow-artifacts:/0/models/m-1/artifacts", "http://registry:5000", True),
            ("mlflow-artifacts://registry:5000/0/m-1", "http://user:secret@registry:5000", True),
            ("s3://bucket/m-1", "https://registry", True),
            ("file:///srv/mlruns/0/m-1", "sqlite:////srv/mlflow.db", True),
            ("/srv/mlruns/0/m-1", "/srv/mlruns", True),
            ("mlflow-artifacts://elsewhere/0/m-1", "http://registry:5000", False),
            ("mlflow-artifacts:/0/../../secret", "http://registry:5000", False),
            ("mlflow-artifacts:/0/%2e%2e/secret", "http://registry:5000", False),
            ("file:///etc", "http://registry:5000", False),
            ("/etc", "http://registry:5000", False),
            ("http://169.254.169.254/x", "http://registry:5000", False),
            ("ftp://elsewhere/x", "http://registry:5000", False),
            ("http://elsewhere/x", "sqlite:////srv/mlflow.db", False),
        ],
    )
    def test_where_a_registry_may_send_us(self, location: str, uri: str, is_allowed: bool) -> None:
        if is_allowed:
            check_location(location, uri=uri)
        else:
            refusal(lambda: check_location(location, uri=uri))

    def test_without_a_registry_or_its_client_it_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "--mlflow-uri" in refusal(lambda: resolve("models:/churn/3"))
        monkeypatch.setitem(sys.modules, "mlflow", None)
        sources = Sources(model_root=None, mlflow_uri="http://127.0.0.1:9", cache_folder=tmp_path / "cache")
        spec = ModelSpec(name="m", source="models:/churn/3")
        assert "kvserve-server[mlflow]" in refusal(lambda: sources.resolve(spec, on_progress=Progress()))


class TestContentCache:
    ORIGIN: ClassVar[dict[str, Any]] = {
        "key": ["uri", "churn", "3"],
        "location": "a",
        "files": [["MLmodel", 1]],
    }

    def _store(self, cache: ContentCache, origin: dict[str, Any], text: str = "{}") -> Path:
        with cache.stage() as staging:
            folder = staging / "model"
            folder.mkdir()
            (folder / "config.json").write_text(text)
            sums = f"{hashlib.sha256(text.encode()).hexdigest()}  config.json\n".encode()
            held = cache.store(folder, sums, origin=origin)
        held.close()
        return held.path

    def _find(self, cache: ContentCache, origin: dict[str, Any]) -> Path | None:
        held = cache.find(origin)
        if held is not None:
            held.close()
        return None if held is None else held.path

    def test_what_was_stored_is_found_until_it_differs(self, tmp_path: Path) -> None:
        cache = ContentCache(tmp_path / "cache")
        assert cache.find(self.ORIGIN) is None
        folder = self._store(cache, self.ORIGIN)
        assert self._find(ContentCache(tmp_path / "cache"), self.ORIGIN) == folder
        moved = self.ORIGIN | {"location": "b"}
        assert cache.find(moved) is None
        held = cache.find_any(moved)
        assert held is not None
        assert held.path == folder
        held.close()
        assert cache.find_any({"key": ["uri", "churn", "4"]}) is None

    def test_equal_contents_are_kept_once(self, tmp_path: Path) -> None:
        cache = ContentCache(tmp_path / "cache")
        folder = self._store(cache, self.ORIGIN)
        assert self._store(cache, {"key": ["uri", "churn", "4"]}) == folder
        assert self._store(cache, {"key": ["uri", "churn", "5"]}, "[]") != folder

    def test_an_altered_list_of_digests_is_no_longer_found(self, tmp_path: Path) -> None:
        cache = ContentCache(tmp_path / "cache")
        folder = self._store(cache, self.ORIGIN)
        with (folder / "SHA256SUMS").open("a") as stream:
            stream.write("\n")
        assert cache.find(self.ORIGIN) is None
        assert cache.find_any(self.ORIGIN) is None
        # It used to stand in the way of what was fetched instead, for good.
        assert self._store(cache, self.ORIGIN) == folder
        assert self._find(cache, self.ORIGIN) == folder

    def test_staging_is_empty_after_success_failure_and_a_crash(self, tmp_path: Path) -> None:
        cache = ContentCache(tmp_path / "cache")
        staging = tmp_path / "cache" / "staging"
        self._store(cache, self.ORIGIN)
        assert list(staging.iterdir()) == []
        with pytest.raises(IsADirectoryError), cache.stage() as path:
            path.read_bytes()
        assert list(staging.iterdir()) == []
        (staging / "left" / "model").mkdir(parents=True)
        (staging / "tmp-record").touch()
        with cache.stage() as mine, ContentCache(tmp_path / "cache").stage() as other:
            # Another fetch at the same time removes what was abandoned, and nothing that is in use.
            assert {mine, other} == set(staging.iterdir())

    def test_a_discarded_folder_is_gone_and_may_come_back(self, tmp_path: Path) -> None:
        cache = ContentCache(tmp_path / "cache")
        folder = self._store(cache, self.ORIGIN)
        held = cache.find(self.ORIGIN)
        assert held is not None
        cache.discard(held)
        cache.discard(held)
        assert cache.find(self.ORIGIN) is None
        assert self._store(cache, self.ORIGIN) == folder

    def test_it_is_private(self, tmp_path: Path) -> None:
        ContentCache(tmp_path / "cache")
        assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
        (tmp_path / "cache" / "contents").chmod(0o777)
        assert "alone" in refusal(lambda: ContentCache(tmp_path / "cache"))

    @pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"origin": 1, "contents": 2}', b"\xff"])
    def test_a_damaged_record_is_no_record(self, text: bytes, tmp_path: Path) -> None:
        cache = ContentCache(tmp_path / "cache")
        self._store(cache, self.ORIGIN)
        (record,) = (tmp_path / "cache" / "versions").iterdir()
        record.write_bytes(text)
        assert cache.find(self.ORIGIN) is None


class TestBoundedCache:
    """What was fetched is kept within a budget; what is used stays."""

    NUM_BYTES = 1_000_000
    BUDGET = 3_500_000

    @staticmethod
    def origin(number: int) -> dict[str, Any]:
        return {"key": ["uri", "m", str(number)]}

    @pytest.fixture
    def cache(self, tmp_path: Path) -> ContentCache:
        return ContentCache(tmp_path / "cache", max_bytes=self.BUDGET)

    def _store(self, cache: ContentCache, number: int, *, used_s: int | None = None) -> HeldFolder:
        with cache.stage() as staging:
            cache.make_room(self.NUM_BYTES)
            folder = staging / "model"
            folder.mkdir()
            (folder / "weights").write_bytes(bytes([number]) * self.NUM_BYTES)
            held = cache.store(folder, f"{number:064}  weights\n".encode(), origin=self.origin(number))
        if used_s is not None:
            held.close()
            os.utime(cache._used / held.path.name, (used_s, used_s))
        return held

    def _numbers(self, cache: ContentCache) -> list[int]:
        """Of what is found, without using it."""
        return [
            number
            for number in range(1, 9)
            if (known := cache._recall(self.origin(number))) is not None
            and (cache._contents / known["contents"]).is_dir()
        ]

    def test_the_longest_unused_leave_first_and_the_log_says_so(
        self, cache: ContentCache, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        for number, used_s in ((1, 300), (2, 100), (3, 200)):
            self._store(cache, number, used_s=used_s)
        assert "removed" not in caplog.text
        self._store(cache, 4, used_s=400)
        assert self._numbers(cache) == [1, 3, 4]
        assert "removed 1 fetched models (0 MiB)" in caplog.text
        cache.make_room(2 * self.NUM_BYTES)
        assert self._numbers(cache) == [4]
        assert len(list(cache._used.iterdir())) == len(list(cache._versions.iterdir())) == 1
        assert list(cache._staging.iterdir()) == []

    def test_what_was_found_again_is_the_last_to_leave(self, cache: ContentCache) -> None:
        for number in (1, 2, 3):
            self._store(cache, number, used_s=100 * number)
        held = cache.find(self.origin(1))
        assert held is not None
        held.close()
        self._store(cache, 4).close()
        assert self._numbers(cache) == [1, 3, 4]

    def test_what_is_held_stays_and_without_room_nothing_leaves(self, cache: ContentCache) -> None:
        held = [self._store(cache, number) for number in (1, 2)]
        self._store(cache, 3, used_s=500)
        with pytest.raises(ModelTooLargeError, match="models that are loaded"):
            cache.make_room(2 * self.NUM_BYTES)
        assert self._numbers(cache) == [1, 2, 3]
        held[0].close()
        held[0].close()
        cache.make_room(2 * self.NUM_BYTES)
        assert self._numbers(cache) == [2]
        held[1].close()

    def test_a_model_larger_than_the_cache_or_the_disk_is_refused(
        self, cache: ContentCache, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._store(cache, 1, used_s=100)
        with pytest.raises(ModelTooLargeError, match="larger than the cache"):
            cache.make_room(self.BUDGET + 1)
        assert self._numbers(cache) == [1]
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 10))
            with pytest.raises(ModelTooLargeError, match="the disk has less"):
                cache.make_room(self.NUM_BYTES + 1000)
            assert self._numbers(cache) == [1]
            cache.make_room(self.NUM_BYTES)  # what leaves makes room on the disk, too
        assert self._numbers(cache) == []

    def test_others_that_were_fetched_at_the_same_time_are_trimmed_to_the_budget(
        self, cache: ContentCache, tmp_path: Path
    ) -> None:
        roomier = ContentCache(tmp_path / "cache", max_bytes=1 << 40)
        for number in range(1, 6):
            self._store(roomier, number, used_s=100 * number)
        self._store(cache, 6).close()
        assert self._numbers(cache) == [4, 5, 6]

    def test_another_server_keeps_what_it_uses_until_it_is_killed(
        self, cache: ContentCache, tmp_path: Path
    ) -> None:
        for number in (1, 2, 3):
            self._store(cache, number, used_s=100 * number)
        program = (
            "import pathlib, sys; from server.predict.sources.content_cache import ContentCache;"
            "held = ContentCache(pathlib.Path(sys.argv[1])).find({'key': ['uri', 'm', '1']});"
            "print(held is not None, flush=True); sys.stdin.read()"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "cache")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"True\n"
            os.utime(next(cache._used.iterdir()))  # the order is not what keeps it
            with pytest.raises(ModelTooLargeError):
                cache.make_room(self.BUDGET)
            cache.make_room(2 * self.NUM_BYTES)
            assert self._numbers(cache) == [1]
            other.kill()
        cache.make_room(self.BUDGET)
        assert self._numbers(cache) == []

    @pytest.mark.parametrize("where", ["shutil.rmtree", "pathlib.Path.unlink"])
    def test_a_server_killed_while_it_removes_leaves_nothing_half(
        self, where: str, cache: ContentCache, tmp_path: Path
    ) -> None:
        for number in (1, 2, 3):
            self._store(cache, number, used_s=100 * number)
        module, _, name = where.rpartition(".")
        program = (
            "import os, pathlib, shutil, sys; from server.predict.sources.content_cache import ContentCache;"
            f"cache = ContentCache(pathlib.Path(sys.argv[1]), max_bytes={self.BUDGET});"
            f"setattr({module}, '{name}', lambda *_, **__: os._exit(9)); cache.make_room(2_000_000)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "cache")], cwd=ROOT, timeout=60, check=False
        )
        assert done.returncode == 9
        assert self._numbers(cache) == [3]
        assert [cache.find(self.origin(number)) for number in (1, 2)] == [None, None]
        assert len(list(cache._staging.iterdir())) == 1
        self._store(cache, 1).close()  # as if nothing had been
        assert self._numbers(cache) == [1, 3]
        assert list(cache._staging.iterdir()) == []

    def test_hundred_races_of_two_servers_never_show_half_a_folder(self, tmp_path: Path) -> None:
        caches = [ContentCache(tmp_path / "cache", max_bytes=self.BUDGET) for _ in range(2)]
        draw = random.Random(5)
        plans = [(draw.randrange(2), draw.randrange(1, 6)) for _ in range(100)]

        def use(plan: tuple[int, int]) -> bool:
            cache = caches[plan[0]]
            try:
                held = cache.find(self.origin(plan[1])) or self._store(cache, plan[1])
            except ModelTooLargeError:
                return False
            with contextlib.closing(held):
                assert (held.path / "weights").read_bytes() == bytes([plan[1]]) * self.NUM_BYTES
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(use, plans)) > 50
        caches[0].make_room(0)
        assert len(self._numbers(caches[0])) <= 3
        assert list(caches[0]._staging.iterdir()) == []


class TestRegistryProcess:
    """The client's process may do anything; whoever asks gets an error, and the process ends."""

    @pytest.mark.parametrize(
        ("program", "reason"),
        [
            ("import sys; sys.exit(3)", "can not be used"),
            ("input(); print('no JSON')", "can not be used"),
            ("input(); print('{')", "can not be used"),
            ("import os\ninput()\nwhile True: os.write(1, b'x' * 65536)", "can not be used"),
            ("input(); input()", "can not be used"),
            ("""input(); print('{"error": "denied", "text": "/secret"}')""", "refuses access"),
            ("""input(); print('{"error": "failed", "text": "/secret"}')""", "can not be reached"),
        ],
        ids=["ends", "rubbish", "cut off", "endless", "silent", "denied", "failed"],
    )
    def test_it_fails_alone(
        self, program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "client_for_test.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(registry_process, "_MODULE", "client_for_test")
        monkeypatch.setattr(registry_process, "SILENCE_S", 1.0)
        with registry_process.RegistryProcess("http://127.0.0.1:9") as process:
            assert reason in refusal(
                lambda: process.ask("find", registry_process.FoundVersion), Path("/secret")
            )
            pid = process.pid
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    def test_bytes_on_the_disk_are_a_sign_of_life(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = "import time; input(); time.sleep(2.5); print('{}')"
        (tmp_path / "client_for_test.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(registry_process, "_MODULE", "client_for_test")
        monkeypatch.setattr(registry_process, "SILENCE_S", 1.0)
        counter = itertools.count()
        with registry_process.RegistryProcess("http://127.0.0.1:9") as process:
            process.ask("fetch", registry_process.Done, count_bytes=lambda: next(counter))
        assert next(counter) > 10

    def test_it_ends_with_the_processes_that_it_has_started(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Clients of some object stores fetch with processes of their own."""
        program = (
            "import json, subprocess; input(); child = subprocess.Popen(['sleep', '600']);"
            "print(json.dumps({'version': str(child.pid), 'location': ''}), flush=True); input()"
        )
        (tmp_path / "client_for_test.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(registry_process, "_MODULE", "client_for_test")
        with registry_process.RegistryProcess("http://127.0.0.1:9") as process:
            child = psutil.Process(int(process.ask("find", registry_process.FoundVersion).version))
            assert child.name() == "sleep"
        with contextlib.suppress(psutil.TimeoutExpired):
            child.wait(5)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

    def test_a_client_that_nobody_waits_for_ends_though_its_download_has_not(self) -> None:
        """It used to go on for as long as the download took, after the server had been killed."""
        program = (
            "import threading; from server.predict.sources import mlflow_client;"
            "mlflow_client._answer = lambda request: print('begun', flush=True) or threading.Event().wait();"
            "mlflow_client.main()"
        )
        command = [sys.executable, "-c", program]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
        ) as client:
            assert client.stdin is not None
            assert client.stderr is not None
            client.stdin.write(b"{}\n")
            client.stdin.flush()
            assert client.stderr.readline() == b"begun\n"  # what libraries print goes there
            client.stdin.close()
            assert client.wait(20) == 1

    def test_bytes_are_counted_while_files_come_and_go(self, tmp_path: Path) -> None:
        """A part that was renamed at the wrong moment used to fail the whole download."""
        (tmp_path / "done").write_bytes(b"12345")
        is_over = threading.Event()

        def come_and_go() -> None:
            while not is_over.is_set():
                (tmp_path / "parts").mkdir()
                (tmp_path / "parts" / "one").write_bytes(b"123")
                (tmp_path / "parts" / "one").rename(tmp_path / "parts" / "two")
                shutil.rmtree(tmp_path / "parts")

        with ThreadPoolExecutor(1) as pool:
            going = pool.submit(come_and_go)
            seen = {bytes_below(tmp_path) for _ in range(3000)}
            is_over.set()
            going.result()
        assert seen <= {5, 8, 11}
        assert bytes_below(tmp_path) == 5


SCRIPTED_CLIENT = """
import json, pathlib, sys
script = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text())
contents = script.pop("contents")
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "fetch":
        path = pathlib.Path(request["folder"], request["path"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes.fromhex(contents[request["path"]]))
        if request["path"] == script.get("hangs_after"):
            sys.stdin.readline()
        print("{}", flush=True)
    else:
        print(json.dumps(script[request["op"]]), flush=True)
"""


class TestScriptedRegistry:
    """A registry that answers what the test wants; the real one is in tests/e2e/test_mlflow_source.py."""

    @pytest.fixture
    def script(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        (tmp_path / "scripted_client.py").write_text(SCRIPTED_CLIENT)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(registry_process, "_MODULE", "scripted_client")
        contents = dict.fromkeys(GOOD_FILES, b"{}") | {
            "MLmodel": mlmodel(),
            "model/model.safetensors": safetensors_bytes(5),
        }
        return {
            "find": {"version": "3", "location": "mlflow-artifacts:/0/m"},
            "list": {
                "files": [[path, len(content)] for path, content in contents.items()],
                "is_complete": True,
            },
            "contents": {path: content.hex() for path, content in contents.items()},
        }

    def _resolve(
        self, tmp_path: Path, script: dict[str, Any], source: str = "models:/churn/3"
    ) -> SourceFolder:
        (tmp_path / "scripted_client.json").write_text(json.dumps(script))
        sources = Sources(model_root=None, mlflow_uri="http://registry", cache_folder=tmp_path / "cache")
        return sources.resolve(ModelSpec(name="m", source="models:/churn/3"), on_progress=Progress())

    def test_what_a_loader_needs_is_in_one_folder(self, script: dict[str, Any], tmp_path: Path) -> None:
        found = self._resolve(tmp_path, script)
        names = {file.name for file in found.files}
        assert names == {
            *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "SHA256SUMS")
        }
        assert (found.folder / "model.safetensors").read_bytes() == safetensors_bytes(5)
        assert found.is_verified
        found.check_unchanged()

    def test_a_version_that_was_made_anew_is_fetched_anew(
        self, script: dict[str, Any], tmp_path: Path
    ) -> None:
        before = self._resolve(tmp_path, script)
        script["find"]["location"] = "mlflow-artifacts:/0/other"
        script["contents"]["model/model.safetensors"] = safetensors_bytes(6).hex()
        after = self._resolve(tmp_path, script)
        assert after.folder != before.folder
        before.check_unchanged()

    @pytest.mark.parametrize(
        ("lie", "reason"),
        [
            ({"list": {"files": [["MLmodel", None]], "is_complete": True}}, "without its size"),
            ({"list": {"files": [["MLmodel", -1]], "is_complete": True}}, "without its size"),
            ({"list": {"files": [[1, 1]], "is_complete": True}}, "can not be used"),
            ({"list": {"files": [["MLmodel", 1]], "is_complete": False}}, "200 folders"),
            ({"list": {"files": [[f"{i}", 1] for i in range(1001)], "is_complete": True}}, "1000 files"),
            ({"list": {"files": [["MLmodel", 1 << 40]], "is_complete": True}}, "no plausible MLmodel"),
            ({"find": {"version": "3", "location": "file:///etc"}}, "not its own"),
            ({"find": {"version": "3", "location": "mlflow-artifacts://elsewhere/0"}}, "not its own"),
            ({"find": {"version": "3"}}, "can not be used"),
            ({"find": []}, "can not be used"),
            ({"list": {}}, "can not be used"),
            ({"list": {"files": [["MLmodel"]], "is_complete": True}}, "can not be used"),
        ],
    )
    def test_lies_are_refused(
        self, lie: dict[str, Any], reason: str, script: dict[str, Any], tmp_path: Path
    ) -> None:
        assert reason in refusal(lambda: self._resolve(tmp_path, script | lie), tmp_path)
        assert list((tmp_path / "cache" / "contents").iterdir()) == []

    @pytest.mark.parametrize("num_more", [-1, 1, 1 << 60])
    def test_a_file_of_another_size_is_refused(
        self, num_more: int, script: dict[str, Any], tmp_path: Path
    ) -> None:
        weights = next(entry for entry in script["list"]["files"] if entry[0] == "model/model.safetensors")
        weights[1] += num_more
        if num_more > 1:
            with pytest.raises(ModelTooLargeError, match="larger than the cache"):
                self._resolve(tmp_path, script)
        else:
            reason = refusal(lambda: self._resolve(tmp_path, script), tmp_path)
            assert "model/model.safetensors is" in reason
        assert list((tmp_path / "cache" / "contents").iterdir()) == []
        assert list((tmp_path / "cache" / "staging").iterdir()) == []

    def test_a_download_that_grows_too_large_is_not_waited_for(
        self, script: dict[str, Any], tmp_path: Path
    ) -> None:
        script["hangs_after"] = "model/model.safetensors"
        weights = next(entry for entry in script["list"]["files"] if entry[0] == script["hangs_after"])
        weights[1] -= 1
        assert "is larger than" in refusal(lambda: self._resolve(tmp_path, script), tmp_path)
        assert list((tmp_path / "cache" / "staging").iterdir()) == []

    def test_what_was_fetched_stays_until_it_is_let_go_of(
        self, script: dict[str, Any], tmp_path: Path
    ) -> None:
        """As long as a model that was loaded from it may map its files."""
        found = self._resolve(tmp_path, script)
        cache = ContentCache(tmp_path / "cache", max_bytes=100)
        with pytest.raises(ModelTooLargeError, match="that are loaded"):
            cache.make_room(100)
        found.check_unchanged()
        found.close()
        cache.make_room(100)
        assert list((tmp_path / "cache" / "contents").iterdir()) == []

    def test_what_is_refused_after_it_was_fetched_is_let_go_of(
        self, script: dict[str, Any], tmp_path: Path
    ) -> None:
        (tmp_path / "scripted_client.json").write_text(json.dumps(script))
        sources = Sources(model_root=None, mlflow_uri="http://registry", cache_folder=tmp_path / "cache")
        spec = ModelSpec(name="m", source="models:/churn/3", sha256={"config.json": "0" * 64})
        before = psutil.Process().num_fds()
        assert "is in the folder" in refusal(lambda: sources.resolve(spec, on_progress=Progress()))
        assert psutil.Process().num_fds() == before
        ContentCache(tmp_path / "cache", max_bytes=100).make_room(100)
        assert list((tmp_path / "cache" / "contents").iterdir()) == []

    def test_a_damaged_copy_that_nothing_knows_of_any_more_is_replaced(
        self, script: dict[str, Any], tmp_path: Path
    ) -> None:
        """It used to be taken for what was fetched just now, and to be refused for good."""
        found = self._resolve(tmp_path, script)
        found.close()
        for record in (tmp_path / "cache" / "versions").iterdir():
            record.unlink()
        (found.folder / "config.json").write_text("[]")
        mended = self._resolve(tmp_path, script)
        assert mended.folder == found.folder
        assert (mended.folder / "config.json").read_text() == "{}"
        mended.close()

    def test_two_fetches_of_one_version_at_once_end_in_one_folder(
        self, script: dict[str, Any], tmp_path: Path
    ) -> None:
        with ThreadPoolExecutor(2) as pool:
            fetches = [pool.submit(self._resolve, tmp_path, script) for _ in range(2)]
        first, second = (fetch.result() for fetch in fetches)
        assert first.folder == second.folder
        assert first.is_verified
        assert second.is_verified
        first.check_unchanged()
        second.check_unchanged()

    def test_the_clients_process_can_load_no_model(self) -> None:
        program = """
import importlib
from server.predict.sources import mlflow_client
mlflow_client.main()
for name in ("torch", "transformers", "cloudpickle", "numpy"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name)
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input=b"", check=False, timeout=60)
        assert done.returncode == 0


def test_what_is_refused_is_refused_without_asserts_too() -> None:
    """``python -O`` leaves them out: none of them may be what keeps a file from being loaded."""
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-W", "ignore::pytest.PytestConfigWarning"]
    names = "TestNames or TestManifest or TestUnchanged or (TestFolder and not thousand)"
    command += ["-k", f"{names} or (TestMlflowFiles and not YAML)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    found = re.search(r"^(\d+) passed", done.stdout.splitlines()[-1])
    assert found is not None
    assert int(found[1]) > 150
