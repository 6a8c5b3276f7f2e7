"""``kvctl predict``, ``embed`` and ``models``: input as people have it, output as they read it."""

import importlib
import io
import json

import pytest

import kvserve
from kvserve._cli.feature_input import read_features
from kvserve.testing import MockTransport, classified, embedded
from kvserve.v1 import cache_admin_pb2 as admin
from kvserve.v1 import predict_pb2 as pb
from tests.unit.test_client_kvctl import Terminal

command = importlib.import_module("kvserve._cli.main")  # By its dotted name it is the function in it.
SIZES = {True: "long", False: "short"}


def predicting(*predictions, **fields):
    return pb.PredictResponse(model="m", version="1", predictions=predictions, **fields)


class Kvctl:
    """Runs the command in this process against a scripted server; keeps what was asked."""

    def __init__(self, monkeypatch, capsys):
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self.answers = {}
        self.transport = MockTransport(self._answer)

    def _answer(self, method, request):
        answer = self.answers[method]
        return answer(request) if callable(answer) else answer

    def __call__(self, *arguments, typed=""):
        """Return exit code, standard output, standard error."""
        self._monkeypatch.setattr(
            command, "_connect", lambda parsed: kvserve.Client(transport=self.transport)
        )
        self._monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        try:
            code = command.main(arguments)
        except SystemExit as usage:
            code = usage.code
        return (code, *self._capsys.readouterr())


@pytest.fixture
def kvctl(monkeypatch, capsys):
    return Kvctl(monkeypatch, capsys)


def by_length(request):
    return classified(*(SIZES[len(item.text) > 5] for item in request.texts.items), score=0.75)


def test_texts_are_arguments_or_lines(kvctl):
    kvctl.answers["Predict"] = by_length
    expected = "LABEL   SCORE  TEXT\nshort  0.7500  a\nlong   0.7500  a longer one\n"
    assert kvctl("predict", "m", "a", "a longer one") == (0, expected, "")
    assert kvctl("predict", "m", typed="a\n\na longer one\r\n") == (0, expected, "")
    assert kvctl.transport.requests[0] == kvctl.transport.requests[1]
    assert not kvctl.transport.requests[0].HasField("options")
    code, out, err = kvctl("predict", "m")
    assert (code, out) == (2, "")
    assert err == "kvctl: no text: give some as arguments, or as lines of standard input\n"


def test_options_reach_the_request(kvctl):
    kvctl.answers["Predict"] = by_length
    assert (
        kvctl("predict", "m", "a", "--version", "canary", "--top-k", "0", "--truncate", "--no-reuse")[0] == 0
    )
    [request] = kvctl.transport.requests
    assert request.version == "canary"
    assert request.options == pb.PredictOptions(truncate=True, top_k=0, reuse=False)


def test_options_may_stand_between_model_and_texts(kvctl):
    kvctl.answers["Predict"] = by_length
    for arguments in (
        ("predict", "m", "--top-k", "2", "a", "b"),
        ("predict", "--top-k", "2", "m", "a", "b"),
        ("predict", "m", "a", "--top-k", "2", "b", "--timeout", "5s"),
    ):
        assert kvctl(*arguments)[0] == 0
    assert len({request.SerializeToString() for request in kvctl.transport.requests}) == 1
    assert [item.text for item in kvctl.transport.requests[0].texts.items] == ["a", "b"]
    assert kvctl("predict", "m", "--", "--dashed")[0] == 0
    assert kvctl.transport.requests[-1].texts.items[0].text == "--dashed"
    code, _, err = kvctl("predict", "m", "a", "--top", "2")
    assert (code, "unrecognized arguments: --top" in err) == (2, True)
    assert kvctl("predict")[0] == 2


def test_pairs_are_two_arguments_or_a_line_with_a_tab(kvctl):
    kvctl.answers["Predict"] = lambda request: predicting({"regression": {"values": [4.25, 0.5]}})
    expected = "VALUES    TEXT\n4.25 0.5  one | other\n"
    assert kvctl("predict", "m", "--pair", "one", "other") == (0, expected, "")
    assert kvctl("predict", "m", "--pair", typed="one\tother\n") == (0, expected, "")
    assert kvctl.transport.requests[0].texts == pb.TextInputs(items=[{"text": "one", "pair": "other"}])
    assert (
        kvctl("predict", "m", "--pair", "a", "b", "c")[2] == "kvctl: --pair takes texts two by two; 3 given\n"
    )
    assert kvctl("predict", "m", "--pair", typed="a\tb\nno tab")[0::2] == (
        2,
        "kvctl: line 2: has no tab between the two texts of a pair\n",
    )


