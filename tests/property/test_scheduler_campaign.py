"""A few hundred seeded campaigns over everything at once: cheap, and the first to find a new mistake."""

from __future__ import annotations

import random

import pytest

from tests.property.engine_world import VOCABULARY, World


def run_campaign(seed: int) -> World:
    rng = random.Random(seed)
    is_broken = [False]
    world = World(
        num_blocks=rng.choice([8, 12, 20, 60, 200]),
        block_size=rng.choice([1, 2, 3, 4, 8, 16]),
        num_logits_slots=rng.choice([0, 1, 2, 8, 50]),
        max_batch_tokens=rng.choice([1, 2, 5, 16, 64]),
        max_running=rng.choice([1, 3, 16]),
        max_waiting=rng.choice([3, 100]),
        waiting_bound_s=rng.choice([0.01, 0.2, 30.0]),
        min_cached_tokens=rng.choice([0, 0, 6]),
        default_lifetime_s=rng.choice([None, None, 0.02, 0.5]),
        fails=lambda part: is_broken[0] and part.sequence_id % 3 == 0,
    )
    longest = world.runner.num_blocks * world.runner.block_size
    stems = [[rng.randrange(VOCABULARY) for _ in range(rng.randrange(1, 40))] for _ in range(3)]
    keys: list[int] = []
    for _ in range(rng.randrange(5, 40)):
        for _ in range(rng.randrange(4)):
            stem = rng.choice(stems)
            own = [rng.randrange(VOCABULARY) for _ in range(rng.choice([0, 0, 1, 3, 20]))]
            prompt = (stem[: rng.randrange(1, len(stem) + 1)] if rng.random() < 0.3 else stem) + own
            key = world.submit(
                prompt[: max(1, longest - 2)],
                rng.choice([1, 2, 5, 20]),
                num_samples=rng.choice([1, 1, 1, 2, 3]),
                seed=rng.randrange(2),
                priority=rng.choice([0, 0, 0, 1, -1]),
                salt=rng.choice(["", "", "other"]),
                use_kv_cache=rng.random() > 0.1,
                read_prefix=rng.random() > 0.1,
                write_prefix=rng.random() > 0.15,
                lifetime_s=rng.choice([None, None, 0.0, 0.01, 1.0]),
                eos_token_ids=rng.choice([(), (), (0,)]),
                deadline_s=rng.choice([None, None, None, 0.0, 0.01, 0.1]),
            )
            keys.append(key)
        if keys and rng.random() < 0.2:
            world.cancel(rng.choice(keys), rng.choice([None, 0, 1]) if rng.random() < 0.5 else None)
        is_broken[0] = rng.random() < 0.05
        late = rng.choice(keys) if keys and rng.random() < 0.05 else None
        if world.scheduler.has_work or rng.random() < 0.1:
            during = None if late is None else (lambda key=late: world.cancel(key))
            world.step(crash=rng.random() < 0.03, during=during)
        if rng.random() < 0.02:
            world.scheduler.cache.clear()
        world.clock.advance(rng.choice([0.0, 0.001, 0.01, 0.1]))
    is_broken[0] = False
    world.finish()
    world.check_end()
    return world


@pytest.mark.parametrize("decade", range(20))
def test_whatever_happens_the_tokens_are_right_and_everything_comes_back(decade):
    for seed in range(decade * 10, decade * 10 + 10):
        try:
            run_campaign(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
