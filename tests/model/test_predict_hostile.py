"""What of a folder is refused, and why; nothing of it ever runs, and no reason tells where it lies."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.predict.errors import ModelRefusedError
from server.predict.messages import Task
from server.predict.options import ModelSpec
from server.worker.predict import load_text_model, text_model_bytes
from tests.model.predict_models import make_model
from tests.model.predict_support import answer, load, prepare

torch.set_num_threads(2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return make_model("bert", tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    target: Path = tmp_path / "model"
    target.mkdir()
    for path in saved.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refusal(folder: Path, **spec) -> str:
    """Return why a folder is refused; it must be, and in words that tell no path."""
    with pytest.raises(ModelRefusedError) as caught:
        load(folder, **spec)
    assert str(folder) not in caught.value.reason
    assert "/tmp" not in caught.value.reason
    return caught.value.reason


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---- code ----


def test_pickled_weights_are_refused_unread(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    assert "pickled" in refusal(folder)
    assert not canary.exists()


def test_renamed_pickle_is_refused_unread(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    assert "not a safetensors file" in refusal(folder)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "1_Pooling/config.json"])
def test_code_of_its_own_is_refused_at_any_depth(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    edit(folder / name, deeper=[{"inside": {"auto_map": {"AutoModel": "evil.Model"}}}])
    assert "code of its own" in refusal(folder)


def test_attention_kernel_of_its_own_is_refused(folder):
    edit(folder / "config.json", sub_config={"attn_implementation": "owner/kernel"})
    assert "kernel" in refusal(folder)


def test_tokenizer_class_of_its_own_is_not_looked_for(folder):
    (folder / "evil.py").write_text("raise SystemExit")
    edit(folder / "tokenizer_config.json", tokenizer_class="evil.Tokenizer")
    assert answer(load(folder), ["a river"])


# ---- weights ----


def test_cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "truncated" in refusal(folder)


@pytest.mark.parametrize("length", [0, 1 << 40, (1 << 63) - 1])
def test_header_length_that_cannot_be(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "not a safetensors file" in refusal(folder)


def test_head_that_is_missing_is_not_made_up(folder):
    def drop(tensors):
        del tensors["classifier.weight"]

    edit_weights(folder, drop)
    assert "classifier.weight" in refusal(folder)
    assert load(folder, task="embed").info.task is Task.EMBED


def test_bare_model_is_no_classifier(tmp_path):
    folder = make_model("bert-embed", tmp_path)
    for task in ("classify", "regress", "classify_tokens"):
        assert "lack" in refusal(folder, task=task)


def test_layer_that_is_missing_is_not_made_up(folder):
    def drop(tensors):
        del tensors["bert.encoder.layer.1.output.dense.weight"]

    edit_weights(folder, drop)
    assert "lack 1 tensors" in refusal(folder)
    assert "lack 1 tensors" in refusal(folder, task="embed")


def test_other_number_of_labels_than_the_head_has(folder):
    edit(folder / "config.json", id2label={"0": "a", "1": "b"}, label2id=None)
    assert "another shape" in refusal(folder)


def test_labels_that_are_not_numbered(folder):
    edit(folder / "config.json", id2label={"0": "a", "2": "b", "3": "c"}, label2id=None)
    assert "numbered" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 1 << 30},
        {"vocab_size": 1 << 40},
        {"num_hidden_layers": 1 << 30},
        {"intermediate_size": 1 << 34},
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_at_once(folder, changes):
    edit(folder / "config.json", **changes)
    assert "configuration says" in refusal(folder)


def test_numbers_of_a_type_that_is_not_served(folder):
    def shrink(tensors):
        tensors["classifier.bias"] = tensors["classifier.bias"].to(torch.float8_e4m3fn)

    edit_weights(folder, shrink)
    assert "type that is not served" in refusal(folder)


def test_quantised_checkpoint(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised" in refusal(folder)


def test_weights_that_are_no_numbers(folder):
    def spoil(tensors):
        tensors["classifier.bias"][:] = torch.nan

    edit_weights(folder, spoil)
    assert "numbers that are none" in refusal(folder)


def test_file_that_changes_while_it_is_read_is_refused(folder):
    def change(phase, done, total):
        if phase == "reading" and done == total > 0:
            os.utime(folder / "model.safetensors", ns=(1, 1))

    spec = ModelSpec(name="tested", source="tested")
    with pytest.raises(ModelRefusedError, match="changed while"):
        load_text_model(folder, root=folder, spec=spec, device="cpu", on_progress=change)


def test_file_that_is_cut_later_changes_nothing(folder):
    model = load(folder)
    prepared = prepare(model, ["a river"])
    (before,) = model.run(prepared)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    assert model.run(prepared)[0].values == before.values


# ---- links, pipes, other files ----


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_out_of_the_root_are_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    assert "links to a file outside" in refusal(folder)
    spec = ModelSpec(name="tested", source="tested")
    load_text_model(folder, root=tmp_path, spec=spec, device="cpu", on_progress=lambda *_: None)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "modules.json"])
def test_pipe_in_place_of_a_file_is_not_waited_for(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":' * 10_000, "\xff"])
def test_settings_that_are_none(folder, name, text):
    (folder / name).write_text(text, encoding="latin-1")
    refusal(folder)


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_family_that_nobody_knows(folder):
    edit(folder / "config.json", model_type="../evil")
    assert "no family" in refusal(folder)


def test_head_that_does_something_else(folder):
    edit(folder / "config.json", architectures=["BertForQuestionAnswering"])
    assert "no classifier" in refusal(folder)


def test_pooling_folder_outside_is_not_read(tmp_path):
    folder = make_model("minilm-like", tmp_path / "model")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["path"] = "../outside"
    (folder / "modules.json").write_text(json.dumps(modules))
    assert "none of this model" in refusal(folder)


def test_folder_without_fast_tokenizer_and_nothing_to_make_one_of(folder):
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(folder)


def test_tokenizer_is_made_of_the_files_of_a_slow_one(tmp_path):
    folder = make_model("bert", tmp_path)
    model = load(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer", do_lower_case=True)
    texts = ["The naïve teacher", ("one river", "two")]
    for mine, made in zip(prepare(model, texts), prepare(load(folder), texts), strict=True):
        assert mine.payload.ids.tolist() == made.payload.ids.tolist()


def test_lengths_and_dtypes_that_cannot_be(folder):
    assert "positions end at 64" in refusal(folder, max_length=65)
    assert "no room" in refusal(folder, max_length=3)
    spec = ModelSpec(name="tested", source="tested")
    with pytest.raises(ModelRefusedError, match="not available"):
        load_text_model(folder, root=folder, spec=spec, device="mps", on_progress=lambda *_: None)


# ---- manifest ----


def manifest(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def test_manifest_that_fits(tmp_path):
    folder = make_model("minilm-like", tmp_path)
    (folder / "README.md").write_text("about")
    assert load(folder, sha256=manifest(folder)).info.task is Task.EMBED
    assert load(folder, sha256={name: d.upper() for name, d in manifest(folder).items()})


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_altered_byte_of_any_file_that_is_used(folder, name):
    digests = manifest(folder)
    raw = bytearray((folder / name).read_bytes())
    # The last byte of a label, or of a weight: everything else about the file stays plausible.
    place = (
        raw.find(b"negative")
        if name == "config.json"
        else raw.rfind(b"river")
        if name == "tokenizer.json"
        else -1
    )
    raw[place] ^= 1
    (folder / name).write_bytes(raw)
    assert "manifest" in refusal(folder, sha256=digests)


def test_file_that_is_used_and_not_in_the_manifest(folder):
    digests = manifest(folder)
    del digests["tokenizer_config.json"]
    assert "tokenizer_config.json" in refusal(folder, sha256=digests)


# ---- what is told about a model ----


def test_fingerprint_says_what_answers_depend_on(folder):
    first = load(folder).info.fingerprint
    assert first == load(folder).info.fingerprint
    assert first != load(folder, dtype="bfloat16").info.fingerprint

    def nudge(tensors):
        tensors["classifier.bias"][0] += 1

    edit_weights(folder, nudge)
    second = load(folder).info.fingerprint
    edit(folder / "config.json", id2label={"0": "x", "1": "y", "2": "z"}, label2id=None)
    assert len({first, second, load(folder).info.fingerprint}) == 3


def test_size_from_headers_bounds_what_is_taken(saved):
    for dtype in ("auto", "bfloat16", "float32"):
        for executor in ("auto", "transformers"):
            spec = ModelSpec(name="tested", source="tested", dtype=dtype, executor=executor)
            bound = text_model_bytes(saved, root=saved, spec=spec)
            taken = load(saved, dtype=dtype, executor=executor).info.num_bytes
            assert taken <= bound <= 2.1 * taken + (1 << 20)


def test_progress_is_told_in_order(saved):
    told = []
    spec = ModelSpec(name="tested", source="tested")
    load_text_model(saved, root=saved, spec=spec, device="cpu", on_progress=lambda *step: told.append(step))
    size = (saved / "model.safetensors").stat().st_size
    assert [phase for phase, _, _ in told] == ["checking", "reading", "reading", "building"]
    assert told[0] == ("checking", 0, 0)
    assert told[1:] == [("reading", 0, size), ("reading", size, size), ("building", size, size)]
