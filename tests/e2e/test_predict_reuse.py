"""Reuse under planted drift, and a predict process that is killed or stopped, over a real server."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

import kvserve
from kvserve import AsyncClient, ReuseEventKind
from tests.e2e.predict_server import PredictServer, predict_server, until

PREFIX, NUM_KEYS = 24, 64
FEATURES = {
    "prefix": PREFIX,
    "lifetime_s": 30,
    "max_lifetime_s": 60,
    "sample_share": 1.0,
    "budget": {"max_changed": 0.05},
    # The whole row is the key: what is reused cannot be wrong.
    "canaries": [{"name": "whole-row", "share": 0.5, "prefix": 32}],
}
CATALOGUE = [
    {"name": "drifting", "features": FEATURES},
    {"name": "steady", "features": FEATURES},
    {"name": "risk", "version": "1", "features": {}},
    {"name": "risk", "version": "2", "features": {}},
]
PREDICT = "kvserve.v1.PredictService"
SERVING, NOT_SERVING = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
)
BATCH = np.random.default_rng(61).normal(size=(1024, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PredictServer]:
    catalogue = tmp_path_factory.mktemp("catalogue") / "models.yaml"
    catalogue.write_text(yaml.safe_dump({"models": CATALOGUE}))
    with predict_server("--predict-models", str(catalogue), "--grace", "60s") as running:
        yield running


@pytest.fixture
async def client(running: PredictServer) -> AsyncIterator[AsyncClient]:
    async with running.client() as client:
        yield client


# ---- reuse ----


class Traffic:
    """Batches of rows, one for each key; the features behind the key move as far as ``noise`` says."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._draw = np.random.default_rng(71)
        self._rows = self._draw.normal(size=(NUM_KEYS, 32)).astype(np.float32)

    async def visit(self, model: str, *, times: int, noise: float) -> int:
        """Return how many rows reused an encoding."""
        num_hits = 0
        for _ in range(times):
            rows = self._rows.copy()
            rows[:, PREFIX:] += noise * self._draw.normal(size=(NUM_KEYS, 32 - PREFIX))
            result = await self._client.predict_features(rows, model=model)
            assert set(result.policy.split(",")) == {"main", "whole-row"}
            num_hits += result.num_cache_hits
        return num_hits


async def policies(client: AsyncClient, model: str) -> tuple[kvserve.ReusePolicy, kvserve.ReusePolicy]:
    """Return the main policy and the canary."""
    report = await client.models.reuse(model, max_keys=10)
    assert (report.model, report.version, report.kind) == (model, "1", "features")
    main, canary = report.policies
    assert (main.name, canary.name) == ("main", "whole-row")
    return main, canary


async def test_planted_drift_fires_the_alarm_and_without_it_there_is_silence(
    running: PredictServer, client: AsyncClient
) -> None:
    traffic = Traffic(client)
    events: list[kvserve.ReuseEvent] = []

    async def follow() -> None:
        async with client.models.watch_reuse() as watch:
            async for event in watch:
                events.append(event)  # noqa: PERF401  # to be seen while it goes on

    def alarms(model: str) -> list[kvserve.ReuseEvent]:
        return [e for e in events if e.model == model and e.kind is ReuseEventKind.ALARM and not e.key]

    following = asyncio.create_task(follow())
    await until(lambda: events)
    assert events[0].kind is ReuseEventKind.STARTED

    for model in ("drifting", "steady"):
        assert await traffic.visit(model, times=20, noise=1e-4) > 0
        for policy in await policies(client, model):
            assert (policy.num_alarms, policy.risk.over_budget) == (0, False)
        main, _ = await policies(client, model)
        assert main.risk.num_compared > 300
        assert main.risk.changed.estimate == 0

    await traffic.visit("drifting", times=10, noise=1.0)
    await traffic.visit("steady", times=10, noise=1e-4)
    await until(lambda: alarms("drifting"))
    alarm = alarms("drifting")[0]
    assert (alarm.version, alarm.policy, alarm.measure, alarm.limit) == ("1", "main", "changed", 0.05)
    assert alarm.interval is not None
    assert alarm.interval.lower > 0.05
    running.process.wait_for(r"warning reuse alarm: drifting/1 main: changed")
    await until(lambda: running.metric("reuse_alarms_total", model="drifting", policy="main") >= 1)

    # The same number of rows without drift, and the policy that cannot be wrong, tell nothing.
    assert alarms("steady") == []
    assert {alarm.policy for alarm in alarms("drifting")} == {"main"}
    assert "reuse alarm: steady" not in running.process.text
    for labels in ({"model": "steady"}, {"model": "drifting", "policy": "whole-row"}):
        assert running.metric("reuse_alarms_total", **labels) == 0
        assert running.metric("reuse_over_budget", **labels) == 0
    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following


async def test_canary_policy_stands_beside_the_main_one(client: AsyncClient) -> None:
    traffic = Traffic(client)
    await traffic.visit("steady", times=4, noise=0.0)
    await traffic.visit("steady", times=4, noise=1e-4)
    main, canary = await policies(client, "steady")
    assert (main.num_key_features, canary.num_key_features) == (PREFIX, 32)
    assert (main.traffic_share, canary.traffic_share) == (0.5, 0.5)
    for policy in (main, canary):
        missed = policy.num_absent + policy.num_expired + policy.num_stopped + policy.num_uncertified
        assert policy.num_lookups == policy.num_hits + missed > 0
        assert policy.num_entries > 0
        assert policy.risk.changed.estimate == 0
    # What differs behind the key is another key for the canary alone: it reuses less and risks nothing.
    assert main.hit_rate is not None
    assert canary.hit_rate is not None
    assert main.hit_rate > canary.hit_rate > 0
    assert canary.risk.l2.estimate == 0 < main.risk.l2.estimate
    assert await client.models.clear_reuse("steady") == main.num_entries + canary.num_entries
    assert [policy.num_entries for policy in await policies(client, "steady")] == [0, 0]