def test_several_labels_each_have_a_line_and_a_multi_label_model_says_which_hold(kvctl):
    scores = [{"label": "b", "score": 0.5}, {"label": "a", "score": 0.25}]
    kvctl.answers["Predict"] = predicting({"classification": {"label": "b", "score": 0.5, "scores": scores}})
    assert kvctl("predict", "m", "x")[1] == "LABEL   SCORE  TEXT\nb      0.5000  x\na      0.2500\n"
    kvctl.answers["Predict"] = predicting(
        {"classification": {"label": "b", "score": 0.9, "labels": ["b", "c"]}}
    )
    assert kvctl("predict", "m", "x")[1] == "LABEL   SCORE  TEXT\nb, c   0.9000  x\n"


def test_tokens_are_shown_as_they_stand_in_text_and_pair(kvctl):
    tokens = [
        {"label": "NAME", "score": 0.5, "start": 0, "end": 3},
        {"label": "CITY", "score": 0.75, "start": 1, "end": 3, "part": 1},
    ]
    kvctl.answers["Predict"] = predicting({"tokens": {"tokens": tokens}})
    out = kvctl("predict", "m", "--pair", "Ann is", " Ulm")[1]
    assert [line.split() for line in out.splitlines()] == [
        ["TOKEN", "LABEL", "SCORE", "TEXT"],
        ["Ann", "NAME", "0.5000", "Ann", "is", "|", "Ulm"],
        ["Ul", "CITY", "0.7500"],
    ]


def test_json_is_one_document_or_a_line_for_each_input(kvctl):
    kvctl.answers["Predict"] = by_length
    code, out, _ = kvctl("predict", "m", "a", "a longer one", "--json")
    whole = json.loads(out)
    assert (code, whole["model"], [each["label"] for each in whole["predictions"]]) == (
        0,
        "mock",
        ["short", "long"],
    )
    lines = [
        json.loads(line) for line in kvctl("predict", "m", "a", "a longer one", "--jsonl")[1].splitlines()
    ]
    assert [(line["input"], line["label"], line["score"]) for line in lines] == [
        ("a", "short", 0.75),
        ("a longer one", "long", 0.75),
    ]
    [line] = kvctl("predict", "m", "--pair", "a", "b", "--jsonl")[1].splitlines()
    assert json.loads(line)["input"] == ["a", "b"]


def test_statistics_go_to_standard_error(kvctl):
    timings = {"load_s": 1.5, "queue_s": 0.001, "compute_s": 0.0045, "total_s": 0.0071, "batch_size": 8}
    answer = predicting({"regression": {"values": [1]}, "num_tokens": 5, "truncated": True}, timings=timings)
    kvctl.answers["Predict"] = answer
    assert kvctl("predict", "m", "x", "--stats")[2] == (
        "[m 1 | 1 inputs, 5 tokens, 1 truncated, 0 reused | batch of 8"
        " | load 1.5s, queue 1.0 ms, compute 4.5 ms, total 7.1 ms]\n"
    )


def test_features_come_from_the_command_line_from_files_and_from_standard_input(kvctl, tmp_path):
    def handler(request):
        return predicting(
            *({"features": {"prediction": 0.5}, "cache_hit": True} for _ in request.features.rows)
        )

    kvctl.answers["Predict"] = handler
    code, out, _ = kvctl("predict", "m", "--features", "0.5,-1e0, 2")
    assert (code, out) == (0, "PREDICTION  REUSED  INPUT\n  0.500000  yes     row 1\n")
    table = tmp_path / "rows.csv"
    table.write_text("age,income\n0.5,1\n\n2,3\n")
    assert kvctl("predict", "m", "--features", str(table), "--features", "7,8")[0] == 0
    assert kvctl("predict", "m", "--features", "-", typed='[1, 2]\n{"features": [[3, 4], [5, 6]]}\n')[0] == 0
    assert [[list(row.values) for row in request.features.rows] for request in kvctl.transport.requests] == [
        [[0.5, -1.0, 2.0]],
        [[0.5, 1.0], [2.0, 3.0], [7.0, 8.0]],
        [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
    ]
    assert kvctl("predict", "m", "x", "--features", "1")[0::2] == (
        2,
        "kvctl: give texts or --features, not both\n",
    )
    code, out, err = kvctl("predict", "m", "--features", "no-such-file.csv")
    assert (code, out) == (2, "")
    assert "no-such-file.csv" in err


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("1,2\n3,x\n", "features, line 2: 'x' is no number"),
        ('{"rows": [1]}', "features, line 1: an object needs features"),
        ('{"features": 5}', "features, line 1: expected a list of numbers"),
        ("[1, true]", "features, line 1: True is no number"),
        ("[[1], 2]", "features, line 1: expected a list of numbers"),
        ("[1, 2", "features, line 1: "),
        ("[]", "features, line 1: no numbers"),
        ("a,b\n", "features: no row in there"),
        ("1,,2\n", "features, line 1: '' is no number"),
    ],
)
def test_what_is_no_row_names_its_line(monkeypatch, text, error):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(ValueError) as caught:
        read_features("-")
    assert str(caught.value).startswith(error)


