"""Frames of ``kvctl cache top`` from real answers, and what keys do to them. No terminal."""

import io
import signal

import pytest
from rich.console import Console

import kvserve
from kvserve._cli.top_frame import render
from kvserve._cli.top_terminal import Keys, raising_on_termination
from kvserve._cli.top_view import Sample, View, recent_rates, take_sample
from kvserve.testing import MockTransport
from kvserve.v1 import cache_admin_pb2 as pb


def prefix(number, **fields):
    fields = {"namespace": "ns-1", "tenant": "acme", "num_tokens": 100 * number, "value": number} | fields
    return pb.PrefixInfo(prefix_id=f"{number:016x}", own_blocks=number, own_bytes=number * 2048, **fields)


def stats(*, uptime_s=60, asked=1000, reused=250, requests=10, hits=5, spaces=("ns-1",)):
    return pb.GetStatsResponse(
        model="m",
        bytes_per_block=1024,
        num_blocks=100,
        num_blocks_in_use=20,
        num_blocks_cached=30,
        num_blocks_free=50,
        total=pb.CacheStats(
            entries=3,
            requests=requests,
            hits=hits,
            request_hit_rate=hits / requests,
            token_hit_rate=reused / asked,
            prompt_tokens=asked,
            cached_block_tokens=reused - 10,
            restored_tokens=10,
        ),
        namespaces=[pb.NamespaceStats(namespace=space, tenant=f"tenant of {space}") for space in spaces],
        tiers=[
            pb.TierStats(tier="disk", is_available=True, bytes=4096, hits=3, misses=1),
            pb.TierStats(tier="redis", last_fault="timeout"),
        ],
        uptime_s=uptime_s,
        policy="lru",
    )


def sample(prefixes=(), **fields):
    answers = {"GetStats": stats(**fields), "ListPrefixes": pb.ListPrefixesResponse(prefixes=prefixes)}
    with kvserve.Client(transport=MockTransport(lambda method, request: answers[method])) as client:
        return take_sample(client, model="")


def frame(
    now: Sample, before: Sample | None = None, view: View | None = None, *, width=160, height=24, fault=""
):
    drawn = io.StringIO()
    console = Console(file=drawn, width=width, height=height)
    console.print(render(now, before, view or View(), width=width, height=height, fault=fault))
    return drawn.getvalue()


def test_the_header_says_how_the_cache_does():
    lines = frame(sample()).splitlines()
    assert lines[0].rstrip() == "cache of m   policy lru   up 1m00s   prefixes 3"
    assert lines[1].startswith("hits     tokens 25.0% (now -)   requests 50.0% (now -)")
    bar = "█" * 12 + "▓" * 18 + "░" * 30
    assert lines[2].rstrip() == f"memory   {bar} 20 in use, 30 cached, 50 free of 100 blocks (100 KiB)"
    assert (
        lines[3].rstrip() == "tiers    disk 4.0 KiB, 3 hits of 4   redis 0 B, 0 hits of 0 left alone timeout"
    )


def test_rates_of_the_last_interval_come_from_differences():
    before, now = sample(), sample(uptime_s=62, asked=1100, reused=330, requests=12, hits=6)
    assert "tokens 30.0% (now 80.0%)   requests 50.0% (now 50.0%)" in frame(now, before)
    rates = recent_rates(now, sample(uptime_s=64, asked=1100, reused=330, requests=12, hits=6))
    assert (rates.tokens, rates.requests) == (None, None)


def test_an_engine_that_started_again_has_no_interval():
    rates = recent_rates(sample(uptime_s=600), sample(uptime_s=1, asked=5000))
    assert (rates.tokens, rates.requests) == (None, None)


def test_rows_show_what_is_known_of_a_prefix():
    now = sample(
        [
            prefix(
                3,
                hits=7,
                idle_s=90,
                age_s=4000,
                expires_in_s=30,
                pin=pb.PIN_KIND_HARD,
                pin_expires_in_s=600,
                tiers=[pb.TierBlocks(tier="disk", blocks=2)],
                preview="You are\na \x1b[31mbot",
            )
        ]
    )
    [row] = [line for line in frame(now).splitlines() if line.startswith("000000000000")]
    assert row.split()[:13] == [
        "000000000000", "acme", "300", "3", "6.0", "KiB",
        "7", "1m30s", "1h06m", "30s", "hard", "10m00s", "disk:2",
    ]  # fmt: skip
    assert row.rstrip().endswith("3 You are a \N{REPLACEMENT CHARACTER}[31mbot")


