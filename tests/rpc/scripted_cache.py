"""A small CacheAdmin that really keeps prefixes, pins, snapshots and models: for tests of the client.

A token is a byte of the text, a block is four tokens, and every prefix is one entry.
"""

import asyncio
import hashlib
from dataclasses import dataclass, field, replace

import grpc

from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import cache_admin_pb2_grpc

BLOCK_SIZE = 4
BYTES_PER_BLOCK = 1024
NUM_BLOCKS = 64


@dataclass
class Entry:
    tokens: tuple[int, ...]
    namespace: str = "ns-main"
    tenant: str = "acme"
    hits: int = 0
    age_s: float = 60.0
    idle_s: float = 5.0
    lifetime_s: float | None = None
    pin: pb.PinKind = pb.PIN_KIND_UNSPECIFIED
    pin_lifetime_s: float | None = None
    in_use: bool = False
    value: float = 1.0
    tiers: dict[str, int] = field(default_factory=dict)

    @property
    def prefix_id(self):
        return hashlib.sha256(f"{self.namespace}:{self.tokens}".encode()).hexdigest()[:16]

    @property
    def num_blocks(self):
        return len(self.tokens) // BLOCK_SIZE

    def info(self):
        info = pb.PrefixInfo(
            prefix_id=self.prefix_id,
            namespace=self.namespace,
            tenant=self.tenant,
            num_tokens=len(self.tokens),
            own_tokens=len(self.tokens),
            own_blocks=self.num_blocks,
            own_bytes=self.num_blocks * BYTES_PER_BLOCK,
            hits=self.hits,
            age_s=self.age_s,
            idle_s=self.idle_s,
            pin=self.pin,
            in_use=self.in_use,
            tiers=[pb.TierBlocks(tier=tier, blocks=blocks) for tier, blocks in self.tiers.items()],
            value=self.value,
            preview=bytes(self.tokens[-24:]).decode(errors="replace") if self.tenant == "acme" else None,
        )
        if self.lifetime_s is not None:
            info.expires_in_s = self.lifetime_s
        if self.pin_lifetime_s is not None:
            info.pin_expires_in_s = self.pin_lifetime_s
        return info


def seconds(request, name):
    return getattr(request, name).ToTimedelta().total_seconds() if request.HasField(name) else None


