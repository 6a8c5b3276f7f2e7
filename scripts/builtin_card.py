"""Write the built-in model's MODEL_CARD.md from the figures of one training run."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers

__all__ = ["HeldOut", "Run", "Sample", "write_card"]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Report the loss on text kept from training, and the size of that text."""

    nats_per_token: float
    bits_per_byte: float
    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Hold one real output: how it was drawn, and the prompt with its continuation."""

    drawn: str
    text: str


@dataclass(frozen=True, slots=True)
class Run:
    """Hold what the card says about one training run; the digest is over the cleaned texts in order."""

    command: str
    seed: int
    num_threads: int
    num_steps: int
    tokens_seen: int
    train_seconds: float
    last_train_loss: float
    num_parameters: int
    vocab_size: int
    corpus_bytes: dict[str, int]
    num_documents: int
    corpus_sha256: str
    held_out: HeldOut
    samples: Sequence[Sample]


def write_card(run: Run, folder: Path) -> None:
    """Write ``folder/MODEL_CARD.md``."""
    held_out = run.held_out
    corpus = ", ".join(f"{size:,} of {kind}s" for kind, size in run.corpus_bytes.items())
    samples = "\n\n".join(f"{sample.drawn}:\n\n```text\n{sample.text}\n```" for sample in run.samples)
    text = f"""\
# The built-in model

A decoder of Llama architecture (`LlamaForCausalLM`) with {run.num_parameters:,} parameters in bfloat16 (tied
embeddings, grouped-query attention), a byte-level BPE tokenizer of {run.vocab_size:,} entries and a chat
template. It is there so that the server starts, streams and passes its tests without a download.

**It is for trying things out, not for answers.** It writes text that sounds like Python's documentation.
What it says about a function is as a rule wrong, it knows nothing else, and it is too small to follow
instructions.

## Training

| | |
|---|---|
| command | `{run.command}` |
| corpus | {sum(run.corpus_bytes.values()):,} bytes in {run.num_documents:,} documents: {corpus} |
| corpus SHA-256 | `{run.corpus_sha256}` |
| tokens seen | {run.tokens_seen:,} in {run.num_steps:,} steps; rows of 256, then 512, then 1,024 tokens |
| time | {run.train_seconds / 60:.0f} minutes, {run.num_threads} threads of a shared \
{platform.machine()} CPU |
| versions | {platform.python_implementation()} {platform.python_version()}, torch {torch.__version__}, \
transformers {transformers.__version__}, tokenizers {tokenizers.__version__} |
| seed | {run.seed} |
| last training loss | {run.last_train_loss:.3f} nats per token (with dropout) |
| **held-out loss** | **{held_out.nats_per_token:.3f} nats per token, \
{held_out.bits_per_byte:.3f} bits per byte** |
| held-out text | {held_out.num_documents:,} documents, {held_out.num_bytes:,} bytes, \
{held_out.num_tokens:,} tokens |

The corpus is the documentation prose of the standard library of the interpreter that runs the script:
docstrings, the language reference in `pydoc_data.topics`, and comment blocks that read as English, parsed
from the files without importing them. Code, grammar, tables, doctests, licence notices and addresses are
left out, wrapped lines are joined, and a paragraph that occurs twice is kept once. About one document in
fifty, chosen by a digest of its text, is held out; it is not in the tokenizer's training text either. A
share of the docstrings is shown as the answer in a chat ("What does textwrap.fill do?"), which is what
gives the chat template its meaning.

Everything is seeded. With the same interpreter, libraries, thread count and kind of processor, repeated
short runs (ten steps) gave the same weights bit for bit; elsewhere the last digits differ. Another
Python version has another standard library, so another corpus.

## Licence

The text is part of the Python distribution: Python Software Foundation License Version 2, and for some
modules the compatible licences that their files state. Copyright 2001 and later, Python Software
Foundation. No other text was used.

## Format

`<|bos|>` starts a text (the tokenizer adds it) and `<|eos|>` ends it. A chat is
`<|bos|><|system|>...<|end|><|user|>...<|end|><|assistant|>...<|end|>`, the system message being optional;
generation ends at `<|eos|>` or `<|end|>`. Positions up to 4,096 are accepted; text beyond 1,024 tokens was
never seen in training.

## Samples

Outputs of the committed weights in float32, as they came; the prompt is part of the text.

{samples}
"""
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")