def test_s_goes_through_the_orders_and_marks_the_column():
    now = sample([prefix(3, hits=1), prefix(2, hits=9), prefix(1, hits=4)])
    view = View()

    def order():
        return [info.num_tokens for info in view.rows(now, 10)]

    assert order() == [300, 200, 100]
    for _ in range(3):
        view.press("s")
    assert (view.sort, order()) == ("HITS", [200, 100, 300])
    assert "HITS▼" in frame(now, view=view)
    for _ in range(3):
        view.press("s")
    assert view.sort == "VALUE"


def test_f_takes_a_text_and_escape_takes_it_back():
    view = View()
    for key in "fqx\x7fs":
        view.press(key)
    assert (view.typed, view.has_quit, view.sort) == ("qs", False, "VALUE")
    assert "namespace or tenant: qs" in frame(sample(), view=view)
    view.press("\x1b")
    assert (view.typed, view.filter_text) == (None, "")
    for key in "fAc\r":
        view.press(key)
    now = sample([prefix(1), prefix(2, tenant="globex")])
    assert (view.typed, view.filter_text) == (None, "Ac")
    assert [info.tenant for info in view.rows(now, 10)] == ["acme"]
    for key in "f\r":
        view.press(key)
    assert len(view.rows(now, 10)) == 2


def test_p_pauses_and_q_quits():
    view = View()
    view.press("p")
    assert "paused" in frame(sample(), view=view)
    view.press("p")
    view.press("x")
    assert (view.is_paused, view.has_quit) == (False, False)
    view.press("q")
    assert view.has_quit


def test_a_fault_is_shown_beside_the_last_figures():
    drawn = frame(sample([prefix(1)]), fault="no answer: connection\nrefused")
    assert "no answer: connection refused" in drawn.splitlines()[0]
    assert "000000000000" in drawn


@pytest.mark.parametrize("height", [12, 24, 40])
def test_a_frame_fits_the_screen(height):
    drawn = frame(sample([prefix(i) for i in range(1, 100)]), height=height)
    assert len(drawn.splitlines()) <= height
    assert len(drawn.splitlines()) >= height - 1
    many = frame(sample([prefix(i) for i in range(1, 100)]), view=View(num_rows=50), height=height)
    assert sum("acme" in line for line in many.splitlines()) == 50


@pytest.mark.parametrize("width", [20, 40, 80, 100, 134, 135, 200])
def test_no_line_is_wider_than_the_screen_and_the_id_is_always_there(width):
    drawn = frame(sample([prefix(7, preview="p" * 300)]), width=width)
    assert max(map(len, drawn.splitlines())) <= width
    assert "000000000000" in drawn
    assert ("PREVIEW" in drawn) == (width >= 135)


def test_a_filter_that_means_one_namespace_is_the_servers_work():
    transport = MockTransport(
        lambda method, request: (
            stats(spaces=("ns-1", "ns-2", "other"))
            if method == "GetStats"
            else pb.ListPrefixesResponse(prefixes=[prefix(1), prefix(2, namespace="other", tenant="")])
        )
    )
    with kvserve.Client(transport=transport) as client:
        take_sample(client, model="", filter_text="of NS-2")
        assert transport.requests[-1].namespace == "ns-2"
        several = take_sample(client, model="", filter_text="ns-")
    assert transport.requests[-1].namespace == ""
    assert [info.namespace for info in several.prefixes] == ["ns-1"]


def test_a_signal_that_comes_before_the_wait_ends_it_all_the_same():
    """Else a termination just before the wait for keys would be noticed with the next key."""
    with raising_on_termination(), Keys() as keys:
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        assert keys._selector.select(timeout=0)
        assert keys.wait() == []
        assert not keys._selector.select(timeout=0)
    assert signal.set_wakeup_fd(-1) == -1