def test_vectors_are_shown_short_and_written_whole(kvctl):
    kvctl.answers["Embed"] = lambda request: embedded(*([0.6, 0.0, 0.8, 0, 0, 0, 0] for _ in request.inputs))
    code, out, err = kvctl("embed", "minilm", "a", "b", "--stats")
    assert (code, out.splitlines()[1]) == (
        0,
        "         7  1.0000  0.6000 0.0000 0.8000 0.0000 0.0000 0.0000 ...  a",
    )
    assert "2 inputs, 16 tokens, 0 truncated" in err
    first, second = kvctl("embed", "minilm", "a", "b", "--jsonl")[1].splitlines()
    assert json.loads(first) == {"input": "a", "vector": pytest.approx([0.6, 0, 0.8, 0, 0, 0, 0])}
    assert json.loads(second)["input"] == "b"
    assert kvctl("embed", "minilm", typed="a\nb\n")[1].count("\n") == 3
    assert len(json.loads(kvctl("embed", "minilm", "a", "--json")[1])["vectors"][0]) == 7


def test_errors_name_the_field_on_one_line(kvctl):
    def refuse(request):
        raise kvserve.InvalidArgument(
            "texts.items[0].text: has more than 512 tokens",
            violations=[kvserve.FieldViolation("texts.items[0].text", "has more than 512 tokens")],
        )

    kvctl.answers["Predict"] = refuse
    assert kvctl("predict", "m", "x") == (2, "", "kvctl: texts.items[0].text: has more than 512 tokens\n")


LISTED = admin.ListModelsResponse(
    models=[
        {"name": "tiny", "state": admin.MODEL_STATE_READY, "kind": "generate", "kv_bytes": 2**20},
        {
            "name": "news",
            "state": admin.MODEL_STATE_READY,
            "kind": "predict",
            "version": "2",
            "task": "classify",
            "num_bytes": 2**21,
            "aliases": ["canary", "latest"],
            "traffic_share": 0.1,
            "source_kind": "hub",
            "num_requests": 1200,
            "idle_s": 90,
        },
    ],
    predict_bytes=2**21,
    predict_memory=2**30,
)


def test_models_are_listed_without_a_verb_too(kvctl):
    kvctl.answers["ListModels"] = LISTED
    code, out, err = kvctl("models")
    assert (code, err) == (0, "[predict models take 2.0 MiB of 1.0 GiB]\n")
    header, tiny, news = (line.split() for line in out.splitlines())
    assert header[:7] == ["NAME", "STATE", "KIND", "VERSION", "TASK", "PARAMETERS", "BYTES"]
    assert header[7:] == ["SHARE", "RUNNING", "REQUESTS", "IDLE", "ALIASES", "SOURCE", "FAULT"]
    assert " ".join(tiny) == "tiny ready generate - - - 1.0 MiB - 0 - - - -"
    assert " ".join(news) == "news ready predict 2 classify - 2.0 MiB 10.0% 0 1,200 1m30s canary, latest hub"
    assert kvctl("models", "list") == (code, out, err)
    for arguments in (("models", "--json"), ("models", "list", "--json"), ("models", "--json", "list")):
        document = json.loads(kvctl(*arguments)[1])
        assert [model["name"] for model in document["models"]] == ["tiny", "news"]
        assert (document["predict_bytes"], document["predict_memory"]) == (2**21, 2**30)


def loading(*steps):
    news = {"name": "news", "version": "2", "state": admin.MODEL_STATE_LOADING}
    ready = {**news, "state": admin.MODEL_STATE_READY}
    return [
        *(admin.LoadModelProgress(status=news, elapsed_s=0.5, **step) for step in steps),
        admin.LoadModelProgress(status=ready, elapsed_s=1.5, done=True),
    ]


