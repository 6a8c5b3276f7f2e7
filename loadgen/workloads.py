"""What is asked: conversations of token ids, made from a seed.

A request is a conversation of one turn. In a longer one every turn's prompt is everything before it, answers
included, and the turn's own tokens. Token ids are drawn from ``[FIRST_TOKEN, vocab_size)``, so that a
tokenizer's special tokens, which usually come first, stay out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = [
    "FIRST_TOKEN",
    "Conversation",
    "Turn",
    "exact_repeats",
    "sessions",
    "shared_prefix",
    "unique_prompts",
]

FIRST_TOKEN = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """What one request adds to the conversation, and how many tokens it asks for."""

    token_ids: tuple[int, ...]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that follow one another. ``group`` names those that share a prefix."""

    turns: tuple[Turn, ...]
    group: int = 0
    think_s: float = 0.0
    """Pause between an answer and the next turn."""


def _drawer(rng: random.Random, vocab_size: int) -> Callable[[int], tuple[int, ...]]:
    if vocab_size <= FIRST_TOKEN:
        raise ValueError(f"vocab_size must be over {FIRST_TOKEN}, not {vocab_size}")
    return lambda count: tuple(rng.choices(range(FIRST_TOKEN, vocab_size), k=count))


def shared_prefix(
    *,
    num_groups: int,
    requests_per_group: int,
    shared_tokens: int,
    own_tokens: int,
    new_tokens: int,
    vocab_size: int,
    seed: int = 0,
) -> list[Conversation]:
    """Return groups of requests that begin alike, in shuffled order."""
    rng = random.Random(seed)
    draw = _drawer(rng, vocab_size)
    conversations: list[Conversation] = []
    for group in range(num_groups):
        prefix = draw(shared_tokens)
        conversations += [
            Conversation((Turn(prefix + draw(own_tokens), new_tokens),), group)
            for _ in range(requests_per_group)
        ]
    rng.shuffle(conversations)
    return conversations


def unique_prompts(
    *, num_requests: int, prompt_tokens: int, new_tokens: int, vocab_size: int, seed: int = 0
) -> list[Conversation]:
    """Return requests that share nothing but chance."""
    draw = _drawer(random.Random(seed), vocab_size)
    return [Conversation((Turn(draw(prompt_tokens), new_tokens),), group) for group in range(num_requests)]


def exact_repeats(
    *,
    num_prompts: int,
    repeats: int,
    prompt_lengths: Sequence[int],
    new_tokens: int,
    vocab_size: int,
    seed: int = 0,
) -> list[Conversation]:
    """Return prompts, lengths in rotation, each ``1 + repeats`` times; first all of them once, then again."""
    draw = _drawer(random.Random(seed), vocab_size)
    prompts = [draw(prompt_lengths[index % len(prompt_lengths)]) for index in range(num_prompts)]
    return [
        Conversation((Turn(prompt, new_tokens),), group)
        for _ in range(1 + repeats)
        for group, prompt in enumerate(prompts)
    ]


def sessions(
    *,
    num_sessions: int,
    num_turns: int,
    system_tokens: int,
    turn_tokens: int,
    new_tokens: int,
    vocab_size: int,
    think_s: float = 0.0,
    seed: int = 0,
) -> list[Conversation]:
    """Return conversations of several turns that all begin with the same system prompt."""
    draw = _drawer(random.Random(seed), vocab_size)
    system = draw(system_tokens)
    return [
        Conversation(
            tuple(
                Turn((system if turn == 0 else ()) + draw(turn_tokens), new_tokens)
                for turn in range(num_turns)
            ),
            group=0,
            think_s=think_s,
        )
        for _ in range(num_sessions)
    ]