class ScriptedCache(cache_admin_pb2_grpc.CacheAdminServiceServicer):
    """State that tests may look at and change; ``tell`` sends an event to all watchers."""

    def __init__(self):
        self.entries: list[Entry] = []
        self.requests: list[object] = []
        self.watchers: list[asyncio.Queue[pb.CacheEvent]] = []
        self.snapshots: dict[str, list[Entry]] = {}
        self.models = {"scripted": pb.MODEL_STATE_READY, "other": pb.MODEL_STATE_UNLOADED}
        self.running = 0
        self.policy = "lru"
        self.trial: list[str] = []
        self.canary: pb.CanaryInfo | None = None
        self.epoch, self.sequence = 1, 0
        self.tokens_asked, self.tokens_reused = 1000, 400
        self.may_warm = asyncio.Event()
        self.may_warm.set()
        self.watching = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.unavailable_calls = 0

    def add(self, text, **fields):
        entry = Entry(tuple(text.encode()), **fields)
        self.entries.append(entry)
        return entry

    def tell(self, kind, *, entry=None, **fields):
        self.sequence += 1
        event = pb.CacheEvent(sequence=self.sequence, epoch=self.epoch, kind=kind, time_s=1.5, **fields)
        if entry is not None:
            event.namespace, event.prefix_id = entry.namespace, entry.prefix_id
            event.num_tokens, event.num_blocks = len(entry.tokens), entry.num_blocks
        for queue in self.watchers:
            queue.put_nowait(event)

    def tokens_of(self, selector):
        match selector.WhichOneof("prefix"):
            case "text":
                return tuple(selector.text.encode())
            case "token_ids":
                return tuple(selector.token_ids.ids)
            case _:
                return tuple("".join(message.content for message in selector.chat.messages).encode())

    async def find(self, selector, context):
        if selector.WhichOneof("prefix") == "prefix_id":
            found = [entry for entry in self.entries if entry.prefix_id.startswith(selector.prefix_id)]
        else:
            tokens = self.tokens_of(selector)
            found = [entry for entry in self.entries if entry.tokens == tokens]
        if not found:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such prefix is cached")
        return found[0]

    async def GetStats(self, request, context):
        self.requests.append(request)
        if self.unavailable_calls:
            self.unavailable_calls -= 1
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the engine starts")
        chosen = [entry for entry in self.entries if request.namespace in ("", entry.namespace)]
        in_use = sum(entry.num_blocks for entry in chosen if entry.in_use)
        cached = sum(entry.num_blocks for entry in chosen) - in_use
        total = pb.CacheStats(
            entries=len(chosen),
            blocks=in_use + cached,
            bytes=(in_use + cached) * BYTES_PER_BLOCK,
            requests=20,
            hits=15,
            misses=5,
            request_hit_rate=0.75,
            token_hit_rate=self.tokens_reused / self.tokens_asked,
            prompt_tokens=self.tokens_asked,
            cached_block_tokens=self.tokens_reused,
            computed_tokens=self.tokens_asked - self.tokens_reused,
            evicted_blocks={"capacity": 7, "admin": 2},
            restored_blocks=30,
            time_saved_s=12.5,
        )
        spaces = dict.fromkeys(entry.namespace for entry in chosen)
        tenants = {entry.namespace: entry.tenant for entry in chosen}
        disk = pb.TierStats(
            tier="disk",
            is_available=True,
            objects=3,
            bytes=3072,
            hits=9,
            misses=1,
            stored=4,
            stored_bytes=4096,
            fetched=1200,
            fetched_bytes=1024,
            quarantined=1,
            failures={"missing": 0, "corrupt": 2},
            codec="zstd",
        )
        redis = pb.TierStats(tier="redis", is_available=False, last_fault="unreachable")
        return pb.GetStatsResponse(
            model="scripted",
            block_size=BLOCK_SIZE,
            bytes_per_block=BYTES_PER_BLOCK,
            num_blocks=NUM_BLOCKS,
            num_blocks_in_use=in_use,
            num_blocks_cached=cached,
            num_blocks_free=NUM_BLOCKS - in_use - cached,
            total=total,
            namespaces=[pb.NamespaceStats(namespace=n, tenant=tenants[n], stats=total) for n in spaces],
            tiers=[disk, redis],
            pins=pb.PinStats(soft_pins=sum(entry.pin == pb.PIN_KIND_SOFT for entry in chosen)),
            prefetch=pb.PrefetchStats(
                waiting=pb.PrefetchCounts(fetched_blocks=40, used_blocks=30, late_blocks=8, wasted_blocks=2),
                restore_s=2.0,
                hidden_s=0.5,
            ),
            uptime_s=3600,
            policy=self.policy,
        )

    async def ListPrefixes(self, request, context):
        self.requests.append(request)
        min_age_s, max_age_s = seconds(request, "min_age"), seconds(request, "max_age")
        found = [
            entry
            for entry in sorted(self.entries, key=lambda entry: -entry.value)
            if request.namespace in ("", entry.namespace)
            and (min_age_s is None or entry.age_s >= min_age_s)
            and (max_age_s is None or entry.age_s <= max_age_s)
            and entry.hits >= request.min_hits
            and (not request.HasField("pinned") or bool(entry.pin) == request.pinned)
            and request.tier in ("", "device", *entry.tiers)
        ]
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        return pb.ListPrefixesResponse(
            prefixes=[entry.info() for entry in found[start:end]],
            next_page_token=str(end) if end < len(found) else "",
            total=len(found),
        )

    async def LookupPrefix(self, request, context):
        self.requests.append(request)
        if request.prefix.WhichOneof("prefix") == "prefix_id":
            tokens = (await self.find(request.prefix, context)).tokens
        else:
            tokens = self.tokens_of(request.prefix)
        best, common = None, 0
        for entry in self.entries:
            same = next(
                (i for i, (a, b) in enumerate(zip(tokens, entry.tokens, strict=False)) if a != b),
                min(len(tokens), len(entry.tokens)),
            )
            if same > common:
                best, common = entry, same
        return pb.LookupPrefixResponse(
            prompt_tokens=len(tokens),
            cached_block_tokens=common - common % BLOCK_SIZE,
            cached_partial_tokens=common % BLOCK_SIZE,
            is_exact=best is not None and best.tokens == tokens,
            tiers=[] if best is None else [pb.TierBlocks(tier=t, blocks=b) for t, b in best.tiers.items()],
            prefix_id="" if best is None else best.prefix_id,
        )

    async def WarmPrefix(self, request, context):
        self.requests.append(request)
        tokens = self.tokens_of(request.prefix)
        try:
            yield pb.WarmPrefixProgress(num_tokens=len(tokens))
            await self.may_warm.wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        entry = self.add(bytes(tokens).decode(), lifetime_s=seconds(request, "lifetime"), pin=request.pin)
        self.tell(pb.CACHE_EVENT_KIND_STORED, entry=entry)
        yield pb.WarmPrefixProgress(
            num_tokens=len(tokens),
            computed_tokens=len(tokens),
            done=True,
            prefix_id=entry.prefix_id,
            elapsed_s=0.5,
        )

    async def PinPrefix(self, request, context):
        self.requests.append(request)
        entry = await self.find(request.prefix, context)
        newly = 0 if entry.pin else entry.num_blocks
        entry.pin, entry.pin_lifetime_s = request.kind, seconds(request, "lifetime")
        self.tell(pb.CACHE_EVENT_KIND_PINNED, entry=entry)
        return pb.PinPrefixResponse(
            prefix_id=entry.prefix_id,
            num_blocks=entry.num_blocks,
            newly_pinned_blocks=newly,
            num_tokens=len(entry.tokens),
        )

    async def UnpinPrefix(self, request, context):
        self.requests.append(request)
        entry = await self.find(request.prefix, context)
        was_pinned, entry.pin = bool(entry.pin), pb.PIN_KIND_UNSPECIFIED
        return pb.UnpinPrefixResponse(was_pinned=was_pinned)

    async def SetLifetime(self, request, context):
        self.requests.append(request)
        entry = await self.find(request.prefix, context)
        entry.lifetime_s = seconds(request, "lifetime")
        return pb.SetLifetimeResponse(prefix_id=entry.prefix_id, num_blocks=entry.num_blocks)

    async def ReleasePrefix(self, request, context):
        self.requests.append(request)
        entry = await self.find(request.prefix, context)
        entry.value = 0.0
        return pb.ReleasePrefixResponse(num_blocks=entry.num_blocks)

    async def EvictPrefixes(self, request, context):
        self.requests.append(request)
        start = (await self.find(request.subtree, context)).tokens if request.HasField("subtree") else ()
        min_idle_s = seconds(request, "min_idle") or 0.0
        doomed = [
            entry
            for entry in self.entries
            if entry.tokens[: len(start)] == start
            and request.namespace in ("", entry.namespace)
            and entry.idle_s >= min_idle_s
        ]
        return pb.EvictPrefixesResponse(**await self._take(doomed, request, context))

    async def ClearCache(self, request, context):
        self.requests.append(request)
        return pb.ClearCacheResponse(**await self._take(list(self.entries), request, context))

    async def _take(self, doomed, request, context):
        held = [entry for entry in doomed if entry.in_use or entry.pin == pb.PIN_KIND_HARD]
        if held and request.in_use != pb.IN_USE_SKIP:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "a running request or a hard pin holds some of it"
            )
        gone = [entry for entry in doomed if entry not in held]
        self.entries = [entry for entry in self.entries if entry not in gone]
        for entry in gone:
            self.tell(pb.CACHE_EVENT_KIND_EVICTED, entry=entry, cause="admin")
        with_tiers = not request.HasField("tiers") or request.tiers
        return {
            "evicted_blocks": sum(entry.num_blocks for entry in gone),
            "kept_blocks": sum(entry.num_blocks for entry in held),
            "evicted_objects": sum(sum(entry.tiers.values()) for entry in gone) if with_tiers else 0,
        }

    async def GetPolicy(self, request, context):
        self.requests.append(request)
        return self._policy()

    async def SetPolicy(self, request, context):
        self.requests.append(request)
        self.policy = request.policy or self.policy
        if request.HasField("trial"):
            self.trial = list(request.trial.names)
        if request.HasField("canary"):
            ended = not request.canary.share
            self.canary = (
                None if ended else pb.CanaryInfo(policy=request.canary.policy, share=request.canary.share)
            )
        return self._policy()

    def _policy(self):
        return pb.GetPolicyResponse(
            policy=self.policy,
            available=[
                pb.PolicyInfo(name="lru", description="least recently used"),
                pb.PolicyInfo(name="best"),
            ],
            trial=[
                pb.TrialResult(policy=name, token_hit_rate=0.5, requests=9, cost_share=0.01)
                for name in self.trial
            ],
            canary=self.canary,
        )

    async def WatchCache(self, request, context):
        self.requests.append(request)
        queue: asyncio.Queue[pb.CacheEvent] = asyncio.Queue()
        self.watchers.append(queue)
        self.watching.set()
        try:
            while True:
                event = await queue.get()
                if (not request.kinds or event.kind in request.kinds) and request.namespace in (
                    "",
                    event.namespace,
                ):
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise
        finally:
            self.watchers.remove(queue)

    async def SaveSnapshot(self, request, context):
        self.requests.append(request)
        if request.name in self.snapshots and not request.replace:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, "a snapshot has this name")
        total = len(self.entries)
        yield pb.SnapshotProgress(total_objects=total)
        self.snapshots[request.name] = [replace(entry) for entry in self.entries]
        yield pb.SnapshotProgress(done_objects=total, total_objects=total, done_bytes=total * 1024, done=True)

    async def RestoreSnapshot(self, request, context):
        self.requests.append(request)
        if request.name not in self.snapshots:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such snapshot")
        self.entries = [replace(entry) for entry in self.snapshots[request.name]]
        yield pb.SnapshotProgress(done_objects=len(self.entries), total_objects=len(self.entries), done=True)

    def _status(self, name):
        return pb.ModelStatus(
            name=name, state=self.models[name], kind="generate", running_requests=self.running
        )

    async def ListModels(self, request, context):
        self.requests.append(request)
        return pb.ListModelsResponse(models=map(self._status, self.models))

    async def LoadModel(self, request, context):
        self.requests.append(request)
        if request.model not in self.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        self.models[request.model] = pb.MODEL_STATE_LOADING
        yield pb.LoadModelProgress(status=self._status(request.model))
        self.models[request.model] = pb.MODEL_STATE_READY
        yield pb.LoadModelProgress(status=self._status(request.model), done=True, elapsed_s=0.25)

    async def UnloadModel(self, request, context):
        self.requests.append(request)
        if self.running and not request.HasField("drain"):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{self.running} requests run")
        self.running = 0
        self.models[request.model] = pb.MODEL_STATE_UNLOADED
        return pb.UnloadModelResponse(status=self._status(request.model))
