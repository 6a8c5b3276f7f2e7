"""Load a model: find its folder, check it, choose device and dtype, build it, name it.

Nothing from a model's folder is executed: safetensors weights only, no remote code, no kernels of its
own (:mod:`server.worker.checkpoint`). A folder that fails a check is refused before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from server.engine.options import EngineOptions
from server.process.memory import available_host_bytes
from server.worker.checkpoint import WeightFile, check_config_files, hash_weights, read_weight_files
from server.worker.errors import ModelLoadError
from server.worker.placement import DTYPES, choose_device, num_elements, stored_dtype

__all__ = ["BUILTIN_FOLDER", "LoadedModel", "load_model", "resolve_folder"]

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
_FALLBACK_MAX_LENGTH = 2048
_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}

logger = logging.getLogger(__name__)
hf_logging.disable_progress_bar()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, on its device, in evaluation mode, and what is known about it."""

    model: PreTrainedModel
    config: PreTrainedConfig
    """Of the text part, where a model has several."""
    folder: Path
    device: torch.device
    dtype: torch.dtype
    family: str
    fingerprint: str
    """SHA-256, hex: configuration, dtype, tensor names, shapes and contents (or the seed)."""
    num_parameters: int
    eos_token_ids: tuple[int, ...]
    max_model_length: int
    notes: list[str] = field(default_factory=list)


def load_model(options: EngineOptions) -> LoadedModel:
    """Load what ``options`` name. Blocks; raises ``ModelLoadError`` with a reason fit for an operator."""
    notes: list[str] = []
    folder, root = resolve_folder(
        options.model, options.revision, notes, needs_weights=not options.random_weights
    )
    check_config_files(folder)
    config = _read_config(folder)
    device = choose_device(options.device)
    files = [] if options.random_weights else read_weight_files(folder, root=root)
    dtype = _choose_dtype(options.dtype, config, files, device, notes)
    if options.random_weights:
        model = _build_random(config, dtype, device, options.seed)
        contents = f"random:{options.seed}"
        notes.append("weights are random: outputs mean nothing")
    else:
        model = _load_weights(folder, config, files, dtype, device, notes)
        contents, is_complete = hash_weights(files)
        if not is_complete:
            notes.append("the weights exceed 4 GiB: the fingerprint covers both ends of each tensor")
        for file in files:
            file.check_unchanged()
    text_config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        config=text_config,
        folder=folder,
        device=device,
        dtype=dtype,
        family=str(config.model_type),
        fingerprint=_fingerprint(folder, dtype, contents),
        num_parameters=sum(p.numel() for p in model.parameters()),
        eos_token_ids=_eos_token_ids(folder, text_config),
        max_model_length=_max_model_length(options, text_config, notes),
        notes=notes,
    )


def resolve_folder(
    name: str, revision: str | None, notes: list[str], *, needs_weights: bool = True
) -> tuple[Path, Path]:
    """Return a model's folder, and the folder that links in it must stay below.

    ``name`` is "builtin", a local folder, or a name on the hub (fetched, or taken from its cache).
    """
    if name == "builtin":
        folder = BUILTIN_FOLDER
    elif "\0" in name or not name or len(name) > 4096:
        raise ModelLoadError("the model's name is not well formed")
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    else:
        return _fetch(name, revision, notes, needs_weights=needs_weights)
    if revision is not None:
        raise ModelLoadError("a revision was given for a local folder; only hub names have revisions")
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{folder} has no config.json")
    return folder, folder


