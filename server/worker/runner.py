"""The worker: loads a model, owns KV memory and kept logits, computes one step plan at a time.

One step::

    saves -> loads -> copies -> pack -> clear fresh blocks -> forward -> save logits -> gather rows -> sample
                                                              (skipped if no sequence has tokens)

Logits are saved before any are drawn from, so a sequence may draw from what another one saves in the
same step. A sequence whose logits are not finite fails alone. What it left in KV memory stays as it is
(the engine must not share its blocks); it can not spread, since blocks are cleared when begun anew.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import torch

from kvcore.tiers.interface import ObjectFormat
from server.engine.messages import EngineReady
from server.engine.options import EngineOptions
from server.engine.plan import KvLoad, KvSave, KvTarget, SampledToken, SequencePlan, StepPlan, StepResult
from server.worker.batch import Executor
from server.worker.equivalence import EquivalenceProbe
from server.worker.executors import choose_executor
from server.worker.gate import check_cache_window, check_config, trace_attention
from server.worker.kv_memory import KvLayout, KvMemory
from server.worker.loading import LoadedModel, load_model
from server.worker.logits_store import LogitsStore
from server.worker.memory_size import choose_num_blocks
from server.worker.packing import pack_step
from server.worker.sampler import Draw, SampleFailure, sample

__all__ = ["ModelDescription", "ModelRunner", "choose_num_threads"]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What :meth:`ModelRunner.describe` reports and the runner itself never reads."""

    family: str
    fingerprint: str
    num_parameters: int
    max_model_length: int
    dtype: str
    attention: str
    num_threads: int
    waiting_bound_s: float
    load_s: float
    eos_token_ids: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


