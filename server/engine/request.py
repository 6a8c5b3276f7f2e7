"""A request inside the engine, and its sequences: one per sample."""

from __future__ import annotations

from array import array
from enum import Enum
from typing import TYPE_CHECKING

from kvcore.cursors import Cursor
from kvcore.keys import NamespaceKey, pack_tokens
from kvcore.lease import Lease
from server.engine.messages import Finish, GenerateSpec, RequestTimings, RequestUsage, RestoreReport
from server.engine.plan import SamplingSpec

if TYPE_CHECKING:
    from server.engine.tiering.restoration import Restoration

__all__ = ["Request", "Sequence", "SequenceState"]


class SequenceState(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"


class Sequence:
    """One sample being generated: the prompt's tokens and those drawn so far.

    There are no phases: a sequence is behind (``num_computed < len(tokens)``) until a step computes its
    last token, and then a new token is drawn, which puts it behind by one again.
    """

    __slots__ = (
        "arrival",
        "bucket",
        "cursor",
        "history",
        "lease",
        "num_prompt_tokens",
        "num_recompute",
        "owner",
        "place",
        "plain_sampling",
        "request",
        "restoration",
        "sample_index",
        "sequence_id",
        "state",
        "suppressed_sampling",
        "tokens",
    )

    def __init__(
        self, request: Request, sample_index: int, sequence_id: int, *, owner: int | None = None
    ) -> None:
        self.request = request
        self.sample_index = sample_index
        self.sequence_id = sequence_id
        self.owner = owner
        """Who alone may find its blocks, and leaves none behind: None shares with everybody."""
        self.tokens: array[int] = request.prompt[:]
        self.num_prompt_tokens = len(self.tokens)
        self.state = SequenceState.WAITING
        self.lease: Lease | None = None
        self.cursor: Cursor | None = None
        self.bucket: tuple[int, int] | None = None
        """Queue bucket (priority, size class) while queued. Owned by ``WaitingQueue``."""
        self.place = 0
        """Number of the queue entry that counts, 0 while there is none. Owned by ``WaitingQueue``."""
        self.arrival = 0
        """Order of arrival; kept over preemptions. Owned by ``WaitingQueue``."""
        self.restoration: Restoration | None = None
        """What is being brought up for it while it waits. Owned by ``WaitingRoom``."""
        self.num_recompute = 0
        """Positions below this were computed before a preemption: computing them again is no prompt work."""
        self.plain_sampling: SamplingSpec | None = None
        self.suppressed_sampling: SamplingSpec | None = None
        self.history: list[int] | None = None
        """All tokens once more, kept only if drawing needs them."""

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.key}.{self.sample_index} {self.state.value} "
            f"{self.num_computed}/{len(self.tokens)}, {self.num_generated} generated)"
        )

    @property
    def num_computed(self) -> int:
        return 0 if self.lease is None else self.lease.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def may_read(self) -> bool:
        """Say whether cached blocks may be used.

        A request that must not read still shares among its own samples, and finds its own blocks again
        after a preemption.
        """
        spec = self.request.spec
        return spec.use_kv_cache and (spec.read_prefix or self.request.was_admitted)

    @property
    def reports_progress(self) -> bool:
        """Say whether somebody wants to know how far the prompt is: once per step, for the first sample."""
        return self.request.spec.report_progress and not self.sample_index and not self.num_generated

    @property
    def keeps_tail(self) -> bool:
        """Say whether the prompt's last logits are of use to anybody."""
        spec = self.request.spec
        return spec.use_kv_cache and (spec.num_samples > 1 or self.owner is None)

    @property
    def sampling(self) -> SamplingSpec:
        """Return how the next token is drawn: tokens that would end the sample too early are suppressed."""
        spec = self.request.spec
        if self.num_generated < spec.min_new_tokens:
            if self.suppressed_sampling is None:
                ending = tuple(sorted({*spec.eos_token_ids, *spec.stop_token_ids}))
                self.suppressed_sampling = _sampling(spec, self.sample_index, suppressed=ending)
            return self.suppressed_sampling
        if self.plain_sampling is None:
            self.plain_sampling = _sampling(spec, self.sample_index, suppressed=())
        return self.plain_sampling

    def history_for(self, sampling: SamplingSpec) -> list[int] | None:
        """Return all tokens so far if ``sampling`` needs them. The list is the sequence's own and grows."""
        if not sampling.needs_history:
            return None
        if self.history is None:
            self.history = self.tokens.tolist()
        return self.history

    def append(self, token: int) -> None:
        """Add a drawn token."""
        self.tokens.append(token)
        if self.history is not None:
            self.history.append(token)

    def finish_reason(self, token: int) -> Finish | None:
        """Say whether the token just appended ends the sample, and why."""
        spec = self.request.spec
        if token in spec.eos_token_ids:
            return Finish.EOS
        if token in spec.stop_token_ids:
            return Finish.STOP_TOKEN
        return Finish.LENGTH if self.num_generated >= spec.max_new_tokens else None