def test_a_load_has_a_bar_on_a_terminal(kvctl, monkeypatch):
    kvctl.answers["LoadModel"] = loading(
        {"phase": "fetching", "done_bytes": 2048},
        {"phase": "reading", "done_bytes": 25 * 2**20, "total_bytes": 100 * 2**20},
        {"phase": "building"},
    )
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    code, out, _ = kvctl("models", "load", "news", "--source", "news", "--task", "embed", "--pooling", "cls")
    assert (code, out) == (0, "news 2 is ready after 1.5s\n")
    assert shown.getvalue().split("\r\x1b[K")[1:] == [
        "news 2: fetching 2.0 KiB, 500ms",
        "news 2: reading [#####...............]  25% 25.0 MiB of 100 MiB, 500ms",
        "news 2: building, 500ms",
        "news 2: ready, 1.5s",
        "",
    ]
    assert kvctl.transport.requests == [
        admin.LoadModelRequest(model="news", source="news", task="embed", pooling="cls")
    ]


def test_a_name_cannot_steer_the_terminal(kvctl, monkeypatch):
    step = admin.LoadModelProgress(status={"name": "a\x1b[31m"}, phase="b\x1b[1m")
    kvctl.answers["LoadModel"] = [step, admin.LoadModelProgress(status={"name": "a"}, done=True)]
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    assert kvctl("models", "load", "a")[0] == 0
    assert "\x1b" not in shown.getvalue().replace("\r\x1b[K", "")
    assert "a\N{REPLACEMENT CHARACTER}[31m: b\N{REPLACEMENT CHARACTER}[1m" in shown.getvalue()


def test_a_load_is_one_line_elsewhere_and_a_line_a_step_for_programs(kvctl):
    kvctl.answers["LoadModel"] = loading({"phase": "reading", "done_bytes": 5, "total_bytes": 10})
    assert kvctl("models", "load", "news") == (0, "news 2 is ready after 1.5s\n", "")
    first, last = map(json.loads, kvctl("models", "load", "news", "--json")[1].splitlines())
    assert (first["phase"], first["done_bytes"], last["status"]["state"]) == ("reading", 5, "ready")


def test_aliases_are_set_and_taken_away(kvctl):
    kvctl.answers["SetModelAlias"] = admin.SetModelAliasResponse(versions=LISTED.models[1:])
    code, out, _ = kvctl("models", "alias", "news", "canary", "2", "--share", "10%")
    assert (code, out.splitlines()[1].split()[0]) == (0, "news")
    assert kvctl("models", "alias", "news", "canary", "--remove")[0] == 0
    assert kvctl.transport.requests == [
        admin.SetModelAliasRequest(model="news", alias="canary", version="2", traffic_share=0.1),
        admin.SetModelAliasRequest(model="news", alias="canary"),
    ]
    for arguments in (("news", "canary"), ("news", "canary", ""), ("news", "canary", "2", "--remove")):
        assert kvctl("models", "alias", *arguments)[2] == (
            "kvctl: give the version that the alias is to name, or --remove\n"
        )
    for share in ("110%", "2", "a lot", "-1"):
        code, _, err = kvctl("models", "alias", "news", "canary", "2", f"--share={share}")
        assert (code, "must be a share such as 10% or 0.1" in err) == (2, True)


def test_a_model_is_described(kvctl):
    kvctl.answers["GetPredictModel"] = pb.PredictModel(
        name="news",
        version="2",
        task=pb.PREDICT_TASK_CLASSIFY,
        labels=["a", "b"],
        num_bytes=2**20,
        loaded=True,
    )
    out = kvctl("models", "show", "news", "--version", "latest")[1]
    lines = {line[:14].strip(): line[16:] for line in out.splitlines()}
    assert (lines["task"], lines["labels"], lines["num bytes"], lines["loaded"]) == (
        "classify",
        "a, b",
        "1.0 MiB",
        "yes",
    )
    assert (lines["multi label"], lines["pooling"], lines["max length"]) == ("no", "-", "0")
    assert kvctl.transport.requests[0].version == "latest"
    assert json.loads(kvctl("models", "show", "news", "--json")[1])["labels"] == ["a", "b"]


