"""What may be loaded, what is refused and why; nothing of a hostile folder ever runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.options import EngineOptions
from server.worker.checkpoint import hash_weights, read_weight_files
from server.worker.errors import ModelLoadError
from server.worker.loading import load_model, resolve_folder
from tests.model.families import save_tiny

torch.set_num_threads(2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    target: Path = tmp_path / "model"
    target.mkdir()
    for path in saved.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def load(folder: Path, **changes):
    return load_model(EngineOptions(model=str(folder), **{"dtype": "float32", "device": "cpu", **changes}))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Canary:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_loads_and_describes(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    loaded = load(folder)
    assert loaded.family == "llama"
    assert loaded.dtype == torch.float32
    assert loaded.eos_token_ids == (1, 7)
    assert loaded.max_model_length == 256
    assert loaded.num_parameters == sum(p.numel() for p in loaded.model.parameters())
    assert not loaded.model.training


def test_fingerprint_is_stable_and_sees_one_flipped_byte(folder):
    first = load(folder).fingerprint
    assert load(folder).fingerprint == first
    assert load(folder, dtype="bfloat16").fingerprint != first
    edit(folder / "config.json", transformers_version="4.0.0")
    assert load(folder).fingerprint == first
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    flipped = load(folder).fingerprint
    assert flipped != first
    edit(folder / "config.json", rms_norm_eps=1e-3)
    assert load(folder).fingerprint not in (first, flipped)


def test_random_weights_need_no_weight_files(folder):
    (folder / "model.safetensors").unlink()
    first, again = load(folder, random_weights=True, seed=5), load(folder, random_weights=True, seed=5)
    other = load(folder, random_weights=True, seed=6)
    weights = [m.model.get_input_embeddings().weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_random_weights_leave_the_global_generator_alone(folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    load(folder, random_weights=True)
    assert torch.rand(1) == expected


def test_float16_on_cpu_becomes_float32_with_a_note(folder):
    loaded = load(folder, dtype="float16")
    assert loaded.dtype == torch.float32
    assert any("float16" in note for note in loaded.notes)


def test_auto_dtype_is_the_checkpoints(folder):
    load(folder).model.to(torch.bfloat16).save_pretrained(folder)
    assert load(folder, dtype="auto").dtype == torch.bfloat16


def test_pickled_weights_are_refused_and_do_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ModelLoadError, match="pickled"):
        load(folder)
    assert not canary.exists()


def test_renamed_pickle_is_refused_and_does_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ModelLoadError, match="not a safetensors file"):
        load(folder)
    torch.save({"w": torch.ones(3)}, path)
    with pytest.raises(ModelLoadError, match="not a safetensors file"):
        load(folder)
    assert not canary.exists()


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "where", ["config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_code_of_its_own_is_refused_and_does_not_run(folder, tmp_path, where, nested):
    canary = tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    asks = {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}}
    path = folder / where
    if not path.exists():
        path.write_text("{}")
    edit(path, **({"text_config": [{"deep": asks}]} if nested else asks))
    with pytest.raises(ModelLoadError, match="auto_map"):
        load(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    "value", ["someone/kernel", {"text_config": "kernels-community/x"}, "paged|someone/kernel@main:fn"]
)
@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_attention_kernel_of_its_own_is_refused(folder, key, value):
    edit(folder / "config.json", **{key: value})
    with pytest.raises(ModelLoadError, match="kernel"):
        load(folder)


def test_adapter_folder_is_refused(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    with pytest.raises(ModelLoadError, match="adapter"):
        load(folder)


def test_quantised_checkpoint_is_refused(folder):
    edit(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelLoadError, match="quantised"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "not a causal"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder"),
        ({"model_type": "vit"}, "not a causal"),
        ({"model_type": "never_heard_of"}, "can not be used"),
        ({"num_attention_heads": "many"}, "can not be used"),
    ],
)
def test_models_of_another_kind_are_refused(folder, changes, reason):
    edit(folder / "config.json", **changes)
    with pytest.raises(ModelLoadError, match=reason):
        load(folder)


def test_missing_tensor_is_refused_rather_than_made_up(folder):
    edit(folder / "config.json", num_hidden_layers=4, layer_types=None)
    with pytest.raises(ModelLoadError, match="missing"):
        load(folder)


def test_tensor_of_another_shape_is_refused(folder):
    edit(folder / "config.json", intermediate_size=64)
    with pytest.raises(ModelLoadError):
        load(folder)


def header(entries: object, *, data: bytes = b"") -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw)) + raw + data


F32_4 = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "short": b"\x08\0\0",
        "header of 2**63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
        "header longer than the file": struct.pack("<Q", 1000) + b"{}",
        "header is a list": header([]),
        "header is not JSON": struct.pack("<Q", 4) + b"{{{{",
        "header is deep": struct.pack("<Q", 200_000) + b'{"a":' * 40_000,
        "truncated": header({"a": F32_4}, data=b"\0" * 12),
        "bytes behind": header({"a": F32_4}, data=b"\0" * 20),
        "overlap": header({"a": F32_4, "b": {**F32_4, "data_offsets": [8, 24]}}, data=b"\0" * 24),
        "gap": header({"a": F32_4, "b": {**F32_4, "data_offsets": [20, 36]}}, data=b"\0" * 36),
        "size is not shape times type": header({"a": {**F32_4, "shape": [5]}}, data=b"\0" * 16),
        "negative": header({"a": {**F32_4, "shape": [-4]}}, data=b"\0" * 16),
        "backwards": header({"a": {**F32_4, "data_offsets": [16, 0]}}, data=b"\0" * 16),
        "overflow": header({"a": {**F32_4, "shape": [2**40, 2**40]}}, data=b"\0" * 16),
        "unknown type": header({"a": {**F32_4, "dtype": "PICKLE"}}, data=b"\0" * 16),
        "entry is a number": header({"a": 7}),
        "a bool is no number": header({"a": {**F32_4, "shape": [True]}}, data=b"\0" * 16),
    }.values(),
)
def test_damaged_safetensors_are_refused(folder, content):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError):
        load(folder)


def test_too_many_tensors_are_refused(folder):
    entries = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_001)}
    (folder / "model.safetensors").write_bytes(header(entries))
    with pytest.raises(ModelLoadError, match="more than"):
        load(folder)


def test_link_out_of_the_folder_is_refused(folder, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)
    with pytest.raises(ModelLoadError, match="outside"):
        load(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "weights.bin", "gone.safetensors"])
def test_index_names_only_safetensors_of_the_folder(folder, name):
    index = {"weight_map": {"a": "model.safetensors", "b": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError):
        load(folder)


def test_weights_in_several_files_load(folder):
    model = load(folder).model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    again = load(folder).model
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_file_swapped_while_it_is_read_is_noticed(folder):
    (file,) = read_weight_files(folder, root=folder)
    file.check_unchanged()
    (folder / "other").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "other").replace(folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="changed"):
        file.check_unchanged()


def test_large_weights_are_sampled(folder, monkeypatch):
    files = read_weight_files(folder, root=folder)
    complete, is_complete = hash_weights(files)
    assert is_complete
    monkeypatch.setattr("server.worker.checkpoint._COMPLETE_HASH_BYTES", 10)
    monkeypatch.setattr("server.worker.checkpoint._SAMPLE_BYTES", 16)
    sampled, is_complete = hash_weights(files)
    assert not is_complete
    assert sampled != complete
    assert hash_weights(files)[0] == sampled


def test_hub_that_can_not_be_reached_gives_a_reason(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelLoadError, match="can not be reached"):
        load_model(EngineOptions(model="someone/some-model"))


def test_hub_fetches_no_pickles_and_passes_the_revision_on(monkeypatch, folder):
    import huggingface_hub

    asked: dict[str, Any] = {}

    def fetch(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    notes: list[str] = []
    assert resolve_folder("someone/some-model", "abc", notes) == (folder, folder.parent.parent)
    assert asked["name"] == "someone/some-model"
    assert asked["revision"] == "abc"
    assert not any(p.endswith((".bin", ".pt", ".py", "*")) for p in asked["patterns"])
    assert notes == ["revision model"]


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, "../../nothing/here", "/no/such/folder", "a b c"])
def test_names_of_nothing_are_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelLoadError):
        load_model(EngineOptions(model=name))


def test_length_beyond_the_models_is_refused(folder):
    assert load(folder, max_model_length=100).max_model_length == 100
    with pytest.raises(ModelLoadError, match="256"):
        load(folder, max_model_length=300)


def test_device_that_is_not_there_is_refused(folder):
    with pytest.raises(ModelLoadError, match="not a device"):
        load(folder, device="quantum")
    if not torch.cuda.is_available():
        with pytest.raises(ModelLoadError, match="not available"):
            load(folder, device="cuda")
