"""An engine without a model or a scheduler: tokens as fast as they are taken, to measure what is in front.

Every open stream gets one ``Tokens`` event per step, as from a real engine, in one ``dispatch``. What
the front end can do at best is then a matter of its own code.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from server.engine.admin_desk import ShieldedDesk
from server.engine.admin_messages import (
    AdminCall,
    AdminOp,
    AdminProgress,
    AdminResult,
    CacheEvents,
    CancelAdmin,
    Watch,
)
from server.engine.desk import Desk
from server.engine.interface import EngineState
from server.engine.messages import (
    Admitted,
    Cancel,
    EngineReady,
    EngineStats,
    Failed,
    FailureKind,
    Finish,
    Finished,
    GenerateSpec,
    RequestTimings,
    RequestUsage,
    Submit,
    ToEngine,
    Tokens,
)
from server.engine.streams import Event, EventStream
from server.process.quarantine import QuarantineCounts

__all__ = ["FakeEngine", "fake_ready"]


def fake_ready(
    *, vocab_size: int = 1000, block_size: int = 16, num_blocks: int = 1024, max_model_length: int = 1 << 20
) -> EngineReady:
    """Return what an engine without a model says of itself."""
    return EngineReady(
        family="fake",
        fingerprint="fake",
        num_parameters=0,
        vocab_size=vocab_size,
        max_model_length=max_model_length,
        dtype="none",
        device="none",
        executor="fake",
        attention="none",
        block_size=block_size,
        num_blocks=num_blocks,
        bytes_per_block=0,
        num_threads=1,
        waiting_bound_s=30.0,
        load_s=0.0,
    )


@dataclass(slots=True)
class _Running:
    key: int
    spec: GenerateSpec
    deadline: float | None
    drawn: list[int]
    """Tokens so far, by sample; -1 once the sample has ended."""
    first: int
    """Sum of the prompt."""
    num_generated: int = 0


class FakeEngine:
    """Implements ``interface.Engine`` on the event loop itself. Never full, never slow. Caches nothing.

    The token at position ``p`` of sample ``s`` is ``(sum of the prompt + s + p) % vocab_size``.
    """

    def __init__(
        self,
        *,
        ready: EngineReady | None = None,
        step_s: float = 0.0,
        tokens_per_step: int = 1,
        max_waiting: int | None = None,
    ) -> None:
        """``step_s`` is the pause between steps; 0: as soon as the event loop has gone round."""
        self._ready = ready or fake_ready()
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._desk = Desk(self._send, max_waiting=max_waiting)
        self._cache = ShieldedDesk(None)
        self._running: dict[int, _Running] = {}
        self._admitted: list[Event] = []
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._steps = 0
        self._num_generated = 0
        self._num_finished = 0
        self._num_prompt_tokens = 0

    @property
    def state(self) -> EngineState:
        return self._desk.state.value

    @property
    def ready(self) -> EngineReady | None:
        return self._ready

    @property
    def stats(self) -> EngineStats | None:
        """Return a snapshot; there are no blocks, so that everything about them is 0."""
        prompt = self._num_prompt_tokens
        return EngineStats(
            num_running=len(self._running),
            num_waiting=0,
            num_blocks=self._ready.num_blocks,
            num_blocks_leased=0,
            num_blocks_cached=0,
            num_blocks_free=self._ready.num_blocks,
            steps=self._steps,
            step_s=self._steps * self._step_s,
            plan_s=0.0,
            prompt_tokens=prompt,
            cached_block_tokens=0,
            cached_partial_tokens=0,
            cached_tail_tokens=0,
            computed_prompt_tokens=prompt,
            recomputed_tokens=0,
            generated_tokens=self._num_generated,
            requests_finished=self._num_finished,
            requests_failed=0,
            preemptions=0,
            evicted_blocks=0,
            expired_blocks=0,
            grouped_tokens=0,
        )

    async def start(self) -> None:
        if self._task is not None:
            raise RuntimeError("an engine is started once")
        self._task = asyncio.create_task(self._generate(), name="fake-engine")
        self._desk.state.set(EngineState.READY)

    def submit(self, spec: GenerateSpec, *, deadline_s: float | None = None) -> EventStream:
        return self._desk.submit(spec, deadline_s)

    @property
    def num_open_requests(self) -> int:
        """Return how many requests run."""
        return self._desk.streams.num_open

    @property
    def is_given_up(self) -> bool:
        """Say that ``recover`` is always possible."""
        return False

    @property
    def num_restarts(self) -> int:
        """Return that it never was another one."""
        return 0

    @property
    def quarantine(self) -> QuarantineCounts:
        """Suspect nobody: it dies of its own accord."""
        return self._desk.quarantine.counts

    async def administer(self, op: AdminOp) -> AdminResult:
        return await self._desk.admin.administer(op)

    def administer_with_progress(self, op: AdminOp) -> AsyncGenerator[AdminProgress | AdminResult]:
        return self._desk.admin.administer_with_progress(op)

    def watch(self) -> AsyncGenerator[CacheEvents]:
        return self._desk.admin.watch()

    async def wait_state(self, state: EngineState) -> None:
        await self._desk.state.wait(state)

    async def stop(self, *, grace_s: float) -> None:
        if self._desk.state.value is EngineState.READY:
            self._desk.state.set(EngineState.DRAINING)
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        while self._running and loop.time() < end:  # noqa: ASYNC110 - an event per finished request would cost
            await asyncio.sleep(min(0.01, grace_s))
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._desk.fail_all(FailureKind.DRAINING, "the server is shutting down")
        self._desk.state.stop()
        self._desk.admin.close()

    def lose(self) -> None:
        """Behave as if the engine process had died: every stream fails, nothing is taken any more."""
        self._running.clear()
        self._admitted.clear()
        self._desk.state.set(EngineState.DEAD)
        self._desk.fail_all(FailureKind.ENGINE_LOST, "the engine was lost")

    def recover(self) -> None:
        """Be ready again after ``lose``."""
        self._desk.state.set(EngineState.READY)
        self._desk.admin.engine_is_ready()

    def _send(self, message: ToEngine) -> None:
        now = asyncio.get_running_loop().time()
        if isinstance(message, Submit):
            deadline = None if message.deadline_s is None else now + message.deadline_s
            drawn = [0] * message.spec.num_samples
            self._running[message.key] = _Running(
                message.key, message.spec, deadline, drawn, sum(message.spec.token_ids)
            )
            self._num_prompt_tokens += len(message.spec.token_ids)
            self._admitted.append(Admitted(message.key, 0))
        elif isinstance(message, Cancel) and (running := self._running.get(message.key)) is not None:
            for sample, count in enumerate(running.drawn):
                if count >= 0 and message.sample_index in (None, sample):
                    running.drawn[sample] = -1
        elif isinstance(message, AdminCall | CancelAdmin | Watch):
            self._cache.accept(message)
            asyncio.get_running_loop().call_soon(self._answer)
            return
        self._work.set()

    def _answer(self) -> None:
        for message in self._cache.drain():
            self._desk.admin.dispatch(message)

    async def _generate(self) -> None:
        while True:
            if not self._running:
                self._work.clear()
                await self._work.wait()
            self._desk.streams.dispatch(self._step())
            await asyncio.sleep(self._step_s)

    def _step(self) -> list[Event]:
        """Return the events of one step."""
        now = asyncio.get_running_loop().time()
        events, self._admitted = self._admitted, []
        self._steps += 1
        for running in list(self._running.values()):
            if running.deadline is not None and now >= running.deadline:
                del self._running[running.key]
                events.append(Failed(running.key, FailureKind.DEADLINE, "the deadline passed"))
                continue
            for sample, count in enumerate(running.drawn):
                if count >= 0:
                    events.append(self._draw(running, sample, count))
            if all(count < 0 for count in running.drawn):
                del self._running[running.key]
                self._num_finished += 1
                events.append(_finished(running))
        return events

    def _draw(self, running: _Running, sample: int, start: int) -> Tokens:
        spec = running.spec
        stop = min(start + self._tokens_per_step, spec.max_new_tokens)
        first = running.first + sample
        token_ids = [(first + position) % self._ready.vocab_size for position in range(start, stop)]
        ended = stop == spec.max_new_tokens
        running.drawn[sample] = -1 if ended else stop
        running.num_generated += stop - start
        self._num_generated += stop - start
        num_best = spec.num_top_logprobs
        return Tokens(
            key=running.key,
            sample_index=sample,
            token_ids=token_ids,
            logprobs=None if num_best is None else [-1.0] * len(token_ids),
            top_logprobs=None if num_best is None else [[(t, -1.0)] * num_best for t in token_ids],
            finish=Finish.LENGTH if ended else None,
        )


def _finished(running: _Running) -> Finished:
    num_prompt = len(running.spec.token_ids)
    return Finished(
        running.key,
        RequestUsage(
            prompt_tokens=num_prompt,
            cached_block_tokens=0,
            cached_partial_tokens=0,
            cached_tail_tokens=0,
            computed_prompt_tokens=num_prompt,
            generated_tokens=running.num_generated,
        ),
        RequestTimings(queue_s=0.0, lookup_s=0.0, prefill_s=0.0, decode_s=0.0),
    )
