"""The scheduler with everything random, event by event, against tokens computed without any cache."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.campaigns import cases
from tests.property.engine_world import VOCABULARY, World

stems = st.sampled_from([[0, 1, 2, 0, 1, 2, 0, 0], [0, 1, 2, 0, 1], [2] * 12, [1]])
endings = st.lists(st.integers(0, VOCABULARY - 1), max_size=5)


class SchedulerMachine(RuleBasedStateMachine):
    """Submit, cancel, step, crash, fail, wait, clear. ``World`` checks every event."""

    @initialize(
        num_blocks=st.integers(8, 40),
        block_size=st.integers(1, 5),
        num_logits_slots=st.integers(0, 4),
        max_batch_tokens=st.integers(1, 20),
        max_running=st.integers(1, 6),
        max_waiting=st.sampled_from([2, 50]),
        waiting_bound_s=st.sampled_from([0.05, 30.0]),
        min_cached_tokens=st.sampled_from([0, 6]),
        default_lifetime_s=st.sampled_from([None, 0.2]),
    )
    def start(self, **options):
        self.broken = False
        self.world = World(fails=lambda part: self.broken and part.sequence_id % 2 == 0, **options)

    @rule(
        stem=stems,
        ending=endings,
        max_new_tokens=st.integers(1, 8),
        fields=st.fixed_dictionaries(
            {
                "num_samples": st.sampled_from([1, 1, 2, 3]),
                "seed": st.integers(0, 1),
                "priority": st.integers(-1, 1),
                "salt": st.sampled_from(["", "other"]),
                "use_kv_cache": st.sampled_from([True, True, True, False]),
                "read_prefix": st.sampled_from([True, True, False]),
                "write_prefix": st.sampled_from([True, True, False]),
                "lifetime_s": st.sampled_from([None, 0.0, 0.1]),
                "eos_token_ids": st.sampled_from([(), (0,)]),
                "deadline_s": st.sampled_from([None, None, 0.05, 0.5]),
            }
        ),
    )
    def submit(self, stem, ending, max_new_tokens, fields):
        room = self.world.runner.num_blocks * self.world.runner.block_size
        self.world.submit([*stem, *ending][: max(1, room - max_new_tokens)], max_new_tokens, **fields)

    @precondition(lambda self: self.world.told)
    @rule(data=st.data(), sample=st.sampled_from([None, None, 0, 1]))
    def cancel(self, data, sample):
        self.world.cancel(data.draw(st.sampled_from(sorted(self.world.told))), sample)

    @rule(times=st.integers(1, 4))
    def step(self, times):
        for _ in range(times):
            self.world.step()

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule()
    def step_that_crashes(self):
        self.world.step(crash=True)

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule()
    def step_with_logits_that_are_not_finite(self):
        self.broken = True
        self.world.step()
        self.broken = False

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule(data=st.data())
    def step_with_a_cancellation_meanwhile(self, data):
        key = data.draw(st.sampled_from(sorted(self.world.told)))
        self.world.step(during=lambda: self.world.cancel(key))

    @rule(seconds=st.sampled_from([0.01, 0.06, 0.3]))
    def wait(self, seconds):
        self.world.clock.advance(seconds)

    @rule()
    def clear(self):
        self.world.scheduler.cache.clear()

    @invariant()
    def integrity(self):
        if hasattr(self, "world"):
            self.world.scheduler.check_integrity()

    def teardown(self):
        if hasattr(self, "world"):
            self.world.finish()
            self.world.check_end()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=cases(150, full=400), stateful_step_count=40)
