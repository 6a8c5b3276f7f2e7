"""A trial: what other policies would have hit on the traffic that is being served. A/B without risk.

Each policy runs a ghost cache (``kvcore.ghost``) on a sample of the live requests; so does a ghost of the
live policy, so that like is compared with like. Three things keep it cheap:

- **Sampling by prefix family**: a request is in the sample if the hash of its namespace and its first
  tokens says so. Whole families are in or out, and the ghosts' capacity is the share's part of the
  cache's, so hit rates estimate those of the whole.
- **Coarse entries**: one ghost entry stands for several blocks.
- **A budget by measurement**: the engine says how long each step took; the trial works off its requests
  only while it has spent less than ``max_share`` of that. If it falls behind, requests are skipped and
  counted; if it keeps falling behind, it starts again with half the share.

One thread, no clock of its own: ``timer`` measures, ``now`` is the cache's time.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvcore.ghost import GhostCache
from kvcore.policies import ALIASES, make_policy

__all__ = ["Trial", "TrialResult"]

ENTRY_TOKENS = 128
"""About how many tokens one ghost entry stands for."""
FIRST_ENTRIES = 4096
"""The share begins such that a ghost has at most so many entries."""
MIN_ENTRIES = 64
"""Ghosts smaller than this say nothing; the share is not lowered below."""
MAX_WAITING = 64
MAX_SKIPPED = 0.2
"""The part of the sample that may be skipped before the share is halved."""
JUDGE_AFTER = 100
"""Sampled requests after which it is judged whether the share fits the budget."""
HASH_RANGE = 1 << 32


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What one policy would have hit on the sample. Rates are percent, shares from 0 to 1."""

    policy: str
    is_live: bool
    """Say whether this is the ghost of the policy that serves."""
    token_hit_rate: float
    request_hit_rate: float
    num_requests: int
    num_tokens: int
    sampled_share: float
    """Of the prefix families."""
    num_skipped: int
    """Requests that the budget had no room for."""
    cost_share: float
    """Of the steps' time that the whole trial, all policies together, has taken."""


@dataclass(frozen=True, slots=True)
class _Request:
    namespace: int
    blocks: list[int]
    num_tokens: int
    num_output_tokens: int
    now: float


class _Contestant:
    """A ghost and its counts."""

    def __init__(self, policy: str, *, is_live: bool, capacity: int, entry_tokens: int) -> None:
        judge = make_policy(policy, capacity_blocks=capacity, block_tokens=entry_tokens)
        self.policy = judge.name
        self.is_live = is_live
        self.ghost = GhostCache(judge, capacity_blocks=capacity)
        self.num_hits = 0
        self.hit_tokens = 0


class Trial:
    """Run ghosts of several policies on sampled requests. See the module's text."""

    def __init__(
        self,
        policies: Sequence[str],
        *,
        live_policy: str,
        capacity_blocks: int,
        block_size: int,
        timer: Callable[[], float],
        max_share: float = 0.02,
    ) -> None:
        """``ValueError`` for an unknown policy, or limits out of range."""
        if capacity_blocks < 1 or block_size < 1:
            raise ValueError("capacity_blocks and block_size must be at least 1")
        if not 0 < max_share <= 1:
            raise ValueError("max_share must be above 0 and at most 1")
        names = [ALIASES.get(name, name) for name in (live_policy, *policies)]
        self._names = list(dict.fromkeys(names))
        blocks_per_entry = max(1, min(ENTRY_TOKENS // block_size, capacity_blocks // MIN_ENTRIES))
        self._entry_tokens = blocks_per_entry * block_size
        self._num_entries = max(1, capacity_blocks // blocks_per_entry)
        self._timer = timer
        self._max_share = max_share
        self._waiting: deque[_Request] = deque()
        self.spent_s = 0.0
        self.steps_s = 0.0
        self._share = min(1.0, FIRST_ENTRIES / self._num_entries)
        self._begin()

    def __repr__(self) -> str:
        return f"Trial({', '.join(self._names)}: {self.num_requests} requests, share {self._share:.3f})"

    def observe(self, namespace: int, tokens: array[int], num_output_tokens: int, now: float) -> None:
        """Note a request that has ended: its namespace's hash, its prompt, how much output it had.

        Cheap if it is not in the sample. Otherwise it waits until a step's budget has room for it.
        """
        if len(self._waiting) >= MAX_WAITING and self.spent_s > self.steps_s * self._max_share:
            self.num_skipped += 1  # no time even to see whether it is in the sample
            return
        began = self._timer()
        size = self._entry_tokens
        first = hash((namespace, tokens[:size].tobytes()))
        if (first * 0x9E3779B1 >> 7) % HASH_RANGE < self._share * HASH_RANGE:
            packed = memoryview(tokens.tobytes())
            stride = size * tokens.itemsize
            blocks = [
                hash(bytes(packed[start : start + stride]))
                for start in range(0, len(packed) - stride + 1, stride)
            ]
            if len(self._waiting) >= MAX_WAITING:
                self._waiting.popleft()
                self.num_skipped += 1
            self._waiting.append(_Request(namespace, blocks, len(tokens), num_output_tokens, now))
        self.spent_s += self._timer() - began

    def step_took(self, seconds: float) -> None:
        """A step has ended: work off waiting requests within the budget that all steps so far have earned."""
        self.steps_s += max(0.0, seconds)
        budget_s = self.steps_s * self._max_share
        while self._waiting and self.spent_s + self._typical_s <= budget_s:
            began = self._timer()
            self._replay(self._waiting.popleft())
            took_s = self._timer() - began
            self.spent_s += took_s
            self._typical_s += (took_s - self._typical_s) / min(16, self.num_requests)
        judged = self.num_requests + self.num_skipped
        is_behind = judged >= JUDGE_AFTER and self.num_skipped > MAX_SKIPPED * judged
        if is_behind and self._num_entries * self._share / 2 >= MIN_ENTRIES:
            self._share /= 2
            self._begin()

    def report(self) -> list[TrialResult]:
        """Return the results so far, the live policy's ghost first."""
        return [
            TrialResult(
                policy=one.policy,
                is_live=one.is_live,
                token_hit_rate=100.0 * one.hit_tokens / max(1, self.num_tokens),
                request_hit_rate=100.0 * one.num_hits / max(1, self.num_requests),
                num_requests=self.num_requests,
                num_tokens=self.num_tokens,
                sampled_share=self._share,
                num_skipped=self.num_skipped,
                cost_share=self.spent_s / self.steps_s if self.steps_s else 0.0,
            )
            for one in self._contestants
        ]

    def _begin(self) -> None:
        """Start the ghosts and the counts anew, for the present share."""
        capacity = max(1, round(self._num_entries * self._share))
        self._contestants = [
            _Contestant(name, is_live=place == 0, capacity=capacity, entry_tokens=self._entry_tokens)
            for place, name in enumerate(self._names)
        ]
        self._waiting.clear()
        self._typical_s = 0.0
        self.num_requests = 0
        self.num_tokens = 0
        self.num_skipped = 0

    def _replay(self, request: _Request) -> None:
        self.num_requests += 1
        self.num_tokens += request.num_tokens
        for one in self._contestants:
            num_matched = one.ghost.request(
                request.namespace,
                request.blocks,
                request.now,
                num_tokens=request.num_tokens,
                num_output_tokens=request.num_output_tokens,
            )
            one.num_hits += num_matched > 0
            one.hit_tokens += min(num_matched * self._entry_tokens, request.num_tokens)
