"""The scheduler, step by step. The runner's KV is a hash chain: wrong sharing gives wrong tokens."""

from __future__ import annotations

import gc

import pytest

from server.engine.messages import (
    Admitted,
    Cancel,
    Failed,
    FailureKind,
    Finished,
    GenerateSpec,
    Refused,
    Submit,
)
from server.engine.plan import BlockCopy, PrefixGroup, StepPlan
from tests.property.engine_world import World

PROMPT = [0, 1, 2, 0, 1, 1, 2, 2, 0, 2]  # two blocks of four and a half


def world(num_blocks: int = 64, **options) -> World:
    options = {"block_size": 4, "max_batch_tokens": 64, **options}
    return World(num_blocks=num_blocks, **options)


def computed(plan: StepPlan | None) -> list[int]:
    """Return how many tokens each sequence of a plan computes, in the order of their ids."""
    assert plan is not None
    return [len(p.token_ids) for p in sorted(plan.sequences, key=lambda p: p.sequence_id)]


def usage(w: World, key: int) -> tuple[int, int, int, int]:
    """Return whole blocks, part of a block, exact tail, computed."""
    end = w.told[key].terminal
    assert isinstance(end, Finished)
    u = end.usage
    return u.cached_block_tokens, u.cached_partial_tokens, u.cached_tail_tokens, u.computed_prompt_tokens


# -- sharing ----------------------------------------------------------------------------------------


def test_a_prompt_is_computed_and_then_one_token_per_step():
    w = world()
    w.submit(PROMPT, 3)
    assert [computed(w.step()) for _ in range(3)] == [[10], [1], [1]]
    assert not w.scheduler.has_work
    assert usage(w, 1) == (0, 0, 0, 10)


def test_second_request_in_same_step_shares_pending_blocks():
    w = world()
    w.submit([*PROMPT[:8], 0], 2)
    w.submit([*PROMPT[:8], 1, 1], 2)
    plan = w.step()
    assert computed(plan) == [9, 2]
    assert [p.block_table.tolist() for p in plan.sequences] == [[0, 1, 2], [0, 1, 3]]
    w.finish()
    assert usage(w, 2) == (8, 0, 0, 2)


def test_64_identical_cold_prompts_cost_one_prefill():
    w = world(num_blocks=512)
    for _ in range(64):
        w.submit(PROMPT, 2)
    assert computed(w.step()) == [10]
    assert w.runner.num_tokens_computed == 10
    plan = w.step()  # the first decodes, others draw from its logits: as many as may join in one step
    assert computed(plan) == [1] + [0] * 32
    assert w.runner.num_tokens_computed == 11
    w.finish()
    assert w.runner.num_tokens_computed == 10 + 64
    assert [usage(w, key) for key in (2, 64)] == [(8, 0, 2, 0)] * 2


@pytest.mark.parametrize("length", [1, 4, 7, 16])
def test_identical_cold_prompts_of_any_length_cost_one_prefill(length):
    w = world(num_blocks=512)
    for _ in range(16):
        w.submit([1] * length, 1)
    w.finish()
    assert w.runner.num_tokens_computed == length


def test_identical_cold_prompts_in_chunks_cost_one_prefill():
    w = world(num_blocks=512, max_batch_tokens=16)
    for _ in range(16):
        w.submit([1, 2] * 50, 1)
    w.finish()
    assert w.runner.num_tokens_computed == 100


def test_exact_repeat_needs_no_forward_pass():
    w = world()
    w.submit(PROMPT, 1)
    w.finish()
    w.submit(PROMPT, 1)
    plan = w.step()
    assert computed(plan) == [0]
    assert plan.sequences[0].logits_from == 0
    assert plan.copies == [BlockCopy(2, 3, 2)]
    assert w.runner.num_tokens_computed == 10
    assert usage(w, 2) == (8, 0, 2, 0)


def test_partial_block_is_copied_not_recomputed():
    w = world()
    w.submit(PROMPT, 1)
    w.finish()
    w.submit([*PROMPT[:9], 1, 1], 1)
    plan = w.step()
    assert plan.copies == [BlockCopy(2, 3, 1)]
    assert computed(plan) == [2]
    assert usage(w, 2) == (8, 1, 0, 2)


