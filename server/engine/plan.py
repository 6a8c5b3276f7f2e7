"""What the scheduler tells the worker to compute in one step, and what the worker answers.

A plan is complete: the worker keeps no request state between steps besides KV memory and saved
last logits, both addressed by number. The vocabulary of one sequence in one step::

        positions   0 ............... num_computed ............ num_computed + len(token_ids)
                    |  KV already in blocks |  computed by this step       |
        block_table [ b0 ][ b1 ][ b2 ][ b3 ][ b4 ] ... covers at least every position above

Sequences stand in depth-first order of the prefix tree, so those that share leading blocks are
neighbours and a shared prefix is a half-open range of them (:class:`PrefixGroup`).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

__all__ = [
    "BlockCopy",
    "KvLoad",
    "KvSave",
    "KvTarget",
    "PrefixGroup",
    "SampledToken",
    "SamplingSpec",
    "SequencePlan",
    "StepPlan",
    "StepResult",
    "StepRunner",
]


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How the next token of one sequence is drawn. Validated by the front end; the worker trusts it.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 and ``min_p`` 0 mean "off".
    ``seed`` and ``sample_index`` and the position of the drawn token determine the random number:
    the same three give the same number, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    sample_index: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_top_logprobs: int | None = None
    """None: no log-probabilities; 0: the chosen token's alone; n: the n best besides."""
    suppressed_token_ids: tuple[int, ...] = ()
    """Tokens that must not be drawn at this step (for example stop tokens before min tokens)."""

    @property
    def needs_history(self) -> bool:
        """Say whether drawing needs the tokens so far (penalties)."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence's share of a step.

    ``token_ids`` may be empty: then the token is drawn from saved logits (``logits_from``), with no
    forward pass. ``sampling`` is None while a prompt is still being computed.
    """

    sequence_id: int
    num_computed: int
    token_ids: list[int]
    block_table: array[int]
    """Physical block ids, typecode 'i'. Owned by the engine, read-only here, valid during the step."""
    sampling: SamplingSpec | None = None
    num_prompt_tokens: int = 0
    position: int = 0
    """Position that the drawn token will have: how many tokens the sequence has so far. Part of the random
    number's key; more than ``num_tokens_after`` when drawn from saved logits ahead of its KV."""
    history: list[int] | None = None
    """Prompt and generated tokens so far, given only if ``sampling.needs_history``."""
    logits_from: int | None = None
    """Slot of the worker's logits store to draw from."""
    save_logits_to: int | None = None
    """Slot of the logits store that receives the last row of this sequence's logits."""

    @property
    def num_tokens_after(self) -> int:
        """Return how many positions hold KV after the step."""
        return self.num_computed + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Sequences ``[start, stop)`` of the plan that share blocks ``[first_block, last_block)``.

    Every member has computed (or shares blocks being computed by a non-member in this step) all the
    positions of those blocks, so each of its queries sees the whole range without a mask (besides a
    window). Groups are laminar: two of them are disjoint or nested; a nested one starts
    (``first_block``) where its parent ends. Parents come before children in ``StepPlan.groups``.
    """

    start: int
    stop: int
    first_block: int
    last_block: int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy slots ``[0, num_slots)`` of every layer from one block to another, before the forward pass."""

    source: int
    target: int
    num_slots: int


class KvTarget(Enum):
    """Which of the worker's stores a number addresses."""

    BLOCK = "block"
    LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class KvSave:
    """Copy a block, or a row of kept logits, out of the worker before anything of the step changes it."""

    target: KvTarget
    index: int


@dataclass(frozen=True, slots=True)
class KvLoad:
    """Put a block, or a row of kept logits, in: after the saves, before the copies."""

    target: KvTarget
    index: int
    payload: bytes | bytearray | memoryview
    """All bytes of the block or row, as a ``KvSave`` gave them."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All that one step does, in this order: saves, loads, copies, the forward pass, drawing.

    ``sequences`` may be empty: then the step only moves blocks.
    """

    step_id: int
    sequences: list[SequencePlan]
    groups: list[PrefixGroup] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)
    saves: list[KvSave] = field(default_factory=list)
    loads: list[KvLoad] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Return how many token positions the forward pass computes."""
        return sum(len(s.token_ids) for s in self.sequences)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A drawn token. Log-probabilities are natural, of the distribution before temperature and filters."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced: ``sampled`` is parallel to ``plan.sequences`` (None where nothing was drawn).

    ``failed`` names sequences whose own input made the worker fail (for example logits that are not
    finite), with a short reason fit for a client; the others are unaffected.
    """

    step_id: int
    sampled: list[SampledToken | None]
    failed: dict[int, str] = field(default_factory=dict)
    forward_s: float = 0.0
    sample_s: float = 0.0
    saved: list[bytes] = field(default_factory=list)
    """Parallel to ``plan.saves``."""


class StepRunner(Protocol):
    """What the engine needs of a worker. Implemented by ``server.worker.runner.ModelRunner``."""

    @property
    def num_blocks(self) -> int:
        """Return how many KV blocks there are; ids are ``[0, num_blocks)``."""
        ...

    @property
    def block_size(self) -> int:
        """Return how many positions one block holds."""
        ...

    @property
    def num_logits_slots(self) -> int:
        """Return how many rows the store of last logits has; ids are ``[0, num_logits_slots)``."""
        ...

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step; block until it is done. Raise only if the worker as a whole is broken."""
        ...
