"""``kvserve.v1.CacheAdminService``: see and steer the cache of one engine, and the models.

::

    find the model -> validate everything -> tokenize (thread pool) -> engine, between two steps -> answer

Who may call is decided before a servicer runs: the service needs the scope ``admin``
(``server.rpc.auth``). Text of cached prompts is shown for the caller's own namespace alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec
from google.protobuf.message import Message
from grpc import aio

from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import cache_admin_pb2_grpc
from server.engine import admin_messages as ops
from server.engine.admin_messages import AdminOp, AdminProgress, AdminRefusal, PrefixRef
from server.engine.errors import EngineUnavailableError
from server.engine.interface import ModelControl
from server.predict.interface import PredictBackend
from server.rpc import cache_admin_convert as convert
from server.rpc import cache_admin_read as read
from server.rpc.auth import Authenticator
from server.rpc.cache_admin_read import Selected
from server.rpc.cache_watch import WatchHub
from server.rpc.call import current_call
from server.rpc.errors import (
    DeadlinePassed,
    InternalError,
    InvalidArgument,
    ResponseTooLarge,
    error_from_engine,
)
from server.rpc.generate_service import ServiceLimits
from server.rpc.model_admin import ModelAdmin
from server.rpc.predict_admin import PredictAdmin
from server.rpc.requests import ModelLimits
from server.rpc.served_model import ServedModel
from server.rpc.stream_writer import StreamWriter
from server.rpc.validation import is_namespace_id
from server.rpc.warming import spec_of, warm

__all__ = ["CacheAdminService"]

R = TypeVar("R")
Context = aio.ServicerContext[Any, Any]
NamesNamespace = (
    pb.GetStatsRequest
    | pb.ListPrefixesRequest
    | pb.EvictPrefixesRequest
    | pb.WatchCacheRequest
    | pb.SaveSnapshotRequest
)

MAX_PREVIEW_CHARS = 160
MAX_NAMED = 1_000_000
"""Namespaces among which a tenant's are looked for: all."""
WATCH_BEGIN_S = 1.0
"""Headers of a watch are sent when its events come, or after so long if the engine is not there to tell."""


