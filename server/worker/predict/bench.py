"""How near the native encoder comes to the bare matrix products of its model, and what takes the rest.

Everything in one process and in turns, so that all meet the same load; the best of the rounds counts::

    python -m server.worker.predict.bench --shape minilm --dtype bfloat16 [--json FILE]

The weights are random: nothing here depends on their values.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertModel

from server.worker.predict.native import NativeEncoder, PartSeconds, build_native_encoder

__all__ = ["CaseFigures", "main", "measure"]

SHAPES = {
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
    "minilm": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
}
_PADDED_BATCH = 32
_PEER_BUDGET_S = 5.0


@dataclass(frozen=True, slots=True)
class CaseFigures:
    """One batch of inputs, measured; seconds, the best of the rounds."""

    name: str
    num_inputs: int
    num_tokens: int
    product_operations: int
    torch_products_s: float
    """In the weights' own type."""
    torch_float32_products_s: float
    own_products_s: float
    encoder_s: float
    transformers_padded_s: float
    """float32, sorted by length, batches of 32 inputs."""
    transformers_one_by_one_s: float
    """float32."""
    transformers_own_type_one_by_one_s: float
    """In the weights' own type."""
    products_share: float
    """Of the threads' time in the encoder's best call; so are the others."""
    attention_share: float
    elementwise_share: float
    embedding_share: float
    waiting_share: float

    def ratios(self) -> dict[str, float]:
        """Return how many times faster than each peer the encoder is (for products: at least 0.75 wanted)."""
        peers = {
            "torch products": self.torch_products_s,
            "torch float32 products": self.torch_float32_products_s,
            "own products": self.own_products_s,
            "transformers padded": self.transformers_padded_s,
            "transformers one by one": self.transformers_one_by_one_s,
            "transformers one by one, weights' own type": self.transformers_own_type_one_by_one_s,
        }
        return {name: seconds / self.encoder_s for name, seconds in peers.items()}


