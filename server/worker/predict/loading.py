"""Load a text model for Predict from a local folder that a source has fetched or found.

::

    checking    names, links, headers, settings; nothing of the weights is read yet
    reading     each weight file once, into memory; a thread hashes what has been read
    building    the module over those tensors, without initialising anything; tokenizer; a probe

Nothing of the folder is executed. The precision "auto" is that in which the weights are stored, but float32
for float16 on a CPU, which is slow at it; what is asked for by name is done.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import msgspec
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from server.predict.errors import ModelRefusedError
from server.predict.messages import ModelInfo, Task
from server.predict.model import LoadProgress
from server.predict.options import ModelSpec
from server.process.memory import available_host_bytes
from server.worker.checkpoint import WeightFile, read_weight_files
from server.worker.errors import ModelLoadError, WorkerStartError
from server.worker.placement import DTYPES, choose_device, num_elements, stored_dtype
from server.worker.predict.executor_choice import NativeDisagreesError, choose_executor
from server.worker.predict.executors import Executor, num_token_ids, position_offset
from server.worker.predict.folder import ModelFolder
from server.worker.predict.model import TextModel
from server.worker.predict.recipe import Recipe, max_length, read_config, read_recipe
from server.worker.predict.tokenizer import TextTokenizer, TokenizerFiles, read_tokenizer_files
from server.worker.predict.weights import WeightReader, Weights

__all__ = ["load_text_model", "text_model_bytes"]

_BUFFER_BYTES = 1 << 20
"""For tables that a family makes itself (positions, rotations)."""

_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}

_ONE_AT_A_TIME = Lock()
"""transformers imports families when they are first used; from two threads at once such imports can see each
other half done. It also patches its classes while it builds (``tie_weights``, the default dtype): of two at
once one misses its tied weights, and the patches may stay. Reading is left outside: it takes long."""

logger = logging.getLogger(__name__)
hf_logging.disable_progress_bar()
# Reports of unused tensors: notes of the model say that.
hf_logging.set_verbosity_error()


def load_text_model(
    folder: Path, *, root: Path, spec: ModelSpec, device: str, on_progress: LoadProgress
) -> TextModel:
    """Load. Blocks; ``on_progress`` is called in this thread. Raises ``ModelRefusedError``."""
    with _refusals():
        notes: list[str] = []
        try:
            return _load(folder, root, spec, device, on_progress, notes)
        except NativeDisagreesError as error:
            notes = [f"{error}; transformers computes the model"]
        spec = msgspec.structs.replace(spec, executor="transformers")
        return _load(folder, root, spec, device, on_progress, notes)


def text_model_bytes(folder: Path, *, root: Path, spec: ModelSpec) -> int:
    """Return an upper bound of the memory that the model takes once loaded, from headers alone.

    Raises ``ModelRefusedError``.
    """
    with _refusals():
        files = read_weight_files(folder, root=root)
        # The device is not known here; a CPU computes float16 as float32 unless asked otherwise.
        dtype = _choose_dtype(spec.dtype, files, torch.device("cpu"), [])
        num_bytes = num_elements(files) * dtype.itemsize
        # The native executor packs matrices into tiles, the last of which may be partly empty.
        return _BUFFER_BYTES + (num_bytes if spec.executor == "transformers" else num_bytes * 9 // 8)


@contextmanager
def _refusals() -> Iterator[None]:
    """Translate the worker's refusals; their reasons hold names of files, never paths."""
    try:
        yield
    except WorkerStartError as error:
        raise ModelRefusedError(error.reason) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelRefusedError("the weights do not fit the memory") from None
    except OSError as error:
        logger.info("reading a model's folder failed", exc_info=error)
        raise ModelRefusedError("the model's files can not be read") from None


@dataclass(frozen=True, slots=True)
class _Parts:
    """What was found out before any weight is read."""

    folder: ModelFolder
    files: list[WeightFile]
    config: PreTrainedConfig
    recipe: Recipe
    tokenizer: TokenizerFiles
    device: torch.device
    dtype: torch.dtype


def _load(
    folder: Path, root: Path, spec: ModelSpec, device: str, on_progress: LoadProgress, notes: list[str]
) -> TextModel:
    on_progress("checking", 0, 0)
    with _ONE_AT_A_TIME:
        parts = _check(folder, root, spec, device, notes)
    total = sum(file.num_bytes for file in parts.files)
    with (
        WeightReader(needs_digests=parts.folder.has_manifest) as reader,
        ThreadPoolExecutor(1, thread_name_prefix="kvserve-tokenizer") as pool,
    ):
        tokenizing = pool.submit(parts.tokenizer.build, lower_case=parts.recipe.lower_case)
        on_progress("reading", 0, total)
        weights = reader.read(parts.files, on_bytes=lambda done: on_progress("reading", done, total))
        on_progress("building", total, total)
        with _ONE_AT_A_TIME:
            model = _build(parts, weights, notes)
            # The module holds what it uses; a second holder would keep what the native executor gives back.
            weights.tensors.clear()
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            tokenizer = tokenizing.result()
            length = _limit(tokenizer, parts, model, spec, notes)
            executor = choose_executor(
                model,
                parts.recipe,
                tokenizer,
                dtype=parts.dtype,
                wanted=spec.executor,
                max_length=length,
                notes=notes,
            )
        digests, contents = weights.digests(), weights.contents()
    for name, digest in digests.items():
        parts.folder.check_digest(name, digest)
    info = _describe(parts, model, contents, num_parameters, executor, length, notes)
    return TextModel(info, parts.recipe, tokenizer, executor, num_ids=num_token_ids(model))


