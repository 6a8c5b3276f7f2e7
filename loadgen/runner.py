"""Ask a server, through the public client, and write down what happens.

Everything runs on one event loop. Answers of the server that are errors are records like others; an error of
this program ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import kvserve
from loadgen.arrivals import Arrivals, ClosedLoop
from loadgen.records import Record, ServerTimings, ServerUsage
from loadgen.workloads import Conversation, Turn

__all__ = ["Runner", "run_load"]


class Runner:
    """Plays conversations against one server.

    ``clients``: one connection each, taken in turn. ``on_record`` is called with every record as it is made.
    """

    def __init__(
        self,
        clients: Sequence[kvserve.AsyncClient],
        *,
        timeout_s: float | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        self._clients = clients
        self._timeout_s = timeout_s
        self._on_record = on_record
        self._started = 0.0
        self.records: list[Record] = []

    async def run(self, conversations: Sequence[Conversation], arrivals: Arrivals) -> list[Record]:
        """Play all conversations; return the records in the order of their ends."""
        self._started = time.perf_counter()
        if isinstance(arrivals, ClosedLoop):
            await self._run_closed(conversations, arrivals.concurrency)
        else:
            times = arrivals.times_s(len(conversations))
            async with asyncio.TaskGroup() as group:
                for index, (conversation, due) in enumerate(zip(conversations, times, strict=True)):
                    group.create_task(self._play_at(index, conversation, due))
        return self.records

    def _now(self) -> float:
        return time.perf_counter() - self._started

    async def _run_closed(self, conversations: Sequence[Conversation], concurrency: int) -> None:
        waiting = iter(enumerate(conversations))

        async def play_next() -> None:
            for index, conversation in waiting:
                await self._play(index, conversation, self._now())

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(conversations))):
                group.create_task(play_next())

    async def _play_at(self, index: int, conversation: Conversation, due_s: float) -> None:
        await asyncio.sleep(due_s - self._now())
        await self._play(index, conversation, due_s)

    async def _play(self, index: int, conversation: Conversation, due_s: float) -> None:
        """Ask turn after turn; a turn that fails ends the conversation."""
        context: list[int] = []
        for number, turn in enumerate(conversation.turns):
            if number > 0:
                due_s = self._now() + conversation.think_s
                await asyncio.sleep(conversation.think_s)
            context += turn.token_ids
            record, answer = await self._ask(index, number, conversation.group, turn, context, due_s)
            self.records.append(record)
            if self._on_record is not None:
                self._on_record(record)
            if record.error is not None:
                return
            context += answer

    async def _ask(
        self, index: int, number: int, group: int, turn: Turn, prompt: list[int], due_s: float
    ) -> tuple[Record, list[int]]:
        client = self._clients[index % len(self._clients)]
        event_at_s: list[float] = []
        event_tokens: list[int] = []
        answer: list[int] = []
        usage, timings, error = None, None, None
        started_at_s = self._now()
        try:
            async with client.generate(
                token_ids=prompt,
                max_new_tokens=turn.max_new_tokens,
                temperature=0.0,
                ignore_eos=True,
                timeout_s=self._timeout_s,
            ) as stream:
                async for event in stream:
                    if event.token_ids:
                        event_at_s.append(self._now())
                        event_tokens.append(len(event.token_ids))
                        answer += event.token_ids
                usage = _usage(stream.result.usage)
                timings = _timings(stream.result.timings)
        except kvserve.Error as failure:
            error = f"{type(failure).__name__}: {failure}"
        record = Record(
            conversation=index,
            turn=number,
            group=group,
            scheduled_at_s=due_s,
            started_at_s=started_at_s,
            ended_at_s=self._now(),
            prompt_tokens=len(prompt),
            generated_tokens=len(answer),
            event_at_s=event_at_s,
            event_tokens=event_tokens,
            usage=usage,
            timings=timings,
            error=error,
        )
        return record, answer


async def run_load(
    target: str | None,
    conversations: Sequence[Conversation],
    arrivals: Arrivals,
    *,
    num_connections: int = 1,
    timeout_s: float | None = None,
    on_record: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Connect, wait until the server is ready, play all conversations, disconnect; return the records."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(kvserve.AsyncClient(target)) for _ in range(num_connections)
        ]
        for client in clients:
            await client.wait_ready()
        runner = Runner(clients, timeout_s=timeout_s, on_record=on_record)
        return await runner.run(conversations, arrivals)


def _usage(usage: kvserve.Usage) -> ServerUsage:
    return ServerUsage(
        prompt_tokens=usage.prompt_tokens,
        cached_block_tokens=usage.cached_block_tokens,
        cached_partial_tokens=usage.cached_partial_tokens,
        cached_tail_tokens=usage.cached_tail_tokens,
        computed_prompt_tokens=usage.computed_prompt_tokens,
        generated_tokens=usage.generated_tokens,
    )


def _timings(timings: kvserve.Timings) -> ServerTimings:
    return ServerTimings(
        tokenize_s=timings.tokenize_s,
        queue_s=timings.queue_s,
        lookup_s=timings.lookup_s,
        prefill_s=timings.prefill_s,
        first_token_s=timings.first_token_s,
        decode_s=timings.decode_s,
        total_s=timings.total_s,
    )
