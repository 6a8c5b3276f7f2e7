"""``client.models`` against the real front end: predict models beside the generating one."""

import asyncio

import pytest
import pytest_asyncio

import kvserve
from kvserve import ModelState, ReuseEventKind
from server.predict.errors import ModelInUseError
from server.predict.messages import EventKind, IntervalReport, OpProgress, ReuseEvent
from tests.rpc.harness import ScriptedEngine, serving
from tests.rpc.scripted_predict import REFUSED, SIZES, ScriptedPredict, status

NOTICED_S = 60.0


@pytest.fixture
def backend():
    return ScriptedPredict()


@pytest_asyncio.fixture
async def client(backend):
    async with (
        serving(ScriptedEngine(), predict=backend) as server,
        kvserve.AsyncClient(f"127.0.0.1:{server.port}", timeout_s=20, retry=None) as running,
    ):
        yield running


async def test_all_models_are_listed_with_what_they_take(client):
    listed = await client.models.list()
    assert (listed[0].name, listed[0].kind) == ("tiny", "generate")
    by_name = {model.name: model for model in listed}
    assert (by_name["sizes"].kind, by_name["sizes"].task) == ("predict", kvserve.PredictTask.CLASSIFY)
    assert (by_name["sizes"].version, by_name["sizes"].num_bytes, by_name["sizes"].idle_s) == (
        "1",
        1000,
        None,
    )
    assert by_name["risk"].source_kind == "features"
    assert (listed.predict_bytes, listed.predict_memory) == (1000, 5000)


async def test_a_load_is_followed_phase_by_phase(client, backend):
    loading = status("news", None, version="2")
    ready = status("news", SIZES, version="2", load_s=0.5)
    backend.progress = [
        OpProgress(1, loading, "reading", 10, 40),
        OpProgress(1, loading, "building", 0, 0),
        ready,
    ]
    async with client.models.load("news", source="hf:a/b@" + "0" * 40, task="classify") as steps:
        got = [(step.phase, step.done_bytes, step.total_bytes, step.done) async for step in steps]
    assert got == [("reading", 10, 40, False), ("building", 0, 0, False), ("", 0, 0, True)]
    assert (steps.result.status.state, steps.result.status.version) == (ModelState.READY, "2")
    assert (backend.ops[0].source, backend.ops[0].task) == ("hf:a/b@" + "0" * 40, "classify")
    assert (await client.models.load("news")).done


async def test_a_load_that_is_refused_says_why(client, backend):
    backend.progress = [REFUSED]
    with pytest.raises(kvserve.FailedPrecondition, match="not safetensors") as caught:
        await client.models.load("sizes")
    assert caught.value.reason == "MODEL_REFUSED"
    with pytest.raises(kvserve.InvalidArgument) as wrong:
        await client.models.load("news", source="/etc/passwd")
    assert [violation.field for violation in wrong.value.violations] == ["source"]


async def test_versions_are_unloaded_and_named(client, backend):
    backend.catalogue.append(status("sizes", SIZES, version="2"))
    assert (await client.models.unload("sizes", version="2", drain_s=1)).state is ModelState.UNLOADED
    assert (backend.ops[0].version, backend.ops[0].drain_s) == ("2", 1.0)
    versions = await client.models.set_alias("sizes", "canary", "2", traffic_share=0.25)
    assert [(model.version, model.aliases) for model in versions] == [("1", ()), ("2", ("canary",))]
    assert versions[1].traffic_share == 0.25
    assert (await client.predict("x", model="sizes", version="canary")).version == "2"
    with pytest.raises(kvserve.InvalidArgument, match="traffic_share: is not for latest"):
        await client.models.set_alias("sizes", "latest", "2", traffic_share=0.25)
    with pytest.raises(kvserve.NotFound):
        await client.models.set_alias("sizes", "canary", "9")
    backend.fails = ModelInUseError("requests run on it")
    with pytest.raises(kvserve.FailedPrecondition, match="requests run") as caught:
        await client.models.unload("sizes")
    assert caught.value.reason == "MODEL_BUSY"


async def test_reuse_is_reported_and_cleared(client, backend):
    report = await client.models.reuse("risk", max_keys=3)
    [policy] = report.policies
    assert (policy.name, policy.num_key_features, policy.lifetime_s, policy.max_error) == (
        "main",
        24,
        60.0,
        0.04,
    )
    assert policy.risk.l2 == kvserve.RiskInterval(lower=0.4, estimate=0.5, upper=0.6, weight=102.0)
    assert (policy.keys[0].key, policy.keys[0].stopped) == ("0a1b", True)
    assert backend.ops[0].max_keys == 3
    assert await client.models.clear_reuse("risk") == 42
    with pytest.raises(kvserve.InvalidArgument, match="reuses nothing"):
        await client.models.reuse("sizes")


async def test_reuse_is_watched_until_the_block_is_left(client, backend):
    async with client.models.watch_reuse("risk") as events:
        read = aiter(events)
        assert (await anext(read)).kind is ReuseEventKind.STARTED
        backend.events.put_nowait(
            ReuseEvent(
                kind=EventKind.ALARM,
                model="risk",
                version="1",
                policy="main",
                measure="changed",
                interval=IntervalReport(0.1, 0.2, 0.3, 50.0),
                limit=0.05,
            )
        )
        alarm = await asyncio.wait_for(anext(read), NOTICED_S)
        assert (alarm.kind, alarm.policy, alarm.interval.estimate) == (ReuseEventKind.ALARM, "main", 0.2)
        assert backend.num_watchers == 1
    async with asyncio.timeout(NOTICED_S):
        while backend.num_watchers:
            await asyncio.sleep(0)


async def test_a_watch_says_that_the_process_went(client, backend):
    async with client.models.watch_reuse() as events:
        read = aiter(events)
        await anext(read)
        backend.events.put_nowait(None)
        with pytest.raises(kvserve.Unavailable):
            await anext(read)


async def test_the_blocking_client_does_the_same(backend):
    backend.progress = [status("sizes", SIZES)]

    def story(target):
        with kvserve.Client(target, timeout_s=20) as client:
            listed = client.models.list()
            loaded = client.models.load("sizes").wait()
            report = client.models.reuse("risk")
            cleared = client.models.clear_reuse("risk")
            with client.models.watch_reuse() as events:
                event = next(iter(events))
            return listed, loaded, report, cleared, event

    async with serving(ScriptedEngine(), predict=backend) as server:
        answers = await asyncio.to_thread(story, f"127.0.0.1:{server.port}")
    listed, loaded, report, cleared, event = answers
    assert (len(listed), loaded.status.state, report.model) == (7, ModelState.READY, "risk")
    assert (cleared, event.kind) == (42, ReuseEventKind.STARTED)