def _fetch(name: str, revision: str | None, notes: list[str], *, needs_weights: bool) -> tuple[Path, Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"] + (["*.safetensors"] if needs_weights else [])
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise ModelLoadError(f"{name!r} is neither a folder nor a name on the hub") from None
    except GatedRepoError:
        raise ModelLoadError(f"{name!r} asks for a licence to be accepted on the hub first") from None
    except RevisionNotFoundError:
        raise ModelLoadError(f"{name!r} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ModelLoadError(f"{name!r} is not on the hub (or its access token is missing)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        logger.info("fetching %s failed", name, exc_info=error)
        raise ModelLoadError(
            f"{name!r} is no folder, and the hub can not be reached; name a folder or fill the hub cache"
        ) from None
    if not (folder / "config.json").is_file():
        raise ModelLoadError(f"{name!r} has no config.json")
    notes.append(f"revision {folder.name}")
    # The cache's snapshots are links into a sibling folder of blobs: <repository>/{snapshots/<hash>, blobs}.
    return folder, folder.parent.parent


def _read_config(folder: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        logger.info("reading the configuration failed", exc_info=error)
        raise ModelLoadError(
            f"the configuration can not be used by this version of transformers ({type(error).__name__})"
        ) from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelLoadError(f"{config.model_type!r} is not a causal language model")
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{config.model_type!r} has an encoder; only decoder-only models are served")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelLoadError("the checkpoint is quantised; only float32, bfloat16 and float16 are served")
    return config


def _choose_dtype(
    wanted: str, config: PreTrainedConfig, files: list[WeightFile], device: torch.device, notes: list[str]
) -> torch.dtype:
    if wanted != "auto":
        if wanted not in DTYPES:
            raise ModelLoadError(f"{wanted!r} is not one of {', '.join(DTYPES)}")
        dtype = DTYPES[wanted]
    else:
        stated = config.dtype if isinstance(config.dtype, torch.dtype) else None
        dtype = stated or stored_dtype(files)
        if dtype not in DTYPES.values():
            dtype = torch.float32
    if dtype == torch.float16 and device.type == "cpu":
        notes.append("float16 is computed as float32 on CPU")
        dtype = torch.float32
    return dtype


def _build_random(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
        except Exception as error:
            logger.info("building the model failed", exc_info=error)
            raise ModelLoadError(
                f"no model can be built from the configuration ({type(error).__name__})"
            ) from None
    return model.to(device).eval()


def _load_weights(
    folder: Path,
    config: PreTrainedConfig,
    files: list[WeightFile],
    dtype: torch.dtype,
    device: torch.device,
    notes: list[str],
) -> PreTrainedModel:
    needed = num_elements(files) * torch.empty(0, dtype=dtype).element_size()
    free = available_host_bytes()
    if device.type == "cpu" and needed > free:
        raise ModelLoadError(f"the weights take {needed >> 20} MiB; {free >> 20} MiB are free")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
        model = model.to(device).eval()
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelLoadError(f"the weights do not fit the memory of {device}") from None
    except Exception as error:
        logger.info("loading the weights failed", exc_info=error)
        raise ModelLoadError(f"the weights can not be loaded ({type(error).__name__})") from None
    wrong = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if wrong:
        raise ModelLoadError(f"{len(wrong)} tensors are missing or misshapen, among them {sorted(wrong)[0]}")
    if info["unexpected_keys"]:
        notes.append(f"{len(info['unexpected_keys'])} tensors of the checkpoint are not used")
    result: PreTrainedModel = model
    return result


def _fingerprint(folder: Path, dtype: torch.dtype, contents: str) -> str:
    config = json.loads((folder / "config.json").read_bytes())
    stable = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}
    text = json.dumps([stable, str(dtype), contents], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the ids that end a text, of both files: either may name some that the other lacks."""
    named: list[Any] = [getattr(config, "eos_token_id", None)]
    path = folder / "generation_config.json"
    if path.is_file():
        named.append(json.loads(path.read_bytes()).get("eos_token_id"))
    listed = [value if isinstance(value, list) else [value] for value in named]
    ids = {i for values in listed for i in values if isinstance(i, int)}
    return tuple(sorted(ids))


def _max_model_length(options: EngineOptions, config: PreTrainedConfig, notes: list[str]) -> int:
    own = getattr(config, "max_position_embeddings", None)
    wanted = options.max_model_length
    if not isinstance(own, int) or own <= 0:
        own = wanted or _FALLBACK_MAX_LENGTH
        notes.append(f"the model states no maximum length; {own} is assumed")
    if wanted is not None and wanted > own:
        raise ModelLoadError(f"the model's positions end at {own}; {wanted} were asked for")
    return wanted or own