def spread_lengths(num_tokens: int, seed: int = 0) -> list[int]:
    """Return lengths from 8 to 256, equally likely, of about ``num_tokens`` in all."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(int(rng.integers(8, 257)))
    return lengths


def measure(
    model: BertModel, encoder: NativeEncoder, name: str, lengths: Sequence[int], rounds: int
) -> CaseFigures:
    """Measure one batch."""
    total = sum(lengths)
    arrays = _packed(lengths, model.config.vocab_size)
    linears = [module for module in model.encoder.modules() if isinstance(module, nn.Linear)]
    own = _Fastest(lambda: encoder.time_products(total))
    wide = _Fastest(_products_of(linears, total, torch.float32))
    narrow = wide if encoder.dtype is torch.float32 else _Fastest(_products_of(linears, total, encoder.dtype))
    padded = _Fastest(_padded_of(model, arrays[0], lengths))
    one_by_one = _Fastest(_one_by_one_of(model, arrays[0], lengths))
    own_type = one_by_one
    if encoder.dtype is not torch.float32:
        own_type = _Fastest(_one_by_one_of(copy.deepcopy(model).to(encoder.dtype), arrays[0], lengths))
    encoder_s, parts = float("inf"), PartSeconds(0, 0, 0, 0)
    for _ in range(rounds):
        start = time.perf_counter()
        encoder.forward(*arrays)
        seconds = time.perf_counter() - start
        if seconds < encoder_s:
            encoder_s, parts = seconds, encoder.workspace.last_seconds()
        for peer in dict.fromkeys((own, wide, narrow, padded, one_by_one, own_type)):
            peer.run()
    thread_s = encoder_s * encoder.workspace.num_threads
    known_s = parts.products + parts.attention + parts.elementwise + parts.embedding
    return CaseFigures(
        name,
        len(lengths),
        total,
        2 * total * sum(linear.weight.numel() for linear in linears),
        narrow.seconds,
        wide.seconds,
        own.seconds,
        encoder_s,
        padded.seconds,
        one_by_one.seconds,
        own_type.seconds,
        parts.products / thread_s,
        parts.attention / thread_s,
        parts.elementwise / thread_s,
        parts.embedding / thread_s,
        1 - known_s / thread_s,
    )


class _Fastest:
    """The best of several runs; a slow peer gets fewer."""

    def __init__(self, call: Callable[[], float | None]) -> None:
        self._call = call
        self._spent_s = 0.0
        self.seconds = float("inf")

    def run(self) -> None:
        """Run once; ``call`` may return seconds it measured itself."""
        if self._spent_s > _PEER_BUDGET_S:
            return
        start = time.perf_counter()
        measured = self._call()
        seconds = time.perf_counter() - start
        self._spent_s += seconds
        self.seconds = min(self.seconds, seconds if measured is None else measured)


def _packed(lengths: Sequence[int], vocab: int) -> tuple[NDArray[np.int32], ...]:
    tokens = np.random.default_rng(1).integers(0, vocab, sum(lengths)).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
    return tokens, positions, np.zeros_like(tokens), np.array(lengths, np.int32)


def _products_of(linears: Sequence[nn.Linear], rows: int, dtype: torch.dtype) -> Callable[[], None]:
    """Multiply by every matrix, query, key and value as one: the least that any executor has to do."""
    weights = []
    for first in range(0, len(linears), 6):
        query, key, value, *rest = (linear.weight.detach().to(dtype) for linear in linears[first : first + 6])
        weights += [torch.cat([query, key, value]), *rest]
    inputs = {width: torch.randn(rows, width).to(dtype) for width in {w.shape[1] for w in weights}}

    def run() -> None:
        with torch.inference_mode():
            for weight in weights:
                nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def _one_by_one_of(model: BertModel, tokens: NDArray[np.int32], lengths: Sequence[int]) -> Callable[[], None]:
    inputs = [part[None] for part in torch.from_numpy(tokens.astype(np.int64)).split(list(lengths))]

    def run() -> None:
        with torch.inference_mode():
            for ids in inputs:
                model(input_ids=ids)

    return run


def _padded_of(model: BertModel, tokens: NDArray[np.int32], lengths: Sequence[int]) -> Callable[[], None]:
    parts = sorted(torch.from_numpy(tokens.astype(np.int64)).split(list(lengths)), key=len)
    batches = []
    for first in range(0, len(parts), _PADDED_BATCH):
        chunk = parts[first : first + _PADDED_BATCH]
        mask = [torch.ones_like(ids) for ids in chunk]
        batches.append([nn.utils.rnn.pad_sequence(list(side), batch_first=True) for side in (chunk, mask)])

    def run() -> None:
        with torch.inference_mode():
            for ids, mask in batches:
                model(input_ids=ids, attention_mask=mask)

    return run


def _show(case: CaseFigures) -> str:
    rate = case.product_operations / case.encoder_s / 1e9
    inputs_per_s = case.num_inputs / case.encoder_s
    lines = [
        f"{case.name}: {case.num_inputs} inputs, {case.num_tokens} tokens",
        f"  encoder {case.encoder_s * 1e3:.2f} ms, {inputs_per_s:.0f} inputs/s, {rate:.0f} GFLOP/s",
    ]
    lines += [f"  {ratio:6.2f} x {peer}" for peer, ratio in case.ratios().items()]
    shares = {
        "products": case.products_share,
        "attention": case.attention_share,
        "norm and activation": case.elementwise_share,
        "embedding": case.embedding_share,
        "waiting": case.waiting_share,
    }
    lines.append("  time: " + ", ".join(f"{part} {share:.1%}" for part, share in shares.items()))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one shape and type, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="minilm")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="sizes of the spread batches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_attention_heads=12, **SHAPES[options.shape])).eval()
    encoder = build_native_encoder(model, dtype=options.dtype, num_threads=options.threads)
    if encoder is None:
        raise SystemExit("the native encoder does not know this model")
    load_before = os.getloadavg()[0]
    batches: dict[str, list[int]] = {"one short": [16], "short": [16] * 64}
    batches |= {f"spread {n}": spread_lengths(n) for n in options.tokens}
    cases = []
    for name, lengths in batches.items():
        rounds = options.rounds * (10 if sum(lengths) < 256 else 1)
        cases.append(measure(model, encoder, name, lengths, rounds))
        sys.stdout.write(_show(cases[-1]) + "\n")
        sys.stdout.flush()
    result: dict[str, Any] = {
        "shape": options.shape,
        "dtype": options.dtype,
        "threads": options.threads,
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
        "cases": [asdict(case) | {"ratios": case.ratios()} for case in cases],
    }
    sys.stdout.write(f"load {load_before:.1f} before, {result['load_after']:.1f} after\n")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
