"""What a model is for, by its own configuration: task, labels, pooling, length.

::

    the spec's task                             wins
    modules.json of sentence-transformers       embed, with its pooling and length
    ...ForSequenceClassification                regress (problem_type "regression", or one label) or classify
    ...ForTokenClassification                   classify_tokens
    a bare model, or one that predicts tokens   embed
    any other head                              refused
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from server.predict.messages import Task
from server.predict.options import ModelSpec
from server.worker.checkpoint import WeightFile
from server.worker.errors import ModelLoadError
from server.worker.predict.folder import ModelFolder

__all__ = ["Recipe", "max_length", "read_config", "read_recipe"]

_FALLBACK_MAX_LENGTH = 512
_NO_LENGTH = 1_000_000
_MAX_LABELS = 100_000
_BODIES = re.compile(r".*(Model|ForMaskedLM|ForPreTraining|ForCausalLM|LMHeadModel|ForConditionalGeneration)")
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_SENTENCE_MODULES = {"Transformer", "Pooling", "Normalize"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How texts become answers."""

    task: Task
    model_class: Any
    labels: tuple[str, ...]
    multi_label: bool
    pooling: str
    """"mean", "cls" or "last" for the task EMBED; else empty."""
    normalize: bool
    lower_case: bool
    stated_length: int | None
    """Longest input by the files beside the configuration."""


def read_config(folder: ModelFolder, files: list[WeightFile], notes: list[str]) -> PreTrainedConfig:
    """Return the configuration. Raises ``ModelLoadError``: unknown, quantised, or not that of the weights."""
    settings = folder.read_settings("config.json")
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise ModelLoadError("the configuration names no family that this version of transformers knows")
    if settings.get("quantization_config") is not None:
        raise ModelLoadError("the checkpoint is quantised; only float32, bfloat16 and float16 are served")
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        settings.pop(key, None)
    try:
        config = CONFIG_MAPPING[family].from_dict(settings)
    except Exception as error:  # whatever its checks raise
        raise ModelLoadError(f"the configuration can not be used ({type(error).__name__})") from error
    _check_sizes(config, files)
    if config.get_text_config() is not config:
        notes.append("the text part of a model with several is served")
    return config


