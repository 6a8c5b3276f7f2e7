"""Find the first of several stop strings in text that arrives in pieces.

An Aho-Corasick automaton: its state after each character is the longest suffix of the text so far that
begins some stop string. That suffix, and nothing more, has to be held back; it is shorter than the longest
stop string, so the hold is bounded. Constant work per character, whatever the strings and the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["StopMatch", "StopMatcher", "StopStrings"]


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string, complete. ``text`` is what stands before it and was not released yet."""

    text: str
    stop: str


class StopStrings:
    """The automaton of one request's stop strings; shared by its samples, never changed."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.depth: list[int] = [0]
        self.fail: list[int] = [0]
        self.stop_at: list[str | None] = [None]
        """The longest stop string that ends in a state."""
        for stop in stops:
            state = 0
            for character in stop:
                following = self.next[state].get(character)
                if following is None:
                    following = len(self.next)
                    self.next[state][character] = following
                    self.next.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.fail.append(0)
                    self.stop_at.append(None)
                state = following
            self.stop_at[state] = stop
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self.next[state].items():
                self.fail[following] = self.step(self.fail[state], character)
                if self.stop_at[following] is None:
                    self.stop_at[following] = self.stop_at[self.fail[following]]
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        """Return the state after one more character."""
        while True:
            following = self.next[state].get(character)
            if following is not None:
                return following
            if state == 0:
                return 0
            state = self.fail[state]


class StopMatcher:
    """Follows one sample's text."""

    __slots__ = ("_held", "_state", "_strings")

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """Take more text; return what may be released, or the match that it completes.

        The earliest end wins; of strings that end together, the longest. What follows a match in ``text`` is
        lost.
        """
        return self._push(text, matching=True)

    def push_unmatched(self, text: str) -> str:
        """Take text in which a stop string does not count, but one may begin that does later."""
        released = self._push(text, matching=False)
        assert isinstance(released, str)
        return released

    def release(self) -> str:
        """Return the text held back: no more will come."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _push(self, text: str, *, matching: bool) -> str | StopMatch:
        strings = self._strings
        state = self._state
        for index, character in enumerate(text):
            state = strings.step(state, character)
            stop = strings.stop_at[state]
            if stop is not None and matching:
                so_far = self._held + text[: index + 1]
                self._held, self._state = "", 0
                return StopMatch(so_far[: len(so_far) - len(stop)], stop)
        self._state = state
        pending = self._held + text
        cut = len(pending) - strings.depth[state]
        self._held = pending[cut:]
        return pending[:cut]
