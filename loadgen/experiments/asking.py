"""One call at a time, through the public client: its time to first token, and what the cache did for it."""

from __future__ import annotations

import random
import time
from types import TracebackType
from typing import Self

import msgspec

import kvserve
from loadgen.experiments.processes import ProcessFailed
from loadgen.workloads import FIRST_TOKEN

__all__ = ["Answer", "Asker", "draw_tokens"]

POLL_S = 0.02


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One call as it was seen from outside; ``restore`` fields are None where no tier had anything."""

    first_token_s: float
    prompt_tokens: int
    cached_tokens: int
    """On the device already."""
    restored_tokens: int
    computed_tokens: int
    decision: str | None = None
    expected_fetch_s: float | None = None
    expected_recompute_s: float | None = None
    fetch_s: float | None = None


def draw_tokens(count: int, *, vocab_size: int, seed: str) -> list[int]:
    """Return random token ids; equal seeds give equal tokens, others share nothing but chance."""
    return random.Random(seed).choices(range(FIRST_TOKEN, vocab_size), k=count)


class Asker:
    """A client of one server, for as long as the block lasts."""

    def __init__(self, target: str, *, timeout_s: float) -> None:
        self._client = kvserve.Client(target)
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        self._client.wait_ready()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    @property
    def cache(self) -> kvserve.Cache:
        """Return the client's view of the cache."""
        return self._client.cache

    def ask(self, token_ids: list[int], *, max_new_tokens: int = 1) -> Answer:
        """Ask and read to the end. Raises ``kvserve.Error``."""
        started, first_token_s = time.perf_counter(), None
        with self._client.generate(
            token_ids=token_ids,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            ignore_eos=True,
            timeout_s=self._timeout_s,
        ) as stream:
            for event in stream:
                if event.token_ids and first_token_s is None:
                    first_token_s = time.perf_counter() - started
        if first_token_s is None:
            raise ProcessFailed("an answer without a token")
        usage, restore = stream.result.usage, stream.result.timings.restore
        on_device = usage.cached_block_tokens + usage.cached_partial_tokens + usage.cached_tail_tokens
        return Answer(
            first_token_s=first_token_s,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=on_device,
            restored_tokens=usage.restored_tokens,
            computed_tokens=usage.computed_prompt_tokens,
            decision=None if restore is None else restore.decision.value,
            expected_fetch_s=None if restore is None else restore.expected_fetch_s,
            expected_recompute_s=None if restore is None else restore.expected_recompute_s,
            fetch_s=None if restore is None else restore.fetch_s,
        )

    def clear_device(self) -> None:
        """Evict everything from the device and leave the tiers as they are. Raises ``ProcessFailed``."""
        until = time.monotonic() + self._timeout_s
        # A call that has just ended may hold its blocks a moment longer.
        while self.cache.clear(in_use="skip", tiers=False).kept_blocks:
            if time.monotonic() > until:
                raise ProcessFailed("blocks stay in use though nobody asks for anything")
            time.sleep(POLL_S)

    def wait_for_tier(self, tier: str, prefix: list[int]) -> None:
        """Return when a tier has every full block of ``prefix``, whatever the device has.

        Raises ``ProcessFailed`` if it has not got them in time. The device must be clear: what it has, a
        lookup does not look for in tiers.
        """
        num_blocks = len(prefix) // self.cache.stats().block_size
        until = time.monotonic() + self._timeout_s
        while (found := self._blocks_in(tier, prefix)) < num_blocks:
            if time.monotonic() > until:
                raise ProcessFailed(f"{tier} has {found} of {num_blocks} blocks of a prefix")
            time.sleep(POLL_S)

    def store_in_tier(self, tier: str, prefix: list[int]) -> None:
        """Ask for ``prefix`` until a tier has every full block of it; the device is clear afterwards.

        Tiers are written behind, and what is cleared before that is lost to them. Raises ``ProcessFailed``.
        """
        num_blocks = len(prefix) // self.cache.stats().block_size
        until = time.monotonic() + self._timeout_s
        pause_s = POLL_S
        while True:
            self.clear_device()
            found = self._blocks_in(tier, prefix)
            if found >= num_blocks:
                return
            if time.monotonic() > until:
                raise ProcessFailed(f"{tier} has {found} of {num_blocks} blocks of a prefix")
            self.ask(prefix)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    def _blocks_in(self, tier: str, prefix: list[int]) -> int:
        return sum(entry.blocks for entry in self.cache.lookup(prefix).tiers if entry.tier == tier)
