"""Rows that drift: entities with a fixed part, a part that jumps now and then, and a part that wanders.

::

    features   0 .. 15   fixed for each entity: who it is
              16 .. 23   each jumps to a new value at random times: what was last booked
              24 .. 31   wander around their mean (Ornstein-Uhlenbeck): how it is doing

Requests come at random (Poisson) for entities by their popularity (the n-th in 1/n of the cases). The same
seed gives the same rows at the same times, whatever is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from server.predict.reuse.predictor import Floats, Singles

__all__ = ["DriftSpec", "Stream", "make_stream"]

NUM_FIXED, NUM_JUMPING, NUM_WANDERING = 16, 8, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftSpec:
    """How fast what changes. Times in seconds."""

    num_requests: int = 12_000
    num_entities: int = 300
    requests_per_s: float = 50.0
    jump_every_s: float = 300.0
    """Mean time between jumps of one feature."""
    wander_s: float = 120.0
    """After so long the wandering part has forgotten where it was, to 37%."""
    wander_size: float = 0.3
    """Its standard deviation; features are about 1."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """Requests in the order of their times."""

    times_s: Floats
    rows: Singles
    """[n, 32]."""


def make_stream(spec: DriftSpec) -> Stream:
    """Draw it."""
    draw = np.random.default_rng(spec.seed)
    count, many = spec.num_requests, spec.num_entities
    times = np.cumsum(draw.exponential(1.0 / spec.requests_per_s, count))
    shares = 1.0 / np.arange(1, many + 1)
    who = draw.choice(many, count, p=shares / shares.sum())
    fixed = draw.standard_normal((many, NUM_FIXED))
    jumping = draw.standard_normal((many, NUM_JUMPING))
    wandering = spec.wander_size * draw.standard_normal((many, NUM_WANDERING))
    seen = np.zeros(many)
    rows = np.empty((count, NUM_FIXED + NUM_JUMPING + NUM_WANDERING), np.float32)
    for number, (now, entity) in enumerate(zip(times, who, strict=True)):
        passed = now - seen[entity]
        seen[entity] = now
        stays = draw.random(NUM_JUMPING) < np.exp(-passed / spec.jump_every_s)
        jumping[entity] = np.where(stays, jumping[entity], draw.standard_normal(NUM_JUMPING))
        keeps = np.exp(-passed / spec.wander_s)
        noise = spec.wander_size * np.sqrt(1.0 - keeps * keeps) * draw.standard_normal(NUM_WANDERING)
        wandering[entity] = keeps * wandering[entity] + noise
        rows[number] = np.concatenate([fixed[entity], jumping[entity], wandering[entity]])
    return Stream(times, rows)
