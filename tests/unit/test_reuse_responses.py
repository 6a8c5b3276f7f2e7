"""Responses kept for similar texts, part by part: the nearest, the table, the threshold, one turn of all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from kvcore.clock import ManualClock
from server.predict.messages import (
    EventKind,
    Inputs,
    ModelInfo,
    Output,
    PolicyReport,
    ReuseEvent,
    Task,
    TextItem,
)
from server.predict.model import Prepared
from server.predict.options import SemanticSpec
from server.predict.reuse import SemanticModel
from server.predict.reuse.neighbours import Neighbours
from server.predict.reuse.responses import OVERHEAD_BYTES, Partition, Response, ResponseCache
from server.predict.reuse.threshold import EDGES, NOTHING, Threshold

MINE = Partition("mine", truncate=False, has_pair=False)
ALL_CLEAN = 140
"""Comparisons without a change that prove 5% in one of 19 bins: log(19 / 0.05) / -log(0.95) is 115.8."""


def unit(angle: float) -> np.ndarray:
    return np.array([math.cos(angle), math.sin(angle)], np.float32)


def response(
    text: str, *, at: float = 0.0, partition: Partition = MINE, angle: float | None = 0.0
) -> Response:
    vectors = [] if angle is None else [unit(angle)]
    return Response(partition, TextItem(text), Output(b"\0" * 8), vectors, at)


# ---- the nearest ----


def test_the_nearest_is_the_nearest_whatever_was_added_and_taken_away() -> None:
    draw = np.random.default_rng(0)
    table, kept = Neighbours(6, parts=2), {}
    for step in range(400):
        if kept and draw.random() < 0.4:
            name = list(kept)[draw.integers(len(kept))]
            table.remove(name)
            del kept[name]
        else:
            parts = [part / np.linalg.norm(part) for part in draw.standard_normal((2, 6)).astype(np.float32)]
            table.add(step, parts)
            kept[step] = parts
        table.check_integrity()
        assert len(table) == len(kept)
        asked = [part / np.linalg.norm(part) for part in draw.standard_normal((2, 6)).astype(np.float32)]
        found = table.nearest(asked)
        if not kept:
            assert found is None
            continue
        alike = {
            name: min(float(a @ b) for a, b in zip(parts, asked, strict=True)) for name, parts in kept.items()
        }
        assert found is not None
        assert found[0] == max(alike, key=lambda name: alike[name])
        assert found[1] == pytest.approx(alike[found[0]], abs=1e-6)
    assert len(kept) > 32


def test_nothing_is_more_similar_than_itself() -> None:
    table = Neighbours(2, parts=1)
    long = np.array([1.0001, 0.0], np.float32)  # rounding may leave it a little too long
    table.add("a", [long])
    assert table.nearest([long]) == ("a", 1.0)


# ---- the table ----


def test_a_response_in_place_of_another_takes_its_place_entirely() -> None:
    cache = ResponseCache(max_entries=4, lifetime_s=10.0)
    cache.put(response("a", at=0.0, angle=0.0))
    cache.put(response("a", at=5.0, angle=1.0))
    cache.check_integrity()
    assert len(cache) == 1
    assert cache.num_bytes == response("a").num_bytes
    assert cache.expire(10.0) == set()  # it is as old as what it says now
    found = cache.nearest(MINE, [unit(1.0)])
    assert found is not None
    assert found[1] == pytest.approx(1.0)
    assert cache.expire(15.0) == {(MINE, TextItem("a"))}
    cache.check_integrity()
    assert (len(cache), cache.num_bytes, cache.nearest(MINE, [unit(1.0)])) == (0, 0, None)


def test_without_a_lifetime_responses_stay() -> None:
    cache = ResponseCache(max_entries=4, lifetime_s=None)
    cache.put(response("a"))
    assert cache.expire(1e12) == set()
    assert cache.exact(MINE, TextItem("a")) is not None


def test_what_was_cleared_is_not_found_and_can_be_kept_again() -> None:
    cache = ResponseCache(max_entries=4, lifetime_s=10.0)
    cache.put(response("a"))
    cache.put(response("b", angle=None))
    assert cache.clear() == 2
    cache.check_integrity()
    assert (len(cache), cache.num_bytes) == (0, 0)
    assert cache.exact(MINE, TextItem("a")) is None
    assert cache.nearest(MINE, [unit(0.0)]) is None
    cache.put(response("a", at=1.0))
    cache.check_integrity()
    assert cache.nearest(MINE, [unit(0.0)]) is not None


def test_a_response_that_was_asked_for_again_outlives_one_that_was_not() -> None:
    cache = ResponseCache(max_entries=2, lifetime_s=None)
    for text in ("a", "b"):
        cache.put(response(text))
    cache.exact(MINE, TextItem("a"))
    cache.put(response("c"))
    cache.check_integrity()
    assert [cache.exact(MINE, TextItem(text)) is not None for text in "abc"] == [True, False, True]
    assert cache.num_evicted == 1


def test_bytes_are_those_of_texts_numbers_and_vectors() -> None:
    pair = Response(MINE, TextItem("four", "sixsix"), Output(b"\0" * 12), [unit(0.0), unit(1.0)], 0.0)
    assert pair.num_bytes == 4 * 10 + 12 + 2 * 8 + OVERHEAD_BYTES


# ---- the threshold ----


def teach(threshold: Threshold, similarity: float, count: int, *, changed: bool = False) -> list[bool]:
    return [threshold.observe(similarity, 1.0, 0.0, changed=changed) for _ in range(count)]


def test_a_bin_is_proved_by_as_many_comparisons_as_the_confidence_asks_for() -> None:
    threshold = Threshold(0.05)
    moved = teach(threshold, 0.9, ALL_CLEAN)
    assert moved.count(True) == 1
    assert 115 <= moved.index(True) < 130
    assert threshold.value == pytest.approx(1 - 2**-3.0)


@pytest.mark.parametrize("rate", [0.005, 0.01, 0.2])
def test_every_rate_can_be_proved(rate: float) -> None:
    threshold = Threshold(rate)
    needed = math.log(19 / 0.05) / -math.log(1 - rate)
    assert teach(threshold, 0.99999, int(1.3 * needed)).count(True) == 1
    assert threshold.value == EDGES[-1]


def test_what_is_hardly_similar_is_never_reused_however_often_it_was_right() -> None:
    threshold = Threshold(0.05)
    assert not any(teach(threshold, 0.49, 10 * ALL_CLEAN))
    assert threshold.value == NOTHING
    assert any(teach(threshold, 0.5, ALL_CLEAN))
    assert threshold.value == EDGES[0] == 0.5


def test_every_bin_can_be_the_lowest_and_the_lowest_proved_counts() -> None:
    threshold = Threshold(0.05)
    for edge in reversed(EDGES):
        assert any(teach(threshold, edge, ALL_CLEAN)), edge
        assert threshold.value == edge


def test_what_was_forgotten_has_to_be_proved_anew() -> None:
    threshold = Threshold(0.05)
    teach(threshold, 0.9, ALL_CLEAN)
    assert threshold.reset()
    assert not threshold.reset()
    assert threshold.value == NOTHING
    assert not any(teach(threshold, 0.9, 110))
    assert any(teach(threshold, 0.9, 20))


# ---- one turn ----


class Angles:
    """An embedder of texts "degrees ...", in half a second; "nowhere" has no direction, long ones are cut."""

    info = ModelInfo(task=Task.EMBED, family="test", num_dimensions=2)

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.num_run = 0

    def prepare(self, inputs: Inputs, **_: object) -> list[Prepared]:
        return [Prepared(3, each, truncated=len(each.text) > 20) for each in inputs.texts]

    def run(self, batch: list[Prepared]) -> list[Output]:
        self.clock.advance(0.5)
        self.num_run += len(batch)
        return [Output(self.vector_of(each.payload.text.split()[0]).tobytes()) for each in batch]

    @staticmethod
    def vector_of(word: str) -> np.ndarray:
        known = {"nowhere": np.zeros(2, np.float32), "broken": np.full(2, np.nan, np.float32)}
        return known[word] if word in known else 3 * unit(math.radians(float(word)))

    def close(self) -> None:
        raise AssertionError("it belongs to somebody else")


class Words(Angles):
    """A classifier: yes, if the text says so. It takes two seconds."""

    info = ModelInfo(task=Task.CLASSIFY, family="test", labels=("no", "yes"))

    def prepare(self, inputs: Inputs, **_: object) -> list[Prepared]:
        return [Prepared(5, each) for each in inputs.texts]

    def run(self, batch: list[Prepared]) -> list[Output]:
        self.clock.advance(2.0)
        self.num_run += len(batch)
        told = [float("yes" in each.payload.text) for each in batch]
        return [
            Output(np.array([1 - yes, yes], "<f4").tobytes(), each.num_tokens)
            for each, yes in zip(batch, told, strict=True)
        ]


class Kit:
    """A semantic model that has learned, unless it has not, that what is near says the same."""

    def __init__(self, *, has_learned: bool = True, **spec: Any) -> None:
        self.clock = ManualClock()
        self.inner, self.embedder = Words(self.clock), Angles(self.clock)
        self.events: list[ReuseEvent] = []
        spec = {"max_error_rate": 0.05, "sample_share": 1e-9, **spec}
        self.model = SemanticModel(
            self.inner,  # type: ignore[arg-type]
            self.embedder,  # type: ignore[arg-type]
            SemanticSpec(embedder="angles", **spec),
            clock=self.clock,
            on_event=self.events.append,
        )
        if has_learned:
            teach(self.model._threshold, 0.9, ALL_CLEAN)
            teach(self.model._threshold, 0.9999, ALL_CLEAN)

    def prepare(self, *texts: str | tuple[str, str], reuse: bool = True) -> list[Prepared]:
        items = tuple(TextItem(text) if isinstance(text, str) else TextItem(*text) for text in texts)
        return self.model.prepare(Inputs(texts=items), truncate=True, reuse=reuse, tenant="")

    def hits(self, *texts: str | tuple[str, str], reuse: bool = True) -> list[bool]:
        outputs = self.model.run(self.prepare(*texts, reuse=reuse))
        self.model.check_integrity()
        assert len(outputs) == len(texts)
        return [output.cache_hit for output in outputs]

    def report(self) -> PolicyReport:
        return self.model.reuse_report(max_keys=0).policies[0]

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self.events]


def test_what_is_near_is_reused_and_what_is_not_is_computed() -> None:
    kit = Kit()
    assert kit.hits("0", "90") == [False, False]
    assert kit.hits("20", "45", "89") == [True, False, True]
    assert kit.inner.num_run == 3
    report = kit.report()
    assert (report.num_hits, report.num_absent, report.num_uncertified, report.num_stopped) == (2, 2, 1, 0)


def test_before_anything_is_learned_what_is_near_is_stopped_not_uncertified() -> None:
    kit = Kit(has_learned=False)
    kit.hits("0")
    assert kit.hits("1") == [False]
    report = kit.report()
    assert (report.num_stopped, report.num_uncertified, report.threshold) == (1, 0, NOTHING)


def test_a_pair_of_which_one_text_is_cut_has_no_neighbours() -> None:
    """What was cut off may be what differs, in either of the two."""
    kit, long = Kit(), "0 " + "x" * 30
    kit.hits(("0", long), (long, "0"))
    assert kit.hits(("0", long + "y"), (long + "y", "0")) == [False, False]
    assert kit.hits(("0", long), (long, "0")) == [True, True]
    assert kit.hits(("0", "0"), ("1", "1")) == [False, False]  # of one batch, so not of each other
    assert kit.hits(("2", "2")) == [True]


@pytest.mark.parametrize("text", ["nowhere", "broken"])
def test_a_text_without_a_direction_is_near_to_nothing(text: str) -> None:
    kit = Kit()
    assert kit.hits(text, "0") == [False, False]
    assert kit.hits(f"{text} too", "1") == [False, True]
    assert kit.hits(text) == [True]  # word for word


def test_a_text_costs_the_batch_what_both_models_read_of_it() -> None:
    kit = Kit()
    assert [each.num_tokens for each in kit.prepare("0", ("0", "1"))] == [5 + 3, 5 + 3 + 3]
    assert [each.num_tokens for each in kit.prepare("0", reuse=False)] == [5]


def test_repeats_word_for_word_are_not_embedded() -> None:
    kit = Kit()
    kit.hits("0", "0", "0")
    kit.hits("0")
    assert (kit.embedder.num_run, kit.inner.num_run) == (1, 1)
    assert kit.report().num_hits == 3


def test_texts_that_reuse_nothing_keep_their_places_beside_others() -> None:
    kit = Kit()
    kit.hits("0 yes")
    both = [
        *kit.prepare("1 yes"),
        *kit.prepare("0 yes", reuse=False),
        *kit.prepare("90"),
        *kit.prepare("1 yes"),
    ]
    outputs = kit.model.run(both)
    assert [output.cache_hit for output in outputs] == [True, False, False, True]
    assert [np.frombuffer(output.values, "<f4").argmax() for output in outputs] == [1, 1, 0, 1]
    assert [output.policy for output in outputs] == ["semantic", "", "semantic", "semantic"]


def test_a_neighbour_that_was_of_use_is_kept_longer() -> None:
    kit = Kit(max_entries=2)
    kit.hits("0", "90")
    kit.hits("1")
    kit.hits("180")
    assert kit.hits("0") == [True]
    assert kit.hits("90") == [False]


def test_the_sampled_share_of_hits_is_computed_all_the_same() -> None:
    for share, computed in ((1.0, 40), (1e-9, 0)):
        kit = Kit(sample_share=share)
        kit.hits("0")
        for number in range(40):
            assert kit.hits(f"0 {number}") == [True]
        assert kit.inner.num_run == 1 + computed
        risk = kit.report().risk
        assert risk.num_compared == computed
        assert (risk.l2.estimate, risk.cosine_distance.estimate, risk.changed.estimate) == (0.0, 0.0, 0.0)


def test_the_first_learned_threshold_is_told_and_so_is_its_end() -> None:
    kit = Kit(has_learned=False, sample_share=1.0)
    for number in range(ALL_CLEAN + 1):
        kit.hits(f"0 {number}")
    assert kit.kinds() == [EventKind.RESUMED]
    assert kit.report().threshold < 1
    for number in range(ALL_CLEAN):
        kit.hits(f"0 {number} {'yes' if number % 2 else 'no'}!")
        if kit.report().threshold > 1:
            break
    assert kit.kinds()[-1] is EventKind.STOPPED
    assert kit.report().threshold == NOTHING
    assert kit.hits("0 and more") == [False]


def test_when_what_is_near_says_otherwise_the_alarm_fires_and_everything_is_learned_anew() -> None:
    kit = Kit(sample_share=1.0)
    turn = 0
    while EventKind.ALARM not in kit.kinds():
        kit.hits(f"0 {turn} {'yes' if turn % 2 else 'no'}")
        turn += 1
        assert turn < 30, "half of what is reused is wrong, and nobody says so"
    (alarm,) = (event for event in kit.events if event.kind is EventKind.ALARM)  # though two meters see it
    report = kit.report()
    assert (report.num_alarms, report.threshold) == (1, NOTHING)
    assert (alarm.policy, alarm.limit, alarm.measure) == ("semantic", 0.05, "changed")
    assert alarm.interval is not None
    assert alarm.interval.lower > 0.05
    assert kit.model._threshold.num_resets == 1


def test_what_is_computed_below_the_threshold_is_not_held_against_what_is_reused() -> None:
    kit = Kit()
    for _ in range(60):  # 45 degrees away: 0.7, and of the other opinion
        kit.model.clear_reuse()
        kit.hits("0 yes")
        assert kit.hits("45 no") == [False]
    assert kit.report().risk.num_compared == 0
    assert kit.kinds() == []
    assert kit.hits("0.001 yes") == [True]


def test_a_sudden_change_after_a_long_good_time_is_noticed_soon() -> None:
    """The meter that is sure remembers the good time; the quick one does not."""
    kit = Kit(sample_share=1.0)
    kit.hits("0 yes")
    for turn in range(600):
        kit.hits(f"0 yes {turn}")
    assert kit.kinds() == []
    num_wrong = 0
    while EventKind.ALARM not in kit.kinds():
        kit.model.clear_reuse()
        kit.hits("0 yes")
        assert kit.hits(f"0 no {num_wrong}") == [True]
        num_wrong += 1
        assert num_wrong < 100
    assert num_wrong <= 20


def test_one_response_can_be_all_there_is_room_for() -> None:
    kit = Kit(max_entries=1)
    assert kit.hits("0", "90") == [False, False]
    assert kit.hits("90") == [True]


def test_times_and_lifetimes_are_reported_as_they_were() -> None:
    kit = Kit(lifetime_s=50.0)
    assert (kit.report().hit_s, kit.report().miss_s) == (0.0, 0.0)
    kit.hits("0", "90")
    report = kit.report()
    assert (report.hit_s, report.miss_s) == (0.0, (0.5 + 2.0) / 2)
    kit.hits("0", "1")
    assert (kit.report().hit_s, kit.report().miss_s) == (0.5 / 2, (0.5 + 2.0) / 2)
    assert (report.lifetime_s, report.min_lifetime_s, report.max_lifetime_s) == (50.0,) * 3
    assert (report.max_changed, report.sample_share, report.traffic_share) == (0.05, 1e-9, 1.0)
    endless = Kit(lifetime_s=None).report()
    assert (endless.lifetime_s, endless.min_lifetime_s, endless.max_lifetime_s) == (0.0,) * 3