RISK = {
    "changed": {"lower": 0.01, "estimate": 0.02, "upper": 0.04, "weight": 90},
    "num_compared": 103,
    "over_budget": True,
}
REPORT = admin.GetReuseResponse(
    model="risk",
    version="1",
    kind="features",
    policies=[
        {
            "name": "main",
            "traffic_share": 0.9,
            "num_key_features": 24,
            "lifetime_s": 30,
            "min_lifetime_s": 1,
            "max_lifetime_s": 3600,
            "max_changed": 0.01,
            "num_lookups": 1000,
            "num_hits": 750,
            "num_absent": 250,
            "hit_s": 0.0005,
            "miss_s": 0.002,
            "num_alarms": 2,
            "risk": RISK,
            "keys": [{"key": "0a1b", "risk": RISK, "lifetime_s": 30, "stopped": True, "num_hits": 13}],
        }
    ],
)


def test_reuse_is_reported_with_its_risk_and_its_limits(kvctl):
    kvctl.answers["GetReuse"] = REPORT
    code, out, _ = kvctl("models", "reuse", "risk", "--keys", "5")
    assert code == 0
    assert out.startswith("policy main of risk 1, features\n")
    for line in (
        "hit rate         75.0% of 1,000 lookups; a hit takes 0.50 ms, a miss 2.00 ms",
        "changed          2.0% (1.0% to 4.0%); limit 1.0%",
        "l2               nothing compared yet; no limit",
        "lifetime         30s, adapts from 1.0s to 1h00m",
        "verdict          over budget, from 103 comparisons",
        "key              the first 24 features",
    ):
        assert f"  {line}\n" in out
    assert out.splitlines()[-1].split() == ["0a1b", "2.0%", "4.0%", "103", "30s", "13", "stopped"]
    assert kvctl.transport.requests == [admin.GetReuseRequest(model="risk", max_keys=5)]
    assert json.loads(kvctl("models", "reuse", "risk", "--json")[1])["policies"][0]["num_hits"] == 750


def test_reuse_is_watched_line_by_line(kvctl):
    alarm = admin.ReuseEvent(
        kind=admin.ReuseEvent.ALARM,
        model="risk",
        version="1",
        policy="main",
        measure="changed",
        interval=RISK["changed"],
        limit=0.01,
    )
    shorter = admin.ReuseEvent(
        kind=admin.ReuseEvent.LIFETIME, model="risk", version="1", policy="main", key="0a", lifetime_s=15
    )
    started = admin.ReuseEvent(kind=admin.ReuseEvent.STARTED)
    kvctl.answers["WatchReuse"] = [
        started,
        alarm,
        admin.ReuseEvent(kind=admin.ReuseEvent.LOST, num_lost=3),
        shorter,
    ]
    code, out, err = kvctl("models", "watch")
    assert (code, err) == (0, "[watching]\n[3 events lost: they came too fast]\n")
    assert out.splitlines() == [
        "alarm risk 1 main all keys changed 0.02 (0.01 to 0.04), limit 0.01",
        "lifetime risk 1 main key 0a lifetime 15s",
    ]
    assert kvctl("models", "watch", "--count", "1")[1].count("\n") == 1
    kinds = [json.loads(line)["kind"] for line in kvctl("models", "watch", "risk", "--json")[1].splitlines()]
    assert kinds == ["started", "alarm", "lost", "lifetime"]
    assert kvctl.transport.requests[-1].model == "risk"


def test_what_is_kept_for_reuse_is_forgotten(kvctl):
    kvctl.answers["ClearReuse"] = admin.ClearReuseResponse(num_entries=1200)
    assert kvctl("models", "clear-reuse", "risk") == (0, "1,200 entries forgotten\n", "")
    assert kvctl("models", "clear-reuse", "risk", "--version", "1", "--json")[1] == '{"num_entries": 1200}\n'
    assert kvctl.transport.requests[1] == admin.ClearReuseRequest(model="risk", version="1")


def test_unloading_one_version_or_all(kvctl):
    kvctl.answers["UnloadModel"] = admin.UnloadModelResponse(
        status={"name": "news", "version": "2", "state": admin.MODEL_STATE_UNLOADED}
    )
    assert kvctl("models", "unload", "news") == (0, "news is unloaded\n", "")
    assert kvctl("models", "unload", "news", "--version", "2", "--drain", "5s")[1] == "news 2 is unloaded\n"
    assert kvctl.transport.requests[1] == admin.UnloadModelRequest(
        model="news", version="2", drain={"seconds": 5}
    )


def test_reuse_of_a_model_that_is_not_loaded_is_said_to_be_nothing(kvctl):
    kvctl.answers["GetReuse"] = lambda request: admin.GetReuseResponse(
        model="risk", version="1", kind="features"
    )
    code, out, err = kvctl("models", "reuse", "risk")
    assert (code, out, err) == (0, "", "risk 1 is not loaded; there is nothing to report\n")
