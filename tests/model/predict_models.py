"""Small random models of the families that Predict serves, as folders, with real tokenizers made on the spot.

A kind is ``family`` or ``family-task``: "bert", "gpt2", "bert-tokens", "roberta-regression",
"bert-multilabel", "bert-embed"; a family alone is a classifier of three labels. "minilm-like" is a folder
of sentence-transformers. Same kind, seed and overrides: same weights.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers import AutoModelForSequenceClassification as SequenceModel
from transformers import AutoModelForTokenClassification as TokenModel
from transformers.utils import logging as hf_logging

__all__ = ["FAMILIES", "make_model", "make_tokenizer", "sample_pairs", "sample_texts"]

hf_logging.disable_progress_bar()

_VOCABULARY = """
the a one this that my your some river mountain engine letter garden window number signal market winter summer
doctor teacher animal planet music paper coffee station bridge forest island ocean small large quick slow
bright quiet strange honest red blue green early late never always often reads writes opens closes moves finds
keeps loses sends answers repairs remembers and or but because before after under over without between
naïve café straße 東京 улица 1984 3.14 don't co-operate tokenizer unbelievable
"""
WORDS = tuple(_VOCABULARY.split())

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_DECODER = {"num_key_value_heads": 2}
_BERT_STYLE = ("wordpiece", "[CLS]", "[SEP]")
_ROBERTA_STYLE = ("bytes", "<s>", "</s>")

FAMILIES: dict[str, tuple[tuple[str, str, str], dict[str, Any]]] = {
    # family: (tokenizer, what starts a text, what ends it), values of the configuration
    "bert": (_BERT_STYLE, {}),
    "distilbert": (_BERT_STYLE, {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}),
    "electra": (_BERT_STYLE, {"embedding_size": 24}),
    # Positions of these begin after the padding id.
    "mpnet": (("wordpiece", "<s>", "</s>"), {"max_position_embeddings": 66}),
    "roberta": (_ROBERTA_STYLE, {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "xlm-roberta": (("unigram", "<s>", "</s>"), {"max_position_embeddings": 66, "type_vocab_size": 1}),
    "deberta": (
        ("bytes", "[CLS]", "[SEP]"),
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
    ),
    "deberta-v2": (
        ("unigram", "[CLS]", "[SEP]"),
        {
            "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0,
            "position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu",
        },
    ),
    "albert": (("unigram", "[CLS]", "[SEP]"), {"embedding_size": 24}),
    "modernbert": (
        _BERT_STYLE,
        {
            "num_hidden_layers": 4, "global_attn_every_n_layers": 3, "local_attention": 8,
            "cls_token_id": None, "sep_token_id": None,
        },
    ),
    "gpt2": (("bytes", "", ""), {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": (("bytes", "<s>", ""), _DECODER),
    "qwen2": (("qwen", "", ""), _DECODER),
    "t5": (
        ("unigram", "", "</s>"),
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "n_positions": 64},
    ),
    "bart": (
        _ROBERTA_STYLE,
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.3,
        },
    ),
}  # fmt: skip

_TYPED = ("bert", "electra", "albert", "deberta", "deberta-v2")
"""Whose tokenizers say which text of a pair a token is from."""
_LABELS = {0: "negative", 1: "neutral", 2: "positive"}
_ENTITIES = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


def make_model(kind: str, folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model of ``kind`` with its tokenizer to ``folder``, and return the folder.

    ``overrides`` are values of the configuration, such as ``hidden_size``, ``num_hidden_layers`` or
    ``id2label``; ``num_labels`` makes that many labels, "LABEL_0" and so on.
    """
    family, _, task = ("bert", "", "minilm") if kind == "minilm-like" else kind.rpartition("-")
    if not family or (task not in _TASKS and kind in FAMILIES):
        family, task = kind, "classify"
    style, own = FAMILIES[family]
    tokenizer = make_tokenizer(*style)
    values = {
        **_SIZES,
        **own,
        "vocab_size": tokenizer.backend_tokenizer.get_vocab_size(),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **({"decoder_start_token_id": tokenizer.pad_token_id} if family in ("t5", "bart") else {}),
        **_TASKS[task],
        **overrides,
    }
    if "num_labels" in overrides:
        values.pop("id2label", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **values)
        model = _ARCHITECTURES.get(task, SequenceModel).from_config(config, dtype=torch.float32).eval()
        _spread(model)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    max_length = values["max_position_embeddings"] - (2 if "roberta" in family or family == "mpnet" else 0)
    tokenizer.model_max_length = max_length
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if family in _TYPED else [])]
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = inputs
    tokenizer.save_pretrained(folder)
    if task == "minilm":
        _write_sentence_files(folder, config.hidden_size, max_length=max_length // 2)
    return folder


_TASKS: dict[str, dict[str, Any]] = {
    "classify": {"id2label": _LABELS},
    "multilabel": {"id2label": _LABELS, "problem_type": "multi_label_classification"},
    "tokens": {"id2label": _ENTITIES},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "embed": {},
    "minilm": {"num_hidden_layers": 3},
}
_ARCHITECTURES = {"tokens": TokenModel, "embed": AutoModel, "minilm": AutoModel}


def _spread(model: torch.nn.Module) -> None:
    """Give biases and norms values other than 0 and 1: a mistake about them shall show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name.lower():
            parameter.data += 0.1 * torch.randn_like(parameter)


def make_tokenizer(style: str, start: str, end: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer ("wordpiece", "bytes", "qwen", "unigram") that puts these around a text."""
    inner = Tokenizer.from_str(_trained(style, start, end))
    names: dict[str, str] = {"unk_token": _unknown(style), "mask_token": "<mask>", "pad_token": "<pad>"}
    if start:
        names |= {"cls_token": start, "bos_token": start}
    if end:
        names |= {"sep_token": end, "eos_token": end}
    else:
        names["eos_token"] = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


@functools.cache
def _trained(style: str, start: str, end: str) -> str:
    """Return a ``tokenizer.json``."""
    special = ["<pad>", _unknown(style), start, end, "<mask>", "<|endoftext|>"]
    if start == "<s>":
        # Where RoBERTa's relatives have them; MPNet knows no other id of its padding.
        special = [start, "<pad>", end, _unknown(style), "<mask>", "<|endoftext|>"]
    special = [token for token in special if token]
    corpus = sample_texts(400, seed=5, max_words=12)
    trainer: Any
    if style == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=_unknown(style)))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    elif style in ("bytes", "qwen"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if style == "qwen":
            # transformers splits texts of this family in its own way, whatever tokenizer.json says.
            own = Qwen2Tokenizer().backend_tokenizer
            tokenizer.normalizer, tokenizer.pre_tokenizer = own.normalizer, own.pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, show_progress=False, unk_token=_unknown(style)
        )
    tokenizer.train_from_iterator(corpus, trainer)
    if start or end:
        # In pairs the second text has type 1; families without types ignore it.
        ends = f" {end}" if end else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A{ends}".strip(),
            pair=f"{start} $A{ends} $B:1{ends and ends + ':1'}".strip(),
            special_tokens=[(t, tokenizer.token_to_id(t)) for t in dict.fromkeys((start, end)) if t],
        )
    text: str = tokenizer.to_str()
    return text


def _unknown(style: str) -> str:
    return "[UNK]" if style == "wordpiece" else "<unk>"


def _write_sentence_files(folder: Path, num_dimensions: int, *, max_length: int) -> None:
    """Write what sentence-transformers keeps beside a model: mean pooling, then length 1."""
    package = "sentence_transformers.models"
    modules = [("", f"{package}.Transformer"), ("1_Pooling", f"{package}.Pooling")]
    modules.append(("2_Normalize", f"{package}.Normalize"))
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir(exist_ok=True)
    pooling = {
        "word_embedding_dimension": num_dimensions,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def sample_texts(count: int, *, seed: int = 0, max_words: int = 8) -> list[str]:
    """Return texts of 1 to ``max_words`` words; with 8 of them they fit every model made here."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, max_words))) for _ in range(count)]


def sample_pairs(count: int, *, seed: int = 0, max_words: int = 4) -> list[tuple[str, str]]:
    """Return pairs of texts."""
    texts = sample_texts(2 * count, seed=seed, max_words=max_words)
    return list(zip(texts[::2], texts[1::2], strict=True))
