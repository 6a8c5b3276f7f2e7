"""``client.models``: from arguments to requests, and from messages to values."""

import pickle
from typing import Any

import pytest

import kvserve
from kvserve import ReuseEventKind
from kvserve._cli.output import plain
from kvserve.testing import MockTransport
from kvserve.v1 import cache_admin_pb2 as pb
from kvserve.v1 import predict_pb2

INTERVAL = {"lower": 0.01, "estimate": 0.02, "upper": 0.04, "weight": 99.0}
RISK = {
    "changed": INTERVAL,
    "cosine_distance": {**INTERVAL, "estimate": 0.03},
    "l2": {},
    "num_compared": 99,
    "over_budget": True,
}
ANSWERS: dict[str, Any] = {
    "ListModels": pb.ListModelsResponse(
        models=[
            {"name": "tiny", "state": pb.MODEL_STATE_READY, "kind": "generate", "kv_bytes": 5},
            {
                "name": "news",
                "state": pb.MODEL_STATE_UNLOADED,
                "kind": "predict",
                "version": "2",
                "task": "classify",
                "aliases": ["latest", "canary"],
                "traffic_share": 0.25,
                "source_kind": "hub",
                "idle_s": 0.0,
            },
            {"name": "odd", "task": "juggle"},
        ],
        predict_bytes=100,
    ),
    "LoadModel": [
        pb.LoadModelProgress(phase="reading", done_bytes=5, total_bytes=10),
        pb.LoadModelProgress(status={"name": "news", "version": "3"}, done=True, elapsed_s=0.5),
    ],
    "UnloadModel": pb.UnloadModelResponse(status={"name": "news"}),
    "SetModelAlias": pb.SetModelAliasResponse(versions=[{"name": "news", "version": "1"}]),
    "GetReuse": pb.GetReuseResponse(
        model="risk",
        version="1",
        kind="features",
        policies=[
            {
                "name": "main",
                "num_lookups": 8,
                "num_hits": 6,
                "lifetime_s": 60,
                "max_changed": 0.5,
                "risk": RISK,
                "keys": [{"key": "0a", "risk": RISK, "lifetime_s": 1.5, "stopped": True, "num_hits": 3}],
            },
            {"name": "canary"},
        ],
    ),
    "WatchReuse": [
        pb.ReuseEvent(kind=pb.ReuseEvent.STARTED),
        pb.ReuseEvent(
            kind=pb.ReuseEvent.ALARM, model="risk", key="0a", measure="l2", interval=INTERVAL, limit=0.01
        ),
        pb.ReuseEvent(kind=pb.ReuseEvent.LOST, num_lost=4),
        pb.ReuseEvent(kind=99),  # type: ignore[arg-type]
    ],
    "ClearReuse": pb.ClearReuseResponse(num_entries=42),
}


@pytest.fixture
def transport():
    return MockTransport(lambda method, request: ANSWERS[method])


@pytest.fixture
def models(transport):
    with kvserve.Client(transport=transport) as client:
        yield client.models


def test_every_argument_has_its_place(models, transport):
    models.load("news").wait()
    models.load("news", version="3", source="hf:a/b@c", task="embed", pooling="cls").wait()
    models.unload("news", drain_s=1.5, version="2")
    models.unload("tiny")
    models.set_alias("news", "canary", "2", traffic_share=0.1)
    models.set_alias("news", "canary", None)
    models.reuse("risk", version="1", max_keys=5)
    models.clear_reuse("risk", version="1")
    assert transport.requests == [
        pb.LoadModelRequest(model="news"),
        pb.LoadModelRequest(model="news", version="3", source="hf:a/b@c", task="embed", pooling="cls"),
        pb.UnloadModelRequest(model="news", version="2", drain={"seconds": 1, "nanos": 500_000_000}),
        pb.UnloadModelRequest(model="tiny"),
        pb.SetModelAliasRequest(model="news", alias="canary", version="2", traffic_share=0.1),
        pb.SetModelAliasRequest(model="news", alias="canary"),
        pb.GetReuseRequest(model="risk", version="1", max_keys=5),
        pb.ClearReuseRequest(model="risk", version="1"),
    ]


def test_watches_have_no_deadline_unless_one_is_given(transport):
    timeouts = []

    class Timed(MockTransport):
        def stream(self, call):
            timeouts.append((call.request.model, call.timeout_s))
            return super().stream(call)

    with kvserve.Client(transport=Timed(lambda method, request: ANSWERS[method])) as client:
        for arguments, options in ((("risk",), {}), ((), {"timeout_s": 5.0})):
            with client.models.watch_reuse(*arguments, **options) as events:
                list(events)
    assert timeouts == [("risk", None), ("", 5.0)]