class Request:
    """One call: its samples, what they used, and when."""

    __slots__ = (
        "cached_block_tokens",
        "cached_partial_tokens",
        "cached_tail_tokens",
        "deadline",
        "finished_at",
        "first_step_at",
        "first_token_at",
        "held_back",
        "key",
        "lookup_s",
        "namespace",
        "num_generated",
        "num_preemptions",
        "prompt",
        "prompt_done_at",
        "restore",
        "restored_tokens",
        "sequences",
        "session",
        "spec",
        "submitted_at",
        "unfinished",
    )

    def __init__(
        self, key: int, spec: GenerateSpec, namespace: NamespaceKey, *, now: float, deadline: float | None
    ) -> None:
        self.key = key
        self.spec = spec
        self.namespace = namespace
        self.deadline = deadline
        self.prompt = pack_tokens(spec.token_ids)
        self.sequences: list[Sequence] = []
        self.held_back: list[Sequence] = []
        """Samples that wait for the first one to compute their prompt. Owned by ``WaitingRoom``."""
        self.unfinished = spec.num_samples
        self.num_generated = 0
        self.cached_block_tokens = 0
        self.cached_partial_tokens = 0
        self.cached_tail_tokens = 0
        self.restored_tokens = 0
        self.session: int | None = None
        """Number of the session that it belongs to, where sessions are followed."""
        self.restore: RestoreReport | None = None
        self.num_preemptions = 0
        self.submitted_at = now
        self.first_step_at: float | None = None
        self.prompt_done_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at = now
        self.lookup_s = 0.0

    @property
    def was_admitted(self) -> bool:
        """Say whether any sample was part of a step."""
        return self.first_step_at is not None

    def usage(self) -> RequestUsage:
        """Return where the prompt's tokens came from, for the sample that was computed first."""
        prompt = len(self.spec.token_ids)
        cached = self.cached_block_tokens + self.cached_partial_tokens + self.cached_tail_tokens
        cached += self.restored_tokens
        return RequestUsage(
            prompt_tokens=prompt,
            cached_block_tokens=self.cached_block_tokens,
            cached_partial_tokens=self.cached_partial_tokens,
            cached_tail_tokens=self.cached_tail_tokens,
            computed_prompt_tokens=prompt - cached,
            generated_tokens=self.num_generated,
            restored_tokens=self.restored_tokens,
        )

    def timings(self) -> RequestTimings:
        """Return how long it waited and worked, in seconds."""
        started = self.first_step_at if self.first_step_at is not None else self.finished_at
        prompt_done = self.prompt_done_at if self.prompt_done_at is not None else started
        first_token = self.first_token_at if self.first_token_at is not None else self.finished_at
        return RequestTimings(
            queue_s=started - self.submitted_at,
            lookup_s=self.lookup_s,
            prefill_s=prompt_done - started,
            decode_s=self.finished_at - first_token,
            num_preemptions=self.num_preemptions,
            restore=self.restore,
        )


def _sampling(spec: GenerateSpec, sample_index: int, *, suppressed: tuple[int, ...]) -> SamplingSpec:
    return SamplingSpec(
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
        repetition_penalty=spec.repetition_penalty,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        seed=spec.seed,
        sample_index=sample_index,
        logit_bias=spec.logit_bias,
        num_top_logprobs=spec.num_top_logprobs,
        suppressed_token_ids=suppressed,
    )
