"""Runs: where they begin and end, what they are worth, and paging through them while the cache lives."""

from __future__ import annotations

import pytest

from kvcore.heat import HALF_LIFE_S, add_heat, rate_of, use_at
from kvcore.pins import PinKind
from kvcore.runs import RunCatalogue
from tests.cache_kit import CacheKit

A, B, C, D = [1] * 4, [2] * 4, [3] * 4, [4] * 4


def catalogue(kit: CacheKit, *, pieces_of: int = 1000, **how) -> RunCatalogue:
    made = RunCatalogue(kit.cache.tree, cost=lambda a, b: float(b - a), now=kit.clock.now(), **how)
    while not made.advance(pieces_of):
        pass
    return made


def shapes(made: RunCatalogue) -> list[tuple[int, int]]:
    """Return (first token of the last block, blocks) of each run in order of tokens."""
    return sorted((run.end.tokens[0], run.num_blocks) for run in made.accepted)


@pytest.mark.parametrize("pieces_of", [1, 1000])
def test_a_run_goes_on_to_a_branch(pieces_of):
    kit = CacheKit(num_logits_slots=0)
    kit.compute([*A, *B, *C])
    kit.compute([*A, *B, *D])
    made = catalogue(kit, pieces_of=pieces_of)
    assert shapes(made) == [(2, 2), (3, 1), (4, 1)]
    ends = {run.end.tokens[0]: run for run in made.accepted}
    assert (ends[3].above, ends[2].num_children) == (ends[2], 2)


def test_a_run_ends_where_last_logits_are_kept_or_a_pin_ends():
    kit = CacheKit()
    kit.compute([*A, *B])
    kit.compute([*A, *B, *C, *D])
    assert shapes(catalogue(kit)) == [(2, 2), (4, 2)]
    kit.cache.control.pin(kit.node([*A, *B, *C]), PinKind.SOFT)
    assert shapes(catalogue(kit)) == [(2, 2), (3, 1), (4, 1)]


def test_a_block_that_is_not_full_is_a_run_of_its_own():
    kit = CacheKit(num_logits_slots=0)
    kit.compute([*A, 5, 6])
    made = catalogue(kit)
    assert shapes(made) == [(1, 1), (5, 1)]
    assert sorted(run.num_tokens(4) for run in made.accepted) == [4, 6]


def test_runs_together_are_all_blocks_that_can_be_found():
    kit = CacheKit(64)
    for number in range(12):
        kit.compute([*A, *[number % 3] * 4, *[number] * 4, number])
    kit.compute(D, lifetime_s=0.0)
    running = kit.start([*C, *D, 5], owner=9)
    made = catalogue(kit)
    assert sum(run.num_blocks for run in made.accepted) == 1 + 3 + 12 + 12
    kit.cache.release(running)


def test_a_use_counts_for_everything_above_it():
    kit = CacheKit(num_logits_slots=0)
    kit.compute([*A, *B])
    kit.compute([*A, *C])
    for _ in range(3):
        kit.compute([*A, *B, 9])
    runs = {run.end.tokens[0]: run for run in catalogue(kit).accepted}
    fresh = rate_of(use_at(0.0), 0.0)
    assert runs[2].use_rate == pytest.approx(3 * fresh)
    assert runs[1].use_rate == pytest.approx(4 * fresh)  # and the one of C
    assert runs[1].value == pytest.approx(4 * fresh * 4)
    assert runs[3].use_rate == 0


def test_heat_fades_and_survives_its_block():
    kit = CacheKit(num_logits_slots=0)
    kit.compute([*A, *B])
    kit.compute([*A, *B, 9])
    (before,) = (run.use_rate for run in catalogue(kit).accepted if run.num_blocks == 2)
    assert before > 0
    kit.cache.control.take_out(kit.cache.control.select(below=[kit.node([*A, *B])]).nodes)
    kit.clock.advance(HALF_LIFE_S)
    (run,) = catalogue(kit).accepted
    assert run.end.tokens == tuple(A)
    assert run.use_rate == pytest.approx(before / 2)


def test_heat_neither_overflows_nor_forgets_small_ones():
    year = 365 * 24 * 3600.0
    heat = add_heat(use_at(0.0), use_at(year))
    assert rate_of(heat, year) == pytest.approx(rate_of(use_at(year), year))
    heat = None
    for _ in range(1000):
        heat = add_heat(heat, use_at(5.0))
    assert rate_of(heat, 5.0) == pytest.approx(1000 * rate_of(use_at(5.0), 5.0))


def test_the_order_holds_while_time_passes():
    kit = CacheKit(64, num_logits_slots=0)
    for number in range(8):
        kit.compute([number] * 8)
        for _ in range(number % 4):
            kit.compute([*[number] * 8, 9])
            kit.clock.advance(7.0)
    first = [(run.end.serial, run.place) for run in catalogue(kit).after(None)]
    kit.clock.advance(5000.0)
    later = [(run.end.serial, run.place) for run in catalogue(kit).after(None)]
    assert [serial for serial, _ in first] == [serial for serial, _ in later]
    values = [run.value for run in catalogue(kit).after(None)]
    assert values == sorted(values, reverse=True)
    middle = first[5][1]
    rest = [run.end.serial for run in catalogue(kit).after(middle)]
    assert rest == [serial for serial, _ in first[6:]]


def test_what_has_gone_is_not_shown():
    kit = CacheKit(num_logits_slots=0)
    kit.compute(A)
    kit.compute(B)
    made = catalogue(kit)
    kit.cache.evict(1)
    assert [run.end.tokens[0] for run in made.after(None)] == [2]


def test_a_condition_leaves_out_but_does_not_change_values():
    kit = CacheKit(num_logits_slots=0)
    kit.compute([*A, *B])
    kit.compute([*A, *C])
    kit.compute([*A, *C, 9])
    made = catalogue(kit, accepts=lambda run: run.end.tokens[0] == 1)
    assert (made.total, made.num_all) == (1, 4)
    assert made.accepted[0].use_rate > 0