def test_what_makes_no_sense_is_refused_here(models, transport):
    for call, error, text in (
        (lambda: models.load(""), ValueError, "model's name"),
        (lambda: models.load("m", task="embed"), TypeError, "task needs source"),
        (lambda: models.load("m", sorce="x"), TypeError, "did you mean 'source'"),
        (lambda: models.unload("m", drain_s=-1), ValueError, "drain_s"),
        (lambda: models.set_alias("m", "", "1"), ValueError, "alias"),
        (lambda: models.set_alias("m", "canary", "1", traffic_share=1.5), ValueError, "traffic_share"),
        (lambda: models.reuse(""), ValueError, "model's name"),
        (lambda: models.reuse("m", max_keys=2**40), kvserve.InvalidArgument, "max_keys"),
    ):
        with pytest.raises(error, match=text):
            call()
    assert transport.requests == []


def test_models_of_both_kinds_are_listed_as_a_tuple_that_knows_the_memory(models):
    listed = models.list()
    tiny, news, odd = listed
    assert listed == (tiny, news, odd)
    assert (tiny.kind, tiny.version, tiny.task, tiny.aliases, tiny.idle_s) == ("generate", "", None, (), None)
    assert (news.state, news.task) == (kvserve.ModelState.UNLOADED, kvserve.PredictTask.CLASSIFY)
    assert (news.version, news.aliases, news.traffic_share, news.idle_s) == (
        "2",
        ("latest", "canary"),
        0.25,
        0.0,
    )
    assert odd.task is kvserve.PredictTask.OTHER
    assert (listed.predict_bytes, listed.predict_memory) == (100, None)
    copy = pickle.loads(pickle.dumps(listed))
    assert (copy, copy.predict_bytes) == (listed, 100)
    assert [model["name"] for model in plain(listed)] == ["tiny", "news", "odd"]


def test_a_load_tells_how_far_it_is(models):
    with models.load("news") as steps:
        first, last = list(steps)
    assert (first.phase, first.done_bytes, first.total_bytes, first.done) == ("reading", 5, 10, False)
    assert (last.status.version, last.elapsed_s, steps.result) == ("3", 0.5, last)


def test_a_report_has_the_risk_of_each_policy_and_no_limit_is_none(models):
    report = models.reuse("risk")
    main, canary = report.policies
    assert (report.model, report.kind, main.hit_rate, canary.hit_rate) == ("risk", "features", 0.75, None)
    assert main.risk.changed == kvserve.RiskInterval(**INTERVAL)
    assert main.risk.cosine_distance.estimate == 0.03
    assert main.risk.l2.weight == 0
    assert (main.risk.over_budget, main.risk.proven_safe, main.risk.num_compared) == (True, False, 99)
    assert (main.lifetime_s, main.max_changed, main.max_l2, main.max_error) == (60, 0.5, None, None)
    assert main.keys == (
        kvserve.ReuseKey(key="0a", risk=main.risk, lifetime_s=1.5, stopped=True, num_hits=3),
    )


def test_events_of_reuse(models):
    with models.watch_reuse() as events:
        started, alarm, lost, odd = list(events)
    assert (started.kind, started.interval) == (ReuseEventKind.STARTED, None)
    assert (alarm.kind, alarm.measure, alarm.limit, alarm.key) == (ReuseEventKind.ALARM, "l2", 0.01, "0a")
    assert alarm.interval.upper == 0.04
    assert (lost.num_lost, events.num_lost) == (4, 4)
    assert odd.kind is ReuseEventKind.OTHER
    assert repr(events) == "<ReuseWatch: 4 lost>"


def test_aliases_and_clearing(models):
    assert [model.version for model in models.set_alias("news", "canary", "1")] == ["1"]
    assert models.clear_reuse("risk") == 42


def test_names_are_those_of_the_contract():
    for ours, theirs, prefix in (
        (kvserve.ReuseEventKind, pb.ReuseEvent.Kind, ""),
        (kvserve.PredictTask, predict_pb2.PredictTask, "PREDICT_TASK_"),
    ):
        known = {prefix + each.name for each in ours} - {f"{prefix}OTHER"}
        assert known == {name for name, number in theirs.items() if number}
    for value_type, message in (
        (kvserve.ReusePolicy, pb.ReusePolicy),
        (kvserve.ReuseEvent, pb.ReuseEvent),
        (kvserve.ReuseRisk, pb.ReuseRisk),
        (kvserve.ModelStatus, pb.ModelStatus),
        (kvserve.LoadProgress, pb.LoadModelProgress),
        (kvserve.PredictModelInfo, predict_pb2.PredictModel),
        (kvserve.PredictTimings, predict_pb2.PredictTimings),
    ):
        assert set(value_type.__dataclass_fields__) == set(message.DESCRIPTOR.fields_by_name)