# ---- faults ----


class Caller:
    """Asks without end for rows that take their time; notes when and how it ended."""

    def __init__(self, client: AsyncClient, model: str) -> None:
        self._client = client
        self._model = model
        self.num_answered = 0
        self.error: kvserve.Error | None = None
        self.ended_s = 0.0

    async def run(self, wanted: Any) -> None:
        while True:
            try:
                result = await self._client.predict_features(BATCH, model=self._model, reuse=False)
            except kvserve.Error as error:
                self.error, self.ended_s = error, time.monotonic()
                return
            assert [each.prediction for each in result] == wanted
            self.num_answered += 1


def watch_health(channel: grpc.Channel, service: str) -> Any:
    return health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service=service), timeout=100
    )


async def test_killed_predict_process_fails_its_calls_at_once_and_comes_back(
    running: PredictServer, client: AsyncClient
) -> None:
    prompt: Any = {"max_new_tokens": 600, "ignore_eos": True}
    alone = await client.generate_once("The function returns", **prompt)
    wanted = [
        each.prediction
        for each in await client.predict_features(BATCH, model="risk", version="1", reuse=False)
    ]
    await client.models.set_alias("risk", "canary", "1", traffic_share=0.25)
    await client.models.set_alias("risk", "stable", "1")
    num_restarts = running.metric("restarts_total")
    killed = running.process.predict()
    with running.process.channel() as channel:
        predict_health, overall = watch_health(channel, PREDICT), watch_health(channel, "")
        assert next(predict_health).status == next(overall).status == SERVING
        callers = [Caller(client, "risk") for _ in range(8)]
        calls = [asyncio.create_task(caller.run(wanted)) for caller in callers]
        generating = asyncio.create_task(client.generate_once("The function returns", **prompt))
        await until(lambda: min(caller.num_answered for caller in callers) >= 2)
        killed_s = time.monotonic()
        os.kill(killed.pid, signal.SIGKILL)
        await asyncio.gather(*calls)
        for caller in callers:
            assert isinstance(caller.error, kvserve.Unavailable), caller.error
            assert caller.error.reason == "PREDICT_LOST"
            assert caller.ended_s - killed_s < 4.0  # by its silence it would be noticed after five seconds
        assert any(c.error is not None and "lost" in c.error.message for c in callers), "none was running"
        assert (await asyncio.to_thread(next, predict_health)).status == NOT_SERVING
        # Generation does not notice.
        assert (await generating).samples[0].token_ids == alone.samples[0].token_ids
        assert (await asyncio.to_thread(next, predict_health)).status == SERVING
        overall.cancel()
        assert list(_until_cancelled(overall)) == []
    assert not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE
    assert running.process.predict().pid != killed.pid
    await until(lambda: running.metric("restarts_total") == num_restarts + 1)
    first, second = [model for model in await client.models.list() if model.name == "risk"]
    assert (first.aliases, first.traffic_share) == (("canary", "stable"), 0.25)
    assert (second.aliases, second.traffic_share) == (("latest",), 0.75)
    again = await client.predict_features(BATCH, model="risk", version="stable", reuse=False)
    assert again.version == "1"
    assert [each.prediction for each in again] == wanted


def _until_cancelled(stream: Any) -> Iterator[Any]:
    try:
        yield from stream
    except grpc.RpcError:
        assert stream.cancelled()


async def test_stopped_server_answers_what_it_has_begun(running: PredictServer, client: AsyncClient) -> None:
    """The last test of this file: it ends the server."""
    large = np.concatenate([BATCH, -BATCH, 2 * BATCH, -2 * BATCH])
    wanted = [each.prediction for each in await client.predict_features(large, model="risk", reuse=False)]
    predict = running.process.predict()
    calls = [
        asyncio.create_task(client.predict_features(large, model="risk", reuse=False)) for _ in range(16)
    ]

    async def are_all_begun() -> bool:
        listed = await client.models.list()
        num_running = sum(model.running_requests for model in listed if model.name == "risk")
        return num_running > 0 and num_running + sum(call.done() for call in calls) >= len(calls)

    with running.process.channel() as channel:
        health = watch_health(channel, PREDICT)
        assert next(health).status == SERVING
        await until(are_all_begun)
        running.process.signal(signal.SIGTERM)
        running.process.wait_for(r"^stopping: [1-9]\d* calls have 60 s to finish")
        with pytest.raises(kvserve.Unavailable) as refused:
            await client.predict_features(BATCH, model="risk", reuse=False)
        assert refused.value.reason in ("DRAINING", "")  # none: it has stopped to listen
        for result in await asyncio.gather(*calls):
            assert [each.prediction for each in result] == wanted
        assert [answer.status for answer in _until_ended(health)][:1] == [NOT_SERVING]
    assert await asyncio.to_thread(running.process.wait) == 0
    assert running.process.lines[-1] == "stopped"
    assert not predict.is_running() or predict.status() == psutil.STATUS_ZOMBIE
    assert "Traceback" not in running.process.text
    assert "reuse alarm: steady" not in running.process.text


def _until_ended(stream: Any) -> Iterator[Any]:
    """Yield until the server that is being stopped ends the stream."""
    try:
        yield from stream
    except grpc.RpcError:
        return