class ModelRunner:
    """Compute step plans (``server.engine.plan.StepRunner``). One thread at a time; ``run`` blocks."""

    def __init__(
        self, executor: Executor, memory: KvMemory, store: LogitsStore, *, description: ModelDescription,
        vocab_size: int,
    ) -> None:  # fmt: skip
        self._executor = executor
        self._memory = memory
        self._store = store
        self._description = description
        self._vocab_size = vocab_size

    @classmethod
    def build(cls, options: EngineOptions) -> ModelRunner:
        """Load, check and set up all that ``options`` ask for.

        Raises ``WorkerStartError`` with a reason fit for an operator.
        """
        started = time.perf_counter()
        num_threads = choose_num_threads(options.num_threads)
        torch.set_num_threads(num_threads)
        loaded = load_model(options)
        cap, notes = check_config(loaded.config)
        max_length = min(cap or loaded.max_model_length, loaded.max_model_length)
        probe = EquivalenceProbe(loaded.model, block_size=options.block_size, max_length=max_length)
        shape = trace_attention(loaded.model)
        window_cap, window_notes = check_cache_window(loaded.config, shape.windows)
        max_length = min(window_cap or max_length, max_length)
        notes = [*loaded.notes, *notes, *window_notes]
        layout = KvLayout(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            block_size=options.block_size,
            dtype=loaded.dtype,
        )
        activations = _activation_bytes(options, loaded, shape.vocab_size)
        num_blocks = choose_num_blocks(options, layout, loaded.device, activation_bytes=activations)
        memory = KvMemory(layout, num_blocks, loaded.device)
        chosen = choose_executor(options, loaded, shape, memory, probe, num_threads)
        store = LogitsStore(options.num_logits_slots, shape.vocab_size, device=loaded.device)
        if store.num_slots < options.num_logits_slots:
            notes.append(f"last logits are kept for {store.num_slots} prompts (memory cap)")
        description = ModelDescription(
            family=loaded.family,
            fingerprint=loaded.fingerprint,
            num_parameters=loaded.num_parameters,
            max_model_length=max_length,
            dtype=str(loaded.dtype).removeprefix("torch."),
            attention=chosen.attention,
            num_threads=num_threads,
            waiting_bound_s=options.waiting_bound_s,
            load_s=time.perf_counter() - started,
            eos_token_ids=loaded.eos_token_ids,
            notes=[*notes, *chosen.notes],
        )
        return cls(chosen.executor, memory, store, description=description, vocab_size=shape.vocab_size)

    @property
    def num_blocks(self) -> int:
        """Return how many KV blocks there are."""
        return self._memory.num_blocks

    @property
    def block_size(self) -> int:
        """Return how many positions one block holds."""
        return self._memory.layout.block_size

    @property
    def num_logits_slots(self) -> int:
        """Return how many rows of last logits are kept; fewer than asked for if they would take too much."""
        return self._store.num_slots

    @property
    def object_format(self) -> ObjectFormat:
        """Return what a block is made of, for tiers."""
        layout = self._memory.layout
        return ObjectFormat(
            fingerprint=self._description.fingerprint,
            dtype=str(layout.dtype).removeprefix("torch."),
            block_shape=(layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim),
            vocab_size=self._vocab_size,
        )

    @property
    def memory(self) -> KvMemory:
        """Return the KV memory (for tiers and tests)."""
        return self._memory

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Return the ids that end a text, from configuration and generation configuration."""
        return self._description.eos_token_ids

    def describe(self) -> EngineReady:
        """Return what the front end shows about this worker."""
        d = self._description
        return EngineReady(
            family=d.family,
            fingerprint=d.fingerprint,
            num_parameters=d.num_parameters,
            vocab_size=self._vocab_size,
            max_model_length=d.max_model_length,
            dtype=d.dtype,
            device=str(self._memory.storage.device),
            executor=self._executor.name,
            attention=d.attention,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            bytes_per_block=self._memory.layout.bytes_per_block,
            num_threads=d.num_threads,
            waiting_bound_s=d.waiting_bound_s,
            load_s=d.load_s,
            notes=d.notes,
        )

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step; block until it is done. Raises only if the worker as a whole is broken."""
        memory = self._memory
        saved = [self._export(save) for save in plan.saves]
        for load in plan.loads:
            self._import(load)
        if not plan.sequences:
            return StepResult(plan.step_id, [], saved=saved)
        memory.copy(plan.copies)
        computing = time.perf_counter()
        step = pack_step(plan, self.block_size, memory.storage.device)
        logits: torch.Tensor | None = None
        if step.batch is not None:
            memory.clear(step.fresh_blocks)
            logits = self._executor.forward(step.batch)
            if logits.device.type == "cuda":
                torch.cuda.synchronize(logits.device)
        forwarded = time.perf_counter()
        self._save(plan.sequences, step.logit_row, logits)

        sampled: list[SampledToken | None] = [None] * len(plan.sequences)
        failed: dict[int, str] = {}
        drawing = [i for i, s in enumerate(plan.sequences) if s.sampling is not None]
        if drawing:
            rows = self._gather([(plan.sequences[i], step.logit_row[i]) for i in drawing], logits)
            draws = [_draw(plan.sequences[i]) for i in drawing]
            for i, outcome in zip(drawing, sample(rows, draws), strict=True):
                if isinstance(outcome, SampleFailure):
                    failed[plan.sequences[i].sequence_id] = outcome.reason
                else:
                    sampled[i] = outcome
        return StepResult(
            plan.step_id,
            sampled,
            failed,
            forward_s=forwarded - computing,
            sample_s=time.perf_counter() - forwarded,
            saved=saved,
        )

    def _export(self, save: KvSave) -> bytes:
        if save.target is KvTarget.LOGITS:
            return self._store.export(save.index)
        return self._memory.save(save.index)

    def _import(self, load: KvLoad) -> None:
        if load.target is KvTarget.LOGITS:
            self._store.restore(load.index, load.payload)
        else:
            self._memory.load(load.index, load.payload)

    def _save(self, sequences: list[SequencePlan], logit_row: list[int], logits: torch.Tensor | None) -> None:
        slots, rows = [], []
        for sequence, row in zip(sequences, logit_row, strict=True):
            if sequence.save_logits_to is not None and row >= 0:
                slots.append(sequence.save_logits_to)
                rows.append(row)
        if logits is not None and slots:
            self._store.save(slots, logits[torch.tensor(rows, device=logits.device)])

    def _gather(self, wanted: list[tuple[SequencePlan, int]], logits: torch.Tensor | None) -> torch.Tensor:
        """Return the logits ``[len(wanted), vocab]`` to draw from, of this step or kept."""
        if logits is not None and [row for _, row in wanted] == list(range(logits.shape[0])):
            return logits
        result = torch.empty(len(wanted), self._vocab_size, device=self._memory.storage.device)
        kept = [at for at, (sequence, _) in enumerate(wanted) if sequence.logits_from is not None]
        if kept:
            slots = [slot for at in kept if (slot := wanted[at][0].logits_from) is not None]
            result[torch.tensor(kept, device=result.device)] = self._store.load(slots)
        computed = [at for at, (_, row) in enumerate(wanted) if row >= 0]
        if logits is not None and computed:
            rows = [wanted[at][1] for at in computed]
            index = torch.tensor(computed, device=result.device)
            result[index] = logits[torch.tensor(rows, device=logits.device)]
        if len(kept) + len(computed) != len(wanted):
            raise ValueError("a sequence is to be sampled without tokens and without kept logits")
        return result


def choose_num_threads(wanted: int | None) -> int:
    """Return ``wanted``, or one less than the cores this process may use, at least one.

    With as many threads as cores, any other busy process makes every parallel region wait for its
    slowest thread; the core left over is the front end's.
    """
    if wanted is not None:
        return max(1, wanted)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, cores - 1)


def _draw(sequence: SequencePlan) -> Draw:
    assert sequence.sampling is not None  # the caller chose those that have it
    return Draw(
        sequence.sampling,
        position=sequence.position,
        history=sequence.history or (),
        num_prompt_tokens=sequence.num_prompt_tokens,
    )


def _activation_bytes(options: EngineOptions, loaded: LoadedModel, vocab_size: int) -> int:
    """Estimate what one step needs besides weights and KV, generously: hidden states and logits."""
    hidden = int(getattr(loaded.config, "hidden_size", 4096))
    inner = int(getattr(loaded.config, "intermediate_size", None) or 4 * hidden)
    per_token = (8 * hidden + 3 * inner) * torch.empty(0, dtype=loaded.dtype).element_size()
    logits = 4 * min(options.max_running, options.max_batch_tokens) * vocab_size * 4
    return options.max_batch_tokens * per_token + logits + (256 << 20)