def test_sequences_that_share_blocks_stand_together_as_a_group():
    w = world(num_blocks=256)
    for last in range(3):
        w.submit([*PROMPT[:8], last], 3)
        w.submit([last, *PROMPT], 3)
    w.step()
    plan = w.step()
    assert plan.groups == [PrefixGroup(0, 3, 0, 2)]
    assert {tuple(p.block_table[:2]) for p in plan.sequences[:3]} == {(0, 1)}
    w.finish()


def test_salts_never_share():
    w = world()
    w.submit(PROMPT, 1, salt="one")
    w.finish()
    w.submit(PROMPT, 1, salt="two")
    w.finish()
    assert usage(w, 2) == (0, 0, 0, 10)
    w.submit(PROMPT, 1, salt="one")
    w.finish()
    assert usage(w, 3) == (8, 0, 2, 0)


# -- samples ----------------------------------------------------------------------------------------


def test_samples_are_held_back_until_their_prompt_is_computed():
    w = world(max_batch_tokens=4)
    w.submit(PROMPT, 2, num_samples=3)
    assert [computed(w.step()) for _ in range(3)] == [[4], [4], [2]]
    assert w.scheduler.stats().num_waiting == 2
    assert computed(w.step()) == [1, 0, 0]
    w.finish()
    assert w.runner.num_tokens_computed == 10 + 3
    w.check_end()


def test_when_the_first_sample_is_cancelled_the_next_one_computes_the_prompt():
    w = world()
    key = w.submit(PROMPT, 2, num_samples=3)
    w.cancel(key, 0)
    assert computed(w.step()) == [10]
    w.finish()
    assert [len(t) for t in w.told[key].tokens] == [0, 2, 2]


@pytest.mark.parametrize("num_samples", [2, 40])
def test_samples_that_may_not_read_recompute_the_prompt_once_and_share_it(num_samples):
    # With many samples the queue was full of those held back, and the first one was never reached.
    w = world(num_blocks=512)
    w.submit(PROMPT, 1)
    w.finish()
    w.submit(PROMPT, 1, num_samples=num_samples, read_prefix=False)
    w.finish(10)
    assert w.runner.num_tokens_computed == 20
    assert usage(w, 2) == (0, 0, 0, 10)


@pytest.mark.parametrize("length", [2, 10])  # less than a block: then the logits are kept at the root
def test_samples_that_leave_nothing_behind_share_among_themselves(length):
    w = world()
    w.submit(PROMPT[:length], 2, num_samples=3, write_prefix=False)
    w.finish()
    assert w.runner.num_tokens_computed == length + 3
    assert w.scheduler.cache.tree.num_nodes == 0
    assert len(w.scheduler.cache.tails) == 0


def test_private_logits_are_nobody_elses():
    # They were: a prompt that spelled the request's key before the rest drew from them.
    w = world()
    w.submit([2], 4, num_samples=2, write_prefix=False)
    w.step()
    w.submit([1, 2], 4)
    w.finish()


def test_without_kv_cache_everything_is_computed_every_step():
    w = world()
    w.submit(PROMPT, 1)
    w.finish()
    w.submit(PROMPT, 3, use_kv_cache=False, num_samples=2)
    assert [computed(w.step()) for _ in range(3)] == [[10, 10], [11, 11], [12, 12]]
    assert usage(w, 2) == (0, 0, 0, 10)
    assert w.scheduler.stats().recomputed_tokens == 2 * (10 + 11)


def test_short_prompts_are_not_cached_below_the_minimum():
    w = world(min_cached_tokens=11)
    w.submit(PROMPT, 1)
    w.finish()
    assert w.scheduler.cache.tree.num_nodes == 0
    w.submit([*PROMPT, 1], 1)
    w.finish()
    assert w.scheduler.cache.tree.num_nodes == 3


# -- budget and fairness ----------------------------------------------------------------------------


def test_a_running_decode_never_stalls_behind_a_long_prefill():
    w = world(max_batch_tokens=8)
    w.submit([1, 1], 10)
    w.step()
    w.submit([2] * 50, 1)
    for _ in range(7):
        assert computed(w.step()) == [1, 7]


def test_a_decode_that_came_later_does_not_stall_either():
    w = world(max_batch_tokens=16)
    w.submit([2] * 100, 1)
    w.step()
    w.submit([1, 1], 10, priority=-1)
    w.step()
    assert [computed(w.step()) for _ in range(4)] == [[15, 1]] * 4