class CacheAdminService(cache_admin_pb2_grpc.CacheAdminServiceServicer):
    """Serves one model's cache. All methods run on the event loop and are named by the service definition."""

    def __init__(
        self,
        model: ServedModel,
        *,
        hub: WatchHub,
        control: ModelControl | None,
        tenants: Authenticator,
        limits: ServiceLimits,
        predict: PredictBackend | None = None,
    ) -> None:
        """``tenants`` knows the owners of namespaces; without ``control`` the model stays loaded.

        ``predict`` has the models that generate nothing; None: there are none.
        """
        self._model = model
        self._hub = hub
        self._models = ModelAdmin(model, control)
        self._predict = PredictAdmin(predict, generating=model.name)
        self._tenants = tenants
        self._limits = limits

    # -- looking ------------------------------------------------------------------------------------

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:  # noqa: N802
        """Return the cache's figures."""
        ready = self._model.loaded(request.model).ready
        await self._name_namespace(request)
        report = await self._carry_out(read.read_stats(request), ops.CacheReport)
        return self._checked(
            convert.stats_of(
                report,
                model=self._model.name,
                fingerprint=ready.fingerprint,
                block_size=ready.block_size,
                bytes_per_block=ready.bytes_per_block,
                tenant_of=self._tenants.tenant_of,
            )
        )

    async def ListPrefixes(  # noqa: N802
        self, request: pb.ListPrefixesRequest, context: Context
    ) -> pb.ListPrefixesResponse:
        """Return a page of cached prefixes."""
        ready = self._model.loaded(request.model).ready
        salt = current_call.get().caller.salt
        await self._name_namespace(request)
        page = await self._carry_out(read.read_list(request, viewer_salt=salt), ops.PrefixPage)
        # The engine has left the tokens of others out; whose an entry is decides here once more.
        own = {i: e.preview for i, e in enumerate(page.entries) if e.salt == salt and e.preview}
        previews = await self._model.in_pool(partial(self._decode, own)) if own else {}
        return self._checked(
            convert.page_of(
                page,
                bytes_per_block=ready.bytes_per_block,
                previews=previews,
                tenant_of=self._tenants.tenant_of,
            ),
            advice="; ask for a smaller page",
        )

    async def LookupPrefix(  # noqa: N802
        self, request: pb.LookupPrefixRequest, context: Context
    ) -> pb.LookupPrefixResponse:
        """Say how much of a prompt is cached."""
        limits = self._model.loaded(request.model).limits
        prefix, draft = read.read_lookup(request, limits)
        op = msgspec.structs.replace(draft, prefix=await self._ref(prefix, limits))
        return convert.found_of(await self._carry_out(op, ops.PrefixFound, path=prefix.path))

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Context) -> pb.GetPolicyResponse:  # noqa: N802
        """Return the eviction policies."""
        self._model.loaded(request.model)
        report = await self._carry_out(read.read_get_policy(request), ops.PolicyReport)
        return self._checked(convert.policy_of(report))

    # -- steering -----------------------------------------------------------------------------------

    async def WarmPrefix(self, request: pb.WarmPrefixRequest, context: Context) -> None:  # noqa: N802
        """Compute a prefix ahead."""
        limits = self._model.loaded(request.model).limits
        draft = read.read_warm(request, limits)
        call = current_call.get()
        ref = await self._ref(draft.prefix, limits)
        spec = spec_of(ref.token_ids, limits, salt=ref.salt, lifetime_s=draft.lifetime_s)
        remaining_s = call.remaining_s()
        if remaining_s == 0:
            raise DeadlinePassed("the deadline passed before the request was queued")
        self._model.check_taking_requests()
        last = pb.WarmPrefixProgress()
        path = draft.prefix.path
        async with self._writer(context) as writer:
            async with aclosing(warm(self._model.engine, spec, deadline_s=remaining_s)) as steps:
                async for last in steps:
                    await writer.write(last)
            if draft.lifetime_s is not None and last.cached_tokens:
                # What was cached before keeps its own end otherwise.
                await self._carry_out(ops.SetLifetime(ref, draft.lifetime_s), ops.Touched, path=path)
            if draft.pin is not None:
                pin = ops.PinPrefix(ref, draft.pin, draft.pin_lifetime_s)
                last.prefix_id = (await self._carry_out(pin, ops.Pinned, path=path)).prefix_id
            else:
                found = await self._carry_out(ops.LookUpPrefix(ref), ops.PrefixFound, path=path)
                last.prefix_id = found.prefix_id
            last.done = True
            await writer.write(last)

    async def PinPrefix(self, request: pb.PinPrefixRequest, context: Context) -> pb.PinPrefixResponse:  # noqa: N802
        """Hold a prefix."""
        limits = self._model.loaded(request.model).limits
        prefix, draft = read.read_pin(request, limits)
        op = msgspec.structs.replace(draft, prefix=await self._ref(prefix, limits))
        return convert.pinned_of(await self._carry_out(op, ops.Pinned, path=prefix.path))

    async def UnpinPrefix(  # noqa: N802
        self, request: pb.UnpinPrefixRequest, context: Context
    ) -> pb.UnpinPrefixResponse:
        """Let a prefix go."""
        limits = self._model.loaded(request.model).limits
        prefix, draft = read.read_unpin(request, limits)
        op = msgspec.structs.replace(draft, prefix=await self._ref(prefix, limits))
        touched = await self._carry_out(op, ops.Touched, path=prefix.path)
        return pb.UnpinPrefixResponse(was_pinned=touched.num_blocks > 0)

    async def SetLifetime(  # noqa: N802
        self, request: pb.SetLifetimeRequest, context: Context
    ) -> pb.SetLifetimeResponse:
        """Say when a prefix expires."""
        limits = self._model.loaded(request.model).limits
        prefix, draft = read.read_set_lifetime(request, limits)
        op = msgspec.structs.replace(draft, prefix=await self._ref(prefix, limits))
        touched = await self._carry_out(op, ops.Touched, path=prefix.path)
        return pb.SetLifetimeResponse(prefix_id=touched.prefix_id, num_blocks=touched.num_blocks)

    async def ReleasePrefix(  # noqa: N802
        self, request: pb.ReleasePrefixRequest, context: Context
    ) -> pb.ReleasePrefixResponse:
        """Hint that a prefix is not needed any more."""
        limits = self._model.loaded(request.model).limits
        prefix, draft = read.read_release(request, limits)
        op = msgspec.structs.replace(draft, prefix=await self._ref(prefix, limits))
        touched = await self._carry_out(op, ops.Touched, path=prefix.path)
        return pb.ReleasePrefixResponse(num_blocks=touched.num_blocks)

    async def EvictPrefixes(  # noqa: N802
        self, request: pb.EvictPrefixesRequest, context: Context
    ) -> pb.EvictPrefixesResponse:
        """Take prefixes out of the cache."""
        limits = self._model.loaded(request.model).limits
        await self._name_namespace(request)
        subtree, op = read.read_evict(request, limits)
        if subtree is not None:
            op = msgspec.structs.replace(op, subtree=await self._ref(subtree, limits))
        evicted = await self._carry_out(op, ops.Evicted, path="" if subtree is None else subtree.path)
        blocks, kept, objects = convert.evicted_of(evicted)
        return pb.EvictPrefixesResponse(evicted_blocks=blocks, kept_blocks=kept, evicted_objects=objects)

    async def ClearCache(self, request: pb.ClearCacheRequest, context: Context) -> pb.ClearCacheResponse:  # noqa: N802
        """Take everything out of the cache."""
        self._model.loaded(request.model)
        evicted = await self._carry_out(read.read_clear(request), ops.Evicted)
        blocks, kept, objects = convert.evicted_of(evicted)
        return pb.ClearCacheResponse(evicted_blocks=blocks, kept_blocks=kept, evicted_objects=objects)

    async def SetPolicy(self, request: pb.SetPolicyRequest, context: Context) -> pb.GetPolicyResponse:  # noqa: N802
        """Change the eviction policies."""
        self._model.loaded(request.model)
        report = await self._carry_out(read.read_set_policy(request), ops.PolicyReport)
        return self._checked(convert.policy_of(report))

    # -- watching -----------------------------------------------------------------------------------

    async def WatchCache(self, request: pb.WatchCacheRequest, context: Context) -> None:  # noqa: N802
        """Tell what happens to the cache, over restarts of the engine."""
        self._model.check_name(request.model)
        await self._name_namespace(request)
        watcher = self._hub.join(read.read_watch(request))
        try:
            async with self._writer(context) as writer:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(watcher.has_begun.wait(), WATCH_BEGIN_S)
                # So that a client knows: whatever it does from here on, it will hear of.
                await context.send_initial_metadata(())
                while True:
                    await writer.write(await watcher.next())
        finally:
            self._hub.leave(watcher)

    # -- snapshots ----------------------------------------------------------------------------------

    async def SaveSnapshot(self, request: pb.SaveSnapshotRequest, context: Context) -> None:  # noqa: N802
        """Write cached prefixes to the server's disk."""
        self._model.loaded(request.model)
        await self._name_namespace(request)
        await self._snapshot(read.read_save(request), context)

    async def RestoreSnapshot(self, request: pb.RestoreSnapshotRequest, context: Context) -> None:  # noqa: N802
        """Read cached prefixes from the server's disk."""
        self._model.loaded(request.model)
        await self._snapshot(read.read_restore(request), context)

    async def _snapshot(self, op: ops.SaveSnapshot | ops.RestoreSnapshot, context: Context) -> None:
        self._model.check_taking_requests()
        started_s = time.perf_counter()
        async with self._writer(context) as writer:
            try:
                async with aclosing(self._model.engine.administer_with_progress(op)) as messages:
                    async for message in messages:
                        progress = pb.SnapshotProgress(elapsed_s=time.perf_counter() - started_s)
                        match message:
                            case AdminProgress():
                                progress.done_objects = message.done_objects
                                progress.total_objects = message.total_objects
                            case ops.SnapshotDone():
                                progress.done_objects = progress.total_objects = message.num_objects
                                progress.done = True
                            case _:
                                raise _unexpected(message)
                        progress.done_bytes = (
                            message.done_bytes if isinstance(message, AdminProgress) else message.num_bytes
                        )
                        progress.skipped_objects = message.skipped_objects
                        await writer.write(progress)
            except EngineUnavailableError as error:
                raise error_from_engine(error.kind, retry_after_s=error.retry_after_s) from error

    # -- models -------------------------------------------------------------------------------------

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """Return the models and how they are."""
        response = self._models.statuses()
        await self._predict.add_statuses(response)
        return self._checked(response)

    async def LoadModel(self, request: pb.LoadModelRequest, context: Context) -> None:  # noqa: N802
        """Load a model, telling how it goes."""
        models = self._predict if self._predict.is_meant(request) else self._models
        async with self._writer(context) as writer, aclosing(models.load(request)) as messages:
            async for message in messages:
                await writer.write(message)

    async def UnloadModel(self, request: pb.UnloadModelRequest, context: Context) -> pb.UnloadModelResponse:  # noqa: N802
        """Unload a model."""
        models = self._predict if self._predict.is_meant(request) else self._models
        return await models.unload(request)

    async def SetModelAlias(  # noqa: N802
        self, request: pb.SetModelAliasRequest, context: Context
    ) -> pb.SetModelAliasResponse:
        """Name a version of a predict model."""
        return self._checked(await self._predict.set_alias(request))

    # -- reuse under drift --------------------------------------------------------------------------

    async def GetReuse(self, request: pb.GetReuseRequest, context: Context) -> pb.GetReuseResponse:  # noqa: N802
        """Return what reuse costs and saves."""
        return self._checked(await self._predict.reuse(request), advice="; ask for fewer keys")

    async def WatchReuse(self, request: pb.WatchReuseRequest, context: Context) -> None:  # noqa: N802
        """Tell what happens to reuse."""
        async with self._writer(context) as writer, aclosing(self._predict.watch(request)) as events:
            async for event in events:
                await writer.write(event)

    async def ClearReuse(self, request: pb.ClearReuseRequest, context: Context) -> pb.ClearReuseResponse:  # noqa: N802
        """Forget what is kept for reuse."""
        return await self._predict.clear_reuse(request)

    # -- inside -------------------------------------------------------------------------------------

    async def _ref(self, prefix: Selected, limits: ModelLimits) -> PrefixRef:
        """Return a prefix for the engine; looked up in the caller's own namespace if named by its text."""
        prompt = prefix.prompt
        token_ids = [] if prompt is None else await self._model.tokenize(prompt, limits)
        return prefix.ref(token_ids, limits, salt=current_call.get().caller.salt)

    async def _name_namespace(self, request: NamesNamespace) -> None:
        """Put the id into a request that names a namespace by its tenant.

        Raises :class:`InvalidArgument` for a tenant with several of them, or of whom nothing is known yet.
        What is no tenant's name is left for the validation.
        """
        tenant = request.namespace
        salts = self._tenants.salts_of(tenant)
        if not salts or is_namespace_id(tenant):
            return
        report = await self._carry_out(ops.ReadStats(max_namespaces=MAX_NAMED), ops.CacheReport)
        found = sorted(one.namespace for one in report.namespaces if one.salt in salts)
        if not found:
            raise InvalidArgument.of("namespace", "the cache knows nothing of this tenant yet")
        if len(found) > 1:
            raise InvalidArgument.of(
                "namespace", f"this tenant has one for each of its keys; name one by id: {', '.join(found)}"
            )
        request.namespace = found[0]

    async def _carry_out(self, op: AdminOp, expected: type[R], *, path: str = "") -> R:
        """Have the engine carry ``op`` out. ``path`` is the field that names its prefix."""
        self._model.check_taking_requests()
        try:
            result = await self._model.engine.administer(op)
        except EngineUnavailableError as error:
            raise error_from_engine(error.kind, retry_after_s=error.retry_after_s) from error
        if not isinstance(result, expected):
            raise _unexpected(result, path=path)
        return result

    def _checked(self, response: R, *, advice: str = "") -> R:
        """Return the response if it may be sent."""
        assert isinstance(response, Message)
        if response.ByteSize() > self._limits.max_message_bytes:
            raise ResponseTooLarge(f"the answer exceeds the server's message limit{advice}")
        return response

    @asynccontextmanager
    async def _writer(self, context: Context) -> AsyncIterator[StreamWriter]:
        writer = StreamWriter(context, timeout_s=self._limits.write_timeout_s)
        try:
            yield writer
        finally:
            writer.close()

    def _decode(self, tokens: dict[int, list[int]]) -> dict[int, str]:
        decode = partial(self._model.tokenizer.decode, skip_special_tokens=False)
        return {place: decode(ids)[-MAX_PREVIEW_CHARS:] for place, ids in tokens.items()}


def _unexpected(result: object, *, path: str = "") -> Exception:
    if isinstance(result, AdminRefusal):
        return convert.error_from_refusal(result, path=path)
    return InternalError("the engine answered something else")
