"""Encoders with random weights in the shapes of known ones, as folders; and what loading one takes."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ENCODERS", "EncoderShape", "main", "write_encoder"]

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("river", "mountain", "engine", "letter", "garden", "window", "number", "signal", "market", "winter")


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """A BERT encoder."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int = 30522

    @property
    def flop_per_token(self) -> int:
        """Return the operations of the matrix products of one token, attention's apart."""
        width, inner = self.hidden_size, self.intermediate_size
        return 2 * self.num_layers * (4 * width * width + 2 * width * inner)


ENCODERS = {
    shape.name: shape
    for shape in (
        EncoderShape("minilm", 384, 6, 12, 1536),
        EncoderShape("bert-base", 768, 12, 12, 3072),
        # About 100 MB of float32.
        EncoderShape("hundred-megabytes", 512, 3, 8, 2048, vocab_size=30522),
    )
}


def write_encoder(shape: EncoderShape, folder: Path, *, seed: int = 0) -> Path:
    """Write a classifier of two labels with random weights and a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
    )
    folder.mkdir(parents=True, exist_ok=True)
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | kind))
    return folder


def main(folder: str) -> int:
    """Read the file and build the module with transformers, four times; print the seconds, as JSON.

    ``lean_s``: the same from a mapped file into a module without weights of its own.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    file = Path(folder) / "model.safetensors"
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        content = file.read_bytes()
        read_s = time.perf_counter() - started
        del content
        started = time.perf_counter()
        AutoModelForSequenceClassification.from_pretrained(folder).eval()
        build_s = time.perf_counter() - started
        started = time.perf_counter()
        weights = load_file(file)
        for tensor in weights.values():
            tensor.sum()  # a mapped file is read when it is used
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder))
        model.load_state_dict(weights, strict=False, assign=True)
        lean_s = time.perf_counter() - started
        seconds.append({"read_s": read_s, "build_s": build_s, "lean_s": lean_s})
    print(json.dumps(seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