def test_a_short_request_need_not_wait_for_a_long_prefill():
    w = world(max_batch_tokens=16)
    w.submit([2, 0] * 40, 1)
    assert computed(w.step()) == [16]
    short = w.submit([1, 1], 2)
    assert computed(w.step()) == [13, 2]
    assert computed(w.step()) == [15, 1]
    assert w.told[short].terminal is not None
    assert computed(w.step()) == [16]


def test_an_exact_repeat_need_not_wait_for_a_long_prefill():
    w = world(max_batch_tokens=32)
    w.submit([1, 1], 1)
    w.finish()
    w.submit([2, 0] * 80, 1)
    w.step()
    repeat = w.submit([1, 1], 1)
    w.step()
    assert w.told[repeat].terminal is not None


def test_one_prompt_at_a_time_is_computed_in_pieces():
    w = world(num_blocks=256, max_batch_tokens=16)
    for number in range(3):
        w.submit([number, *[0, 1] * 15], 1)
    for _ in range(6):
        plan = w.step()
        assert sum(p.sampling is None for p in plan.sequences) <= 1
    w.finish()


def test_what_is_left_beside_a_long_prefill_goes_to_those_whom_it_suffices():
    w = world(num_blocks=256, max_batch_tokens=16)
    w.submit([2, 0] * 40, 1)
    w.step()
    for prompt in ([1] * 7, [0, 0, 0], [1, 0, 0]):
        w.submit(prompt, 9)
    plan = w.step()
    assert [p.sequence_id for p in plan.sequences if p.sampling is None] == [1]
    assert computed(plan) == [12, 3]


