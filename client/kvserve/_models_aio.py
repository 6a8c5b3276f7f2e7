"""The models of a server, for asyncio: ``client.models``."""

from __future__ import annotations

from typing import Unpack

from kvserve._cache_streams import ReuseWatchState
from kvserve._follow_aio import AsyncProgress, AsyncWatch
from kvserve._models_convert import (
    load_progress_from_pb,
    model_list_from_pb,
    model_status_from_pb,
    reuse_report_from_pb,
)
from kvserve._models_requests import LoadOptions, ModelCalls, ReuseOptions
from kvserve._models_results import LoadProgress, ModelList, ModelStatus, ReuseEvent, ReuseReport
from kvserve._options import TimeoutOptions
from kvserve._predict_inputs import ModelOptions
from kvserve._transport import AsyncTransport

__all__ = ["AsyncModels", "AsyncReuseWatch"]


class AsyncReuseWatch(AsyncWatch[ReuseEvent], ReuseWatchState):
    """Alarms and changes of lifetimes from now on; made by ``client.models.watch_reuse``.

    Use it as ``async with ... as events`` and ``async for event in events``. The first event is STARTED.
    Leaving the block ends the call.
    """


class AsyncModels:
    """The models of the server; it is ``client.models``. Needs a key with the scope "admin" where keys are.

    ``name`` is a model's name. Without ``version=``, a call is about its latest version, or where it says
    so about all. All methods take ``timeout_s=`` and raise ``kvserve.Error``; ValueError or TypeError for
    arguments that make no sense to any server.
    """

    def __init__(self, calls: ModelCalls, transport: AsyncTransport) -> None:
        self._calls = calls
        self._transport = transport

    async def list(self, **options: Unpack[TimeoutOptions]) -> ModelList:
        """Describe them all, loaded or not: a tuple, and what predict models take of the memory for them."""
        return model_list_from_pb(await self._transport.unary(self._calls.list_models(options)))

    def load(self, name: str, **options: Unpack[LoadOptions]) -> AsyncProgress[LoadProgress]:
        """Load one of them: await it, or follow it. See ``LoadOptions``.

        With ``source=`` a version is added first. A load goes on in the server when nobody follows it any
        more::

            async with client.models.load("minilm") as steps:
                async for step in steps:
                    print(step.phase, step.done_bytes, "of", step.total_bytes)
        """
        return AsyncProgress(self._calls.load(name, options), load_progress_from_pb, self._transport)

    async def unload(
        self, name: str, drain_s: float | None = None, **options: Unpack[ModelOptions]
    ) -> ModelStatus:
        """Unload one; of a predict model all versions at one moment, or the one given.

        ``FailedPrecondition``, and nothing unloaded, while requests run that do not end within ``drain_s``.
        """
        answer = await self._transport.unary(self._calls.unload(name, drain_s, options))
        return model_status_from_pb(answer.status)

    async def set_alias(
        self,
        name: str,
        alias: str,
        version: str | None,
        *,
        traffic_share: float | None = None,
        **options: Unpack[TimeoutOptions],
    ) -> tuple[ModelStatus, ...]:
        """Let an alias such as "latest" or "canary" name a version; None takes the alias away.

        ``traffic_share``: share of the calls without a version that it gets. Return all versions of the
        model.
        """
        call = self._calls.set_alias(name, alias, version, traffic_share, options)
        return tuple(map(model_status_from_pb, (await self._transport.unary(call)).versions))

    async def reuse(self, name: str, **options: Unpack[ReuseOptions]) -> ReuseReport:
        """Say what reuse under drift costs and saves: hit rates, and the risk of each policy.

        Of a stateful encoder or a semantic response cache; see ``ReuseOptions``.
        """
        return reuse_report_from_pb(await self._transport.unary(self._calls.reuse(name, options)))

    def watch_reuse(self, name: str | None = None, **options: Unpack[TimeoutOptions]) -> AsyncReuseWatch:
        """Prepare to follow alarms and lifetimes, of one model or all. Has no deadline unless given here."""
        return AsyncReuseWatch(self._calls.watch_reuse(name, options), self._transport)

    async def clear_reuse(self, name: str, **options: Unpack[ModelOptions]) -> int:
        """Forget what is kept for reuse, of all versions or of one; return how many entries.

        What is known of the risk stays.
        """
        return (await self._transport.unary(self._calls.clear_reuse(name, options))).num_entries