def _check_sizes(config: PreTrainedConfig, files: list[WeightFile]) -> None:
    """Refuse sizes that the weights do not have, before anything of that size is made."""
    shapes = [tensor.shape for file in files for tensor in file.tensors]
    largest = max((n for shape in shapes for n in shape), default=0)
    text = config.get_text_config()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_labels"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > max(largest, 1):
            raise ModelLoadError(f"the configuration says {name} {value}; no tensor is that large")
    layers = getattr(text, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > max(len(shapes), 1):
        raise ModelLoadError(f"the configuration says {layers} layers; there are {len(shapes)} tensors")


def read_recipe(folder: ModelFolder, config: PreTrainedConfig, spec: ModelSpec, notes: list[str]) -> Recipe:
    """Return what the model does. Raises ``ModelLoadError``."""
    pooling, sentence_settings = _sentence_files(folder, spec)
    task = Task(spec.task) if spec.task is not None else _own_task(config, is_sentence=bool(pooling))
    lengths = [
        folder.read_settings("tokenizer_config.json").get("model_max_length"),
        sentence_settings.get("max_seq_length"),
    ]
    stated = [n for n in lengths if isinstance(n, int | float) and 0 < n < _NO_LENGTH]
    if task is Task.EMBED:
        labels: tuple[str, ...] = ()
        default = folder.read_settings("config_sentence_transformers.json").get("default_prompt_name")
        if default is not None:
            notes.append("the prompt that sentence-transformers puts before texts is not added")
    else:
        labels = _labels(config)
    # One label of a classifier is a yes or no.
    multi_label = task is Task.CLASSIFY and (
        config.problem_type == "multi_label_classification" or len(labels) == 1
    )
    return Recipe(
        task=task,
        model_class=_model_class(task, config),
        labels=labels,
        multi_label=multi_label,
        pooling=(spec.pooling or pooling or "mean") if task is Task.EMBED else "",
        normalize=task is Task.EMBED and spec.normalize is not False,
        lower_case=sentence_settings.get("do_lower_case") is True,
        stated_length=int(min(stated)) if stated else None,
    )


def max_length(
    recipe: Recipe, config: PreTrainedConfig, *, wanted: int | None, offset: int, notes: list[str]
) -> int:
    """Return the longest input in tokens. ``offset``: positions that the family leaves out."""
    text = config.get_text_config()
    own = next(
        (
            n
            for name in ("max_position_embeddings", "n_positions")
            if isinstance(n := getattr(text, name, None), int) and n > 0
        ),
        None,
    )
    positions = None if own is None else own - offset
    if wanted is not None:
        # Relative positions alone (T5) have no end; what is stated is what it was trained on.
        if positions is not None and wanted > positions and not _is_relative(text):
            raise ModelLoadError(f"the model's positions end at {positions}; {wanted} were asked for")
        return wanted
    found = [n for n in (positions, recipe.stated_length) if n is not None]
    if not found:
        notes.append(f"the model states no maximum length; {_FALLBACK_MAX_LENGTH} is assumed")
    return min(found, default=_FALLBACK_MAX_LENGTH)


def _is_relative(config: Any) -> bool:
    return getattr(config, "relative_attention_num_buckets", None) is not None and hasattr(config, "d_kv")


def _own_task(config: PreTrainedConfig, *, is_sentence: bool) -> Task:
    if is_sentence:
        return Task.EMBED
    name = str((config.architectures or ["Model"])[0])
    if name.endswith("ForSequenceClassification"):
        is_regression = config.problem_type == "regression" or (
            config.problem_type is None and config.num_labels == 1
        )
        return Task.REGRESS if is_regression else Task.CLASSIFY
    if name.endswith("ForTokenClassification"):
        return Task.CLASSIFY_TOKENS
    if _BODIES.fullmatch(name):
        return Task.EMBED
    raise ModelLoadError(
        f"{name[:100]!r} is no classifier of texts or tokens; give the task to have it embed texts"
    )


def _model_class(task: Task, config: PreTrainedConfig) -> Any:
    if task is Task.EMBED:
        # Of a model with two halves the first one reads texts.
        tables = [MODEL_FOR_TEXT_ENCODING_MAPPING] if config.is_encoder_decoder else []
        tables.append(MODEL_MAPPING)
    elif task is Task.CLASSIFY_TOKENS:
        tables = [MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING]
    else:
        tables = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING]
    for table in tables:
        if type(config) in table:
            found = table[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelLoadError(f"family {config.model_type!r} has no model for the task {task.value!r}")


def _labels(config: PreTrainedConfig) -> tuple[str, ...]:
    labels = config.id2label or {}
    if not 0 < len(labels) <= _MAX_LABELS or sorted(labels) != list(range(len(labels))):
        raise ModelLoadError("the configuration's labels are not numbered from 0 on")
    return tuple(str(labels[i]) for i in range(len(labels)))


def _sentence_files(folder: ModelFolder, spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """Return pooling (empty: not a folder of sentence-transformers) and settings."""
    modules = folder.read_json("modules.json")
    if modules is None:
        return "", {}
    try:
        listed = [(str(module["type"]).rpartition("."), str(module["path"])) for module in modules]
    except (TypeError, KeyError):
        raise ModelLoadError("modules.json is not a list of modules") from None
    pooling = ""
    for (package, _, kind), path in listed:
        if package.split(".")[0] != "sentence_transformers" or kind not in _SENTENCE_MODULES:
            raise ModelLoadError(f"modules.json names a module that is not served ({kind[:100]!r})")
        if kind == "Transformer" and path.strip("./"):
            raise ModelLoadError("the weights of this sentence model lie in a folder below; name that one")
        if kind == "Pooling":
            if not re.fullmatch(r"[A-Za-z0-9_]{1,100}", path):
                raise ModelLoadError("modules.json names a folder that is none of this model's")
            pooling = _pooling(folder.read_settings(f"{path}/config.json"), spec)
    return pooling or "mean", folder.read_settings("sentence_bert_config.json")


def _pooling(settings: dict[str, Any], spec: ModelSpec) -> str:
    modes = settings.get("pooling_mode")
    if modes is None:
        names = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value]
    else:
        aliases = {"mean": "mean_tokens", "cls": "cls_token"}
        names = [f"pooling_mode_{aliases.get(m, m)}" for m in (modes if isinstance(modes, list) else [modes])]
    if spec.pooling is None and (len(names) != 1 or names[0] not in _POOLINGS):
        raise ModelLoadError(
            "the model pools in a way that is not served; give mean, cls or last to override"
        )
    return spec.pooling or _POOLINGS[names[0]]