def test_there_are_never_more_running_than_tokens_in_the_budget():
    w = world(num_blocks=256, max_batch_tokens=4)
    for number in range(8):
        w.submit([number % 3, number // 3], 20)
    running = []
    for _ in range(20):
        w.step()
        running.append(w.scheduler.stats().num_running)
    assert max(running) == 4


def test_higher_priority_is_admitted_first():
    w = world(max_running=1)
    w.submit([1, 1], 2)
    w.submit([1, 2], 2, priority=1)
    assert w.step().sequences[0].sequence_id == 2


def test_once_a_request_has_waited_the_bound_nothing_later_is_admitted_before_it():
    w = world(num_blocks=8, waiting_bound_s=1.0)  # 32 tokens
    w.submit([0] * 12, 8)
    w.step()
    large = w.submit([1] * 26, 2)  # does not fit beside it
    early = w.submit([2, 2], 1)
    w.step()
    assert w.told[early].terminal is not None  # passed it, as long as it has not waited too long
    w.clock.advance(1.1)
    late = w.submit([2, 1], 1, priority=5)
    while not w.told[large].admitted:
        w.step()
        assert not w.told[late].admitted or w.told[large].admitted
    w.finish()


def test_whoever_needs_a_prefix_that_is_being_computed_does_not_hold_up_others():
    w = world()
    w.submit(PROMPT, 1)
    w.submit(PROMPT, 1)
    w.submit([2, 2], 1)
    assert [p.sequence_id for p in w.step().sequences] == [1, 3]


def test_the_longest_cached_prefix_goes_first():
    w = world(max_running=1)
    w.submit([0, 1] * 20, 1)
    w.finish()
    w.submit([2, 1] * 20, 1)
    cached = w.submit([*[0, 1] * 19, 2, 2], 1)
    w.clock.advance(0.1)
    w.step()
    assert w.told[cached].admitted


# -- memory -----------------------------------------------------------------------------------------


def test_preempted_sequence_resumes_from_cache():
    w = world(num_blocks=8)  # 32 tokens
    w.submit([0] * 4, 24)
    w.submit([1] * 4, 14)
    w.finish()
    stats = w.scheduler.stats()
    assert stats.preemptions == 1
    assert w.told[2].terminal.timings.num_preemptions == 1
    assert 0 < stats.recomputed_tokens < 4 + 14
    w.check_end()


def test_the_latest_of_the_lowest_priority_is_preempted():
    w = world(num_blocks=6)
    w.submit([0] * 4, 12, priority=1)
    w.submit([1] * 4, 12)
    w.submit([2] * 4, 12)
    preempted = []
    while not preempted:
        plan = w.step()
        preempted = sorted({1, 2, 3} - {p.sequence_id for p in plan.sequences})
    assert preempted == [3]
    w.finish()


def test_pool_of_8_blocks_and_100_streams_all_finish():
    w = world(num_blocks=8, num_logits_slots=2)
    for number in range(100):
        w.submit([number % 3, number % 5 % 3, number % 7 % 3], 1 + number % 20, num_samples=1 + number % 2)
    w.finish()
    assert all(isinstance(t.terminal, Finished) for t in w.told.values())
    w.check_end()


def test_looking_for_room_in_vain_evicts_nothing():
    # It did: the block for a copy was taken, and a cached one evicted for it, before it was clear that
    # the rest would not fit; in every step.
    w = world(num_blocks=12)
    w.submit([*PROMPT, 1, 1], 1)
    w.submit([2, 2, 2, 1], 1)
    w.finish()
    w.submit([0] * 28, 4)  # takes what is free
    w.step()
    w.submit([*PROMPT[:9], 2, 2, *[1] * 20], 1)
    before = w.scheduler.stats().evicted_blocks
    w.step()
    assert w.scheduler.stats().evicted_blocks == before
    assert w.scheduler.stats().num_waiting == 1
    w.finish()


def test_a_request_that_can_never_fit_is_refused_at_once():
    w = world(num_blocks=8)
    key = w.submit([1] * 30, 3)
    assert w.told[key].terminal == Refused(
        key, FailureKind.TOO_LARGE, "prompt and new tokens need 9 KV blocks, the pool has 8"
    )
    fits = w.submit([1] * 30, 2)
    w.finish()
    assert isinstance(w.told[fits].terminal, Finished)


def test_a_full_queue_refuses_and_says_when_to_retry():
    w = world(max_waiting=2)
    w.submit([1], 1)
    assert isinstance(w.told[w.submit([1], 1, num_samples=2)].terminal, Refused)
    w.submit([1], 1)
    end = w.told[w.submit([1], 1)].terminal
    assert end.kind is FailureKind.QUEUE_FULL
    assert end.retry_after_s > 0


# -- ends -------------------------------------------------------------------------------------------


def test_cancel_frees_blocks_within_a_step():
    w = world()
    key = w.submit(PROMPT, 10)
    w.step()
    assert w.scheduler.stats().num_blocks_leased == 3
    w.cancel(key)
    assert w.scheduler.stats().num_blocks_leased == 0
    assert isinstance(w.told[key].terminal, Finished)


def test_cancel_during_a_step_takes_effect_with_its_end():
    w = world()
    key = w.submit(PROMPT, 10)
    w.step(during=lambda: w.cancel(key))
    assert isinstance(w.told[key].terminal, Finished)
    assert w.scheduler.stats().num_blocks_leased == 0


def test_cancelling_one_sample_leaves_the_others():
    w = world()
    key = w.submit(PROMPT, 5, num_samples=2)
    w.step()
    w.step()
    w.cancel(key, 1)
    w.cancel(key, 1)
    w.finish()
    assert [len(t) for t in w.told[key].tokens] == [5, 1]


def test_cancelling_what_nobody_knows_does_nothing():
    w = world()
    w.scheduler.cancel(Cancel(7))
    assert w.scheduler.drain_events() == []


def test_a_deadline_that_passes_in_the_queue_costs_no_prefill():
    w = world(max_running=1)
    w.submit([1], 4)
    late = w.submit(PROMPT, 4, deadline_s=0.5)
    w.step()
    w.clock.advance(0.5)
    w.finish()
    assert w.told[late].terminal == Refused(late, FailureKind.DEADLINE, "the deadline passed")
    assert w.runner.num_tokens_computed == 1 + 3


def test_a_deadline_that_passes_while_running_frees_everything():
    w = world()
    key = w.submit(PROMPT, 10, deadline_s=0.5, num_samples=2)
    w.step()
    w.clock.advance(0.5)
    w.step()
    assert w.told[key].terminal == Failed(key, FailureKind.DEADLINE, "the deadline passed")
    w.check_end()


def test_a_numerical_failure_ends_its_request_and_nobody_elses():
    w = world(fails=lambda part: part.sequence_id == 1)
    bad = w.submit([*PROMPT[:8], 1], 3)
    good = w.submit([*PROMPT[:8], 2], 3)
    w.step()
    assert w.told[bad].terminal == Failed(bad, FailureKind.NUMERICAL, "not finite")
    w.finish()
    assert isinstance(w.told[good].terminal, Finished)
    w.check_end()


def test_logits_that_are_not_finite_are_not_kept_for_the_next():
    # They were: every repeat of the prompt failed from then on.
    broken = [True]
    w = world(fails=lambda part: broken[0])
    w.submit(PROMPT[:8], 1)
    w.submit([*PROMPT[:8], 1], 1)
    w.step()
    broken[0] = False
    key = w.submit(PROMPT[:8], 1)
    w.finish()
    assert usage(w, key) == (0, 0, 0, 8)


def test_a_crash_fails_the_requests_of_its_step_and_nobody_elses():
    w = world(max_running=2)
    for number in range(3):
        w.submit([number, *PROMPT], 2)
    w.step(crash=True)
    assert [type(w.told[key].terminal) for key in (1, 2, 3)] == [Failed, Failed, type(None)]
    assert w.scheduler.stats().num_blocks_cached == 0
    w.finish()
    assert isinstance(w.told[3].terminal, Finished)
    w.check_end()


def test_a_crash_takes_samples_along_that_were_not_in_its_step():
    w = world(max_running=1)
    key = w.submit(PROMPT, 4, num_samples=3)
    w.step()
    w.step(crash=True)
    assert isinstance(w.told[key].terminal, Failed)
    w.check_end()


def test_draining_refuses_what_is_new_and_finishes_what_is_here():
    w = world()
    old = w.submit(PROMPT, 2)
    w.scheduler.refuse_new()
    new = w.submit(PROMPT, 2)
    assert w.told[new].terminal.kind is FailureKind.DRAINING
    w.finish()
    assert isinstance(w.told[old].terminal, Finished)


def test_lifetime_counts_from_insertion():
    w = world()
    w.submit(PROMPT, 1, lifetime_s=10.0)
    w.finish()
    w.clock.advance(9.0)
    w.submit(PROMPT, 1, lifetime_s=10.0)
    w.finish()
    assert usage(w, 2) == (8, 0, 2, 0)
    w.clock.advance(1.0)
    w.submit(PROMPT, 1)
    w.finish()
    assert usage(w, 3) == (0, 0, 0, 10)


def test_tokens_that_would_end_too_early_are_suppressed():
    w = world()
    spec = GenerateSpec(
        token_ids=[1], max_new_tokens=3, min_new_tokens=2, eos_token_ids=(9,), stop_token_ids=(8, 9)
    )
    w.scheduler.submit(Submit(1, spec))
    suppressed = []
    for _ in range(3):
        plan = w.scheduler.plan()
        suppressed.append(plan.sequences[0].sampling.suppressed_token_ids)
        w.scheduler.apply(plan, w.runner.run(plan))
    assert suppressed == [(8, 9), (8, 9), ()]


def test_history_is_sent_only_to_those_who_need_it_and_grows():
    w = world()
    w.submit([1, 2], 3, repetition_penalty=1.5)
    w.submit([1, 1], 3)
    histories = []
    for _ in range(3):
        plan = w.step()
        with_history, without = sorted(plan.sequences, key=lambda p: p.sequence_id)
        histories.append(with_history.history)
        assert without.history is None
    assert histories[-1] == [1, 2, *w.told[1].tokens[0]]


def test_admission_is_said_before_the_first_token():
    w = world()
    w.scheduler.submit(Submit(5, GenerateSpec(token_ids=PROMPT, max_new_tokens=1)))
    plan = w.scheduler.plan()
    assert w.scheduler.drain_events() == [Admitted(5, 0)]
    w.scheduler.apply(plan, w.runner.run(plan))
    w.scheduler.drain_events()


def test_what_has_ended_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        w = world(num_blocks=12, num_logits_slots=2)
        for number in range(300):
            w.submit([number % 3, number // 3 % 3, 1], 3, num_samples=1 + number % 3, lifetime_s=0.05)
            w.step(crash=number % 50 == 7)
            w.clock.advance(0.01)
        w.finish()
        w.runner.plans.clear()
        assert gc.collect() < 50
    finally:
        gc.enable()
