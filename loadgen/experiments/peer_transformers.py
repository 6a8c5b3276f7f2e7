"""transformers on the same work, as a process: `generate` over padded batches, and its continuous batching.

    python -m loadgen.experiments.peer_transformers --shape smollm2-135m

One job per line on standard input (see ``peer_jobs``), one answer per line on standard output. The model is
built once and kept, so that runs can alternate with other servers' minutes apart. What is timed is from the
first prompt handed over to the last token known; building the model and, for continuous batching, its
manager and cache is not. Prompts are lists of token ids; decoding is greedy and goes on past
end-of-sequence tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import msgspec
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from loadgen.experiments.peer_jobs import Answer, Job, PeerSettings
from loadgen.experiments.shapes import SHAPES

__all__ = ["main"]


def build_model(shape_name: str, seed: int) -> Any:
    """Build a model of the shape with random weights in bfloat16."""
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPES[shape_name].config())
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(previous)
    return model.eval()


def run_generate(model: Any, job: Job) -> Answer:
    """Continue the prompts in padded batches, one after another, in the order given."""
    model.set_attn_implementation(job.settings.attention)
    token_ids: list[list[int]] = []
    started = time.perf_counter()
    for start in range(0, len(job.prompts), job.settings.batch_size):
        batch = job.prompts[start : start + job.settings.batch_size]
        width = max(map(len, batch))
        padded = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        output = model.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=job.max_new_tokens,
            min_new_tokens=job.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        token_ids += output[:, width:].tolist()
    elapsed = time.perf_counter() - started
    return Answer(elapsed_s=elapsed, generated_tokens=sum(map(len, token_ids)), token_ids=token_ids)


class ContinuousPeer:
    """A running continuous batching manager, kept as long as the settings stay the same."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.settings: PeerSettings | None = None
        """Of the running manager; None if none runs."""
        self._manager: Any = None

    def run(self, job: Job) -> Answer:
        """Hand over all prompts, wait for all answers."""
        manager = self._manager_for(job.settings)
        started = time.perf_counter()
        if job.settings.sort_prompts:
            names = manager.add_requests(job.prompts, job.max_new_tokens, record_timestamps=True)
        else:
            names = [
                manager.add_request(p, None, job.max_new_tokens, record_timestamps=True, eos_token_id=-1)
                for p in job.prompts
            ]
        results: dict[str, Any] = {}
        while len(results) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                results[result.request_id] = result
            elif result is None and not manager.is_running():
                return Answer(elapsed_s=0.0, generated_tokens=0, error="the manager's thread ended")
        elapsed = time.perf_counter() - started
        errors = [str(r.error) for r in results.values() if r.error is not None]
        token_ids = [list(results[name].generated_tokens) for name in names]
        return Answer(
            elapsed_s=elapsed,
            generated_tokens=sum(map(len, token_ids)),
            first_token_s=[r.timestamps[0] - started for r in results.values() if r.timestamps],
            token_ids=token_ids,
            error=errors[0] if errors else None,
        )

    def _manager_for(self, settings: PeerSettings) -> Any:
        if self._manager is not None:
            return self._manager
        self._model.set_attn_implementation(settings.attention)
        config = ContinuousBatchingConfig(
            page_size=settings.page_size,
            num_blocks=settings.num_blocks,
            max_batch_tokens=settings.max_batch_tokens,
            max_requests_per_batch=settings.batch_size,
            allow_block_sharing=settings.share_blocks,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=4096)
        self._manager = self._model.init_continuous_batching(generation, config)
        self._manager.start()
        self.settings = settings
        return self._manager

    def close(self) -> None:
        """End the manager's thread and free its cache."""
        if self._manager is not None:
            self._manager.stop(block=True)
            self._manager = None
            self.settings = None


def main(arguments: list[str] | None = None) -> int:
    """Answer jobs until standard input ends."""
    parser = argparse.ArgumentParser(
        description="transformers as a peer: jobs in, answers out, one per line."
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    model = build_model(options.shape, options.seed)
    continuous = ContinuousPeer(model)
    print("ready", flush=True)
    decoder = msgspec.json.Decoder(Job)
    with torch.inference_mode():
        for line in sys.stdin:
            job = decoder.decode(line)
            if continuous.settings != job.settings:
                continuous.close()
                torch.set_num_threads(job.settings.threads)
                model.to(getattr(torch, job.settings.dtype))
            answer = run_generate(model, job) if job.settings.engine == "generate" else continuous.run(job)
            print(msgspec.json.encode(answer).decode(), flush=True)
    continuous.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
