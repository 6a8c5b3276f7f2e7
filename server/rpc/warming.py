"""Compute a prefix ahead: a request of one token that nobody reads, and what is to become of its blocks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from kvserve.v1 import cache_admin_pb2 as pb
from server.engine.interface import Engine
from server.engine.messages import Admitted, Failed, Finished, GenerateSpec, Progress, Refused
from server.rpc.errors import InternalError, NeverFits, error_from_engine
from server.rpc.requests import ModelLimits

__all__ = ["spec_of", "warm"]


def spec_of(
    token_ids: list[int], limits: ModelLimits, *, salt: str, lifetime_s: float | None
) -> GenerateSpec:
    """Return the request that leaves the prefix behind.

    Raises :class:`NeverFits` for one that needs more blocks than the pool has.
    """
    # The one token drawn is never put in: it takes no slot, and nothing of it stays.
    num_slots = limits.num_blocks * limits.block_size
    if len(token_ids) > num_slots:
        raise NeverFits(f"{len(token_ids)} tokens can never fit the server's KV cache of {num_slots} tokens")
    return GenerateSpec(
        token_ids=token_ids, max_new_tokens=1, salt=salt, lifetime_s=lifetime_s, report_progress=True
    )


async def warm(
    engine: Engine, spec: GenerateSpec, *, deadline_s: float | None
) -> AsyncGenerator[pb.WarmPrefixProgress]:
    """Yield how far it is, from the admission to the end; closing it early cancels the work.

    Raises the :class:`CallError` of a refusal or failure. The last message yielded is not marked as such.
    """
    num_tokens, num_cached, started_s = len(spec.token_ids), 0, time.perf_counter()

    def progress(num_computed: int) -> pb.WarmPrefixProgress:
        return pb.WarmPrefixProgress(
            num_tokens=num_tokens,
            computed_tokens=num_computed,
            cached_tokens=num_cached,
            elapsed_s=time.perf_counter() - started_s,
        )

    stream = engine.submit(spec, deadline_s=deadline_s)
    is_done = False
    try:
        async for events in stream:
            for event in events:
                if type(event) is Admitted:
                    num_cached = event.num_cached_tokens
                    yield progress(0)
                elif type(event) is Progress:
                    yield progress(max(0, event.num_computed - num_cached))
                elif type(event) is Finished:
                    is_done = True
                    # After a preemption less, or more, of it may have been found than at first.
                    num_cached = num_tokens - event.usage.computed_prompt_tokens
                    yield progress(event.usage.computed_prompt_tokens)
                    return
                elif type(event) is Refused:
                    is_done = True
                    raise error_from_engine(event.kind, retry_after_s=event.retry_after_s)
                elif type(event) is Failed:
                    is_done = True
                    raise error_from_engine(event.kind)
        raise InternalError("the prefix was not computed")
    finally:
        if not is_done:
            stream.cancel()