def _limit(
    tokenizer: TextTokenizer, parts: _Parts, model: PreTrainedModel, spec: ModelSpec, notes: list[str]
) -> int:
    offset = position_offset(model)
    length = max_length(parts.recipe, parts.config, wanted=spec.max_length, offset=offset, notes=notes)
    tokenizer.limit(length)
    return length


def _check(folder: Path, root: Path, spec: ModelSpec, device: str, notes: list[str]) -> _Parts:
    checked = ModelFolder(folder, root=root, manifest=spec.sha256)
    files = read_weight_files(folder, root=root)
    config = read_config(checked, files, notes)
    recipe = read_recipe(checked, config, spec, notes)
    tokenizer = read_tokenizer_files(checked, config)
    place = choose_device(device)
    dtype = _choose_dtype(spec.dtype, files, place, notes)
    needed = sum(file.num_bytes for file in files)
    if dtype != stored_dtype(files):
        needed += num_elements(files) * dtype.itemsize
    if needed > (free := available_host_bytes()):
        raise ModelLoadError(f"the weights take {needed >> 20} MiB; {free >> 20} MiB are free")
    return _Parts(checked, files, config, recipe, tokenizer, place, dtype)


def _choose_dtype(
    wanted: str, files: list[WeightFile], device: torch.device, notes: list[str]
) -> torch.dtype:
    if wanted != "auto":
        if wanted not in DTYPES:
            raise ModelLoadError(f"{wanted!r} is not one of {', '.join(DTYPES)}")
        return DTYPES[wanted]
    dtype = stored_dtype(files)
    if dtype == torch.float16 and device.type == "cpu":
        notes.append("float16 is computed as float32 on a CPU")
        return torch.float32
    return dtype


def _build(parts: _Parts, weights: Weights, notes: list[str]) -> PreTrainedModel:
    """Make the module over the tensors that were read. Raises ``ModelLoadError``."""
    recipe = parts.recipe
    settings: dict[str, Any] = {}
    accepted = inspect.signature(recipe.model_class.__init__).parameters
    if recipe.task is Task.EMBED and "add_pooling_layer" in accepted:
        # Vectors come from the last hidden states; a pooler would only take memory.
        settings["add_pooling_layer"] = False
    parts.config.use_cache = False
    try:
        # Keys of other versions are renamed and experts fused in there; equal types are taken as they are.
        model, found = recipe.model_class.from_pretrained(
            None,
            config=parts.config,
            state_dict=weights.tensors,
            dtype=parts.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a family's constructor raises
        logger.info("building the model failed", exc_info=error)
        raise ModelLoadError(
            f"no model can be built from the configuration ({type(error).__name__})"
        ) from None
    misshapen = sorted(str(key[0]) for key in found["mismatched_keys"])
    if misshapen:
        raise ModelLoadError(
            f"{len(misshapen)} tensors have another shape than the configuration says, among them"
            f" {misshapen[0]}"
        )
    # What is missing would be random numbers.
    missing = sorted(
        key for key in found["missing_keys"] if recipe.task is not Task.EMBED or "pooler" not in key
    )
    if missing:
        raise ModelLoadError(
            f"the weights lack {len(missing)} tensors for the task {recipe.task.value!r}, among them"
            f" {missing[0]}"
        )
    if found["unexpected_keys"]:
        notes.append(f"{len(found['unexpected_keys'])} tensors of the checkpoint are not used")
    if recipe.task is Task.EMBED and model.config.is_encoder_decoder:
        model = model.get_encoder()
    result: PreTrainedModel = model.to(parts.device).eval()
    return result


def _describe(
    parts: _Parts,
    model: PreTrainedModel,
    contents: dict[str, str],
    num_parameters: int,
    executor: Executor,
    length: int,
    notes: list[str],
) -> ModelInfo:
    recipe = parts.recipe
    num_dimensions = {
        Task.EMBED: int(model.config.get_text_config().hidden_size),
        Task.REGRESS: len(recipe.labels),
    }
    return ModelInfo(
        task=recipe.task,
        family=str(parts.config.model_type),
        labels=() if recipe.task is Task.REGRESS else recipe.labels,
        multi_label=recipe.multi_label,
        num_dimensions=num_dimensions.get(recipe.task, 0),
        max_length=length,
        pooling=recipe.pooling,
        normalized=recipe.normalize,
        fingerprint=_fingerprint(parts, contents),
        num_parameters=num_parameters,
        num_bytes=_held_bytes(model) + executor.num_bytes,
        dtype=str(parts.dtype).removeprefix("torch."),
        device=str(parts.device),
        executor=executor.name,
        notes=tuple(notes),
    )


def _held_bytes(model: PreTrainedModel) -> int:
    storages = {
        storage.data_ptr(): storage.nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
        if (storage := tensor.untyped_storage())
    }
    return sum(storages.values())


def _fingerprint(parts: _Parts, contents: dict[str, str]) -> str:
    """Return a SHA-256 over all that decides what the model answers."""
    stable = {k: v for k, v in parts.folder.read_settings("config.json").items() if k not in _VOLATILE_CONFIG}
    recipe = parts.recipe
    tokenizer = hashlib.sha256(parts.folder.read("tokenizer.json") or b"").hexdigest()
    told = [recipe.task.value, recipe.pooling, recipe.normalize, recipe.lower_case]
    text = json.dumps([stable, str(parts.dtype), sorted(contents.items()), tokenizer, told], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
