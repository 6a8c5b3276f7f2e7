"""``kvctl predict``, ``embed`` and ``models`` as processes against the real front end."""

import asyncio
import json
import signal

import pytest
import pytest_asyncio

from server.predict.messages import EventKind, OpProgress, ReuseEvent
from tests.rpc.harness import ScriptedEngine, serving
from tests.rpc.scripted_predict import REFUSED, SIZES, ScriptedPredict, status
from tests.rpc.test_client_kvctl import NOTICED_S, kvctl, start_kvctl


@pytest.fixture
def backend():
    return ScriptedPredict()


@pytest_asyncio.fixture
async def target(backend):
    async with serving(ScriptedEngine(), predict=backend) as server:
        yield f"127.0.0.1:{server.port}"


async def test_predict_and_embed(target):
    code, out, err = await kvctl("predict", "sizes", "--target", target, "abc", "x" * 60)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [["short", "0.6000"], ["middle", "0.6000"]]
    code, out, _ = await kvctl("embed", "letters", "--jsonl", "--target", target, typed="abba\nzz\n")
    vectors = [json.loads(line)["vector"] for line in out.splitlines()]
    assert (code, [len(vector) for vector in vectors]) == (0, [26, 26])
    assert vectors[0][0] == pytest.approx(vectors[0][1])
    code, out, err = await kvctl(
        "predict", "risk", "--features", "-", "--stats", "--target", target, typed="0,1,2,3\n"
    )
    assert (code, out.splitlines()[1].split()) == (0, ["0.997527", "yes", "row", "1"])
    assert err.startswith("[risk 1 | 1 inputs, 0 truncated, 1 reused | batch of 7 | load 500ms, ")


async def test_errors_are_one_line_with_the_field_and_an_exit_code(target):
    for arguments, code, text in (
        (("predict", "sizes", "ok", "x" * 200), 2, "texts.items[1].text: has more than 100 tokens"),
        (
            ("predict", "risk", "--features", "1,2,nan,4"),
            2,
            "features.rows[0].values[2]: must be a finite number",
        ),
        (("predict", "nobody", "x"), 1, "no such model is served here"),
        (("embed", "sizes", "x"), 2, "model: the model gives no vectors"),
        (("models", "load", "news", "--source", "/etc"), 2, "source: must be a folder below the model root"),
        (("predict", "risk", "--features", "no.csv"), 2, "no.csv: No such file or directory"),
        (("models", "reuse", "nobody"), 1, "no such model is served here"),
    ):
        got, out, err = await kvctl(*arguments, "--target", target)
        assert (got, out) == (code, "")
        assert err.startswith(f"kvctl: {text}")
        assert err.count("\n") == 1


async def test_models_from_loading_to_reuse(target, backend):
    backend.progress = [
        OpProgress(1, status("sizes", None), "reading", 5, 10),
        status("sizes", SIZES, load_s=0.5),
    ]
    code, out, err = await kvctl("models", "load", "sizes", "--target", target)
    assert (code, out.startswith("sizes 1 is ready after "), err) == (0, True, "")
    backend.progress = [REFUSED]
    assert await kvctl("models", "load", "sizes", "--target", target) == (
        1,
        "",
        "kvctl: its files are not safetensors\n",
    )
    code, out, err = await kvctl("models", "--target", target)
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        "tiny",
        *(model.name for model in backend.catalogue),
    ]
    assert err == "[predict models take 1000 B of 4.9 KiB]\n"
    assert "task            embed\n" in (await kvctl("models", "show", "letters", "--target", target))[1]
    assert (await kvctl("models", "alias", "sizes", "canary", "1", "--share", "5%", "--target", target))[
        0
    ] == 0
    assert backend.ops[-1].traffic_share == 0.05
    out = (await kvctl("models", "reuse", "risk", "--keys", "1", "--target", target))[1]
    assert "  changed          2.0% (1.0% to 3.0%); limit 1.0%\n" in out
    assert (await kvctl("models", "clear-reuse", "risk", "--target", target))[1] == "42 entries forgotten\n"


async def test_a_watch_goes_on_until_it_is_interrupted(target, backend):
    process = await start_kvctl("models", "watch", "--target", target)
    async with asyncio.timeout(NOTICED_S):
        assert await process.stderr.readline() == b"[watching]\n"
        backend.events.put_nowait(
            ReuseEvent(kind=EventKind.STOPPED, model="risk", version="1", policy="main", key="0a")
        )
        assert (await process.stdout.readline()).split() == [
            b"stopped",
            b"risk",
            b"1",
            b"main",
            b"key",
            b"0a",
        ]
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
