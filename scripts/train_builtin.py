"""Train the built-in model from the standard library's documentation and write its folder.

    python scripts/train_builtin.py --out server/worker/builtin

The corpus comes from ``builtin_corpus``; no network is used. Everything is seeded: the same interpreter,
library versions, processor kind and options give the same folder. ``--steps 20`` writes an untrained folder
with the same tokenizer and configuration in about half a minute.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from builtin_card import HeldOut, Run, Sample, write_card
from builtin_corpus import Document, Kind, collect, is_held_out, stdlib_root
from builtin_rows import Sampler
from builtin_tokenizer import BOS, END, EOS, PAD, chat_text, id_of, train_tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TOKENS_PER_STEP = 2048
PHASES = ((0.6, 256), (0.9, 512), (1.0, 1024))
"""Row lengths, each until a share of the steps: short rows are fast, long rows teach far positions."""
WARMUP_STEPS = 100

PLAIN_PROMPTS = ("The function returns", "This module provides", "If the argument is", "Raises")
CHAT_PROMPTS = ("What does textwrap.fill do?", "What is the class collections.OrderedDict?")


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description="Train the built-in model and write its folder.")
    parser.add_argument("--out", type=Path, default=Path("server/worker/builtin"), help="folder to write")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps of 2,048 tokens")
    parser.add_argument(
        "--threads", type=int, default=2, help="torch threads; changes the last digits of the result"
    )
    parser.add_argument("--seed", type=int, default=20, help="seed of weights, order and dropout")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine schedule")
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="on the output of attention and MLP, in training"
    )
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.threads < 1 or not 0 <= options.dropout < 1:
        parser.error("--steps and --threads must be at least 1, --dropout in [0, 1)")
    return options


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return the untrained model, float32, weights from torch's global generator."""
    bos_id, eos_id, end_id, pad_id = (id_of(tokenizer, token) for token in (BOS, EOS, END, PAD))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    make_generation_config: Callable[..., GenerationConfig] = GenerationConfig
    model.generation_config = make_generation_config(
        bos_token_id=bos_id, eos_token_id=[eos_id, end_id], pad_token_id=pad_id
    )
    return model


def train(
    model: LlamaForCausalLM, sampler: Sampler, options: argparse.Namespace, check: Callable[[], HeldOut]
) -> tuple[float, float]:
    """Train in place; return the seconds it took and the last mean loss.

    The loss is printed every 50 steps and what ``check`` reports every 500.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    plain = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    hooks = [
        module.register_forward_hook(lambda module, _inputs, output: _drop(module, output, options.dropout))
        for name, module in model.named_modules()
        if name.endswith(("self_attn.o_proj", "mlp.down_proj"))
    ]
    model.train()
    started = time.monotonic()
    recent: list[float] = []
    mean = math.nan
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * _schedule(step, options.steps)
        row_length = next(length for share, length in PHASES if step < share * options.steps)
        loss = _loss(model, sampler.batch(TOKENS_PER_STEP // row_length, row_length))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == options.steps:
            elapsed_s = time.monotonic() - started
            rate = (step + 1) * TOKENS_PER_STEP / elapsed_s
            mean = sum(recent) / len(recent)
            recent.clear()
            print(
                f"step {step + 1}/{options.steps} loss {mean:.3f} {rate:.0f} tokens/s {elapsed_s:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0:
            model.eval()
            print(f"held out: {check().nats_per_token:.3f} nats per token", flush=True)
            model.train()
    for hook in hooks:
        hook.remove()
    model.eval()
    return time.monotonic() - started, mean


def _drop(module: nn.Module, output: Tensor, share: float) -> Tensor:
    return functional.dropout(output, share, training=module.training)


def _schedule(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine to one hundredth."""
    warmup = min(WARMUP_STEPS, max(1, num_steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document]
) -> HeldOut:
    """Return the loss on ``documents``, each read alone from BOS to EOS."""
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for document in documents:
        ids = torch.tensor([tokenizer(document.text + EOS)["input_ids"]])
        nats += _loss(model, ids).item() * (ids.shape[1] - 1)
        num_tokens += ids.shape[1] - 1
        num_bytes += len(document.text.encode())
    return HeldOut(
        nats_per_token=nats / num_tokens,
        bits_per_byte=nats / math.log(2) / num_bytes,
        num_documents=len(documents),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


@torch.inference_mode()
def draw_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int) -> list[Sample]:
    """Return real outputs: greedy and sampled continuations, and greedy chat answers."""
    samples: list[Sample] = []
    for prompt in PLAIN_PROMPTS:
        greedy = _continue(model, tokenizer, BOS + prompt, max_new_tokens=60, do_sample=False)
        samples.append(Sample("Greedy", prompt + greedy))
        torch.manual_seed(seed)
        drawn = _continue(
            model, tokenizer, BOS + prompt, max_new_tokens=60, do_sample=True, temperature=0.8, top_k=40
        )
        samples.append(Sample("Temperature 0.8, top-k 40", prompt + drawn))
    for prompt in CHAT_PROMPTS:
        text = chat_text(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        answer = _continue(model, tokenizer, text, max_new_tokens=80, do_sample=False)
        samples.append(Sample("Chat, greedy", f"user: {prompt}\nassistant: {answer}"))
    return samples


def _continue(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, **options: object) -> str:
    """Return what ``model`` writes after ``text``, which brings its own special tokens."""
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    output: list[list[int]] = model.generate(ids, **options).tolist()
    return str(tokenizer.decode(output[0][ids.shape[1] :], skip_special_tokens=True))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder's files, complete beside ``out`` first, so that a reader never sees half a file."""
    staging = out.with_name(out.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(staging.iterdir()):
        path.chmod(0o644)
        path.replace(out / path.name)
    staging.rmdir()


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect, train, measure, write the folder and its card."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    documents = collect(stdlib_root())
    held_out = [document for document in documents if is_held_out(document)]
    training = [document for document in documents if not is_held_out(document)]
    tokenizer = train_tokenizer(training)
    model = build_model(tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{len(documents)} documents, {num_parameters:,} parameters, vocabulary {len(tokenizer)}", flush=True
    )

    sampler = Sampler(training, tokenizer, seed=options.seed)
    train_seconds, last_loss = train(model, sampler, options, lambda: measure(model, tokenizer, held_out))

    module: nn.Module = model
    module.to(torch.bfloat16)
    save(model, tokenizer, options.out)
    module.to(torch.float32)
    result = measure(model, tokenizer, held_out)
    print(f"held out: {result.nats_per_token:.3f} nats per token, {result.bits_per_byte:.3f} bits per byte")
    run = Run(
        command=f"python scripts/train_builtin.py --steps {options.steps} --threads {options.threads} "
        f"--seed {options.seed} --learning-rate {options.learning_rate} --dropout {options.dropout}",
        seed=options.seed,
        num_threads=options.threads,
        num_steps=options.steps,
        tokens_seen=options.steps * TOKENS_PER_STEP,
        train_seconds=train_seconds,
        last_train_loss=last_loss,
        num_parameters=num_parameters,
        vocab_size=len(tokenizer),
        corpus_bytes={
            kind.value: sum(len(document.text.encode()) for document in documents if document.kind is kind)
            for kind in Kind
        },
        num_documents=len(documents),
        corpus_sha256=hashlib.sha256("\0".join(document.text for document in documents).encode()).hexdigest(),
        held_out=result,
        samples=draw_samples(model, tokenizer, seed=options.seed),
    )
    write_card(run, options.out)


if __name__ == "__main__":
    main()
