"""Drive a runner by hand-written plans: what an engine does, in sixty lines and at random."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, field

from server.engine.plan import PrefixGroup, SamplingSpec, SequencePlan, StepPlan, StepRunner

GREEDY = SamplingSpec()


@dataclass
class Request:
    """One sequence, its blocks and what it has drawn."""

    prompt: list[int]
    num_new: int
    blocks: array[int]
    sampling: SamplingSpec = GREEDY
    num_computed: int = 0
    drawn: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.drawn

    @property
    def is_done(self) -> bool:
        return len(self.drawn) == self.num_new


class BlockPool:
    """Hands out block ids in a random order."""

    def __init__(self, num_blocks: int, seed: int) -> None:
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def take(self, count: int) -> array[int]:
        return array("i", [self._free.pop() for _ in range(count)])


def generate(
    runner: StepRunner, prompts: list[list[int]], num_new: int, *, num_shared: int = 0, seed: int = 0
) -> list[list[int]]:
    """Generate greedily for all prompts together; return the drawn tokens.

    The first ``num_shared`` tokens of all prompts are equal; their whole blocks are computed by the
    first request alone and then shared as a group.
    """
    size = runner.block_size
    pool = BlockPool(runner.num_blocks, seed)
    dice = random.Random(seed + 1)
    shared_blocks = num_shared // size
    shared = pool.take(shared_blocks)
    requests = []
    for prompt in prompts:
        own = -(-(len(prompt) + num_new) // size) - shared_blocks
        requests.append(Request(prompt, num_new, shared + pool.take(own)))
    first, others = requests[0], requests[1:]
    while others and first.num_computed < shared_blocks * size:
        chunk = min(dice.randint(1, 2 * size), shared_blocks * size - first.num_computed)
        _step(runner, [(first, chunk)], [])
    for request in others:
        request.num_computed = shared_blocks * size
    while active := [r for r in requests if not r.is_done]:
        chunks = [(r, min(dice.randint(1, 2 * size), len(r.tokens) - r.num_computed)) for r in active]
        groups = []
        if shared_blocks and len(active) > 1:
            half = dice.randint(0, shared_blocks)
            nested = dice.randint(2, len(active))
            groups = [PrefixGroup(0, len(active), 0, half)] if half else []
            if half < shared_blocks:
                groups.append(PrefixGroup(0, nested, half, shared_blocks))
        _step(runner, chunks, groups)
    return [r.drawn for r in requests]


def _step(runner: StepRunner, chunks: list[tuple[Request, int]], groups: list[PrefixGroup]) -> None:
    sequences = []
    for index, (request, chunk) in enumerate(chunks):
        stop = request.num_computed + chunk
        draws = stop == len(request.tokens)
        sequences.append(
            SequencePlan(
                index,
                request.num_computed,
                request.tokens[request.num_computed : stop],
                request.blocks,
                request.sampling if draws else None,
                num_prompt_tokens=len(request.prompt),
                history=request.tokens if draws and request.sampling.needs_history else None,
            )
        )
    result = runner.run(StepPlan(0, sequences, groups))
    assert result.failed == {}
    for (request, chunk), sampled in zip(chunks, result.sampled, strict=True):
        request.num_computed += chunk
        if request.num_computed == len(request.tokens):
            assert sampled is not None
            request.drawn.append(sampled.token_id)
        else:
            assert sampled is None
