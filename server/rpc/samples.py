"""One sample of a call: engine tokens in, text and what a client is told out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.messages import Finish, Tokens
from server.rpc.detokenizer import Detokenizer
from server.rpc.stop_strings import StopMatch, StopMatcher

__all__ = ["Sample", "SampleDelta"]


@dataclass(slots=True)
class SampleDelta:
    """News of one sample. ``logprobs`` and ``top_logprobs`` run parallel to ``token_ids`` or are None."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish: Finish | None = None
    stop_reason: str = ""

    def merge(self, later: SampleDelta) -> None:
        """Append what came later."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        if later.top_logprobs is not None:
            self.top_logprobs = (self.top_logprobs or []) + later.top_logprobs
        if later.finish is not None:
            self.finish = later.finish
            self.stop_reason = later.stop_reason


class Sample:
    """Follows one sample until it ends.

    The token that completes a stop string, an end-of-sequence token and a stop token are among
    ``token_ids``, their text is not part of ``text``. What the engine drew after a stop string, before it
    heard of it, is dropped.
    """

    __slots__ = ("_detokenizer", "_matcher", "_min_new_tokens", "_text_of", "ended", "index", "num_tokens")

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        *,
        matcher: StopMatcher | None,
        min_new_tokens: int,
        text_of: Callable[[int], str],
    ) -> None:
        self.index = index
        self.ended = False
        self.num_tokens = 0
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._min_new_tokens = min_new_tokens
        self._text_of = text_of

    def push(self, tokens: Tokens) -> SampleDelta | None:
        """Take the engine's news; return the client's. None once the sample has ended."""
        if self.ended:
            return None
        token_ids = tokens.token_ids
        ends_by_token = tokens.finish in (Finish.EOS, Finish.STOP_TOKEN) and len(token_ids) > 0
        visible = token_ids[:-1] if ends_by_token else token_ids
        if self._matcher is None:
            text = self._detokenizer.push(visible)
        else:
            pieces: list[str] = []
            for position, token_id in enumerate(visible):
                match = self._match(
                    self._detokenizer.push((token_id,)), self.num_tokens + position + 1, pieces
                )
                if match is not None:
                    return self._end_at(match, tokens, num_kept=position + 1, pieces=pieces)
            text = "".join(pieces)
        self.num_tokens += len(token_ids)
        delta = SampleDelta(self.index, text, token_ids, tokens.logprobs, tokens.top_logprobs, tokens.finish)
        if tokens.finish is None:
            return delta
        self.ended = True
        rest = self._detokenizer.flush()
        if self._matcher is not None:
            pieces = []
            match = self._match(rest, self.num_tokens, pieces) if rest else None
            if match is not None:  # a broken last character completed one
                delta.text += "".join(pieces) + match.text
                delta.finish, delta.stop_reason = Finish.STOP_STRING, match.stop
                return delta
            rest = "".join(pieces) + self._matcher.release()
        delta.text += rest
        if tokens.finish is Finish.STOP_TOKEN and token_ids:
            delta.stop_reason = self._text_of(token_ids[-1])
        return delta

    def _match(self, text: str, num_tokens: int, pieces: list[str]) -> StopMatch | None:
        """Feed the matcher; collect what it releases into ``pieces``."""
        assert self._matcher is not None
        if not text:
            return None
        if num_tokens < self._min_new_tokens:
            pieces.append(self._matcher.push_unmatched(text))
            return None
        found = self._matcher.push(text)
        if isinstance(found, StopMatch):
            return found
        pieces.append(found)
        return None

    def _end_at(self, match: StopMatch, tokens: Tokens, *, num_kept: int, pieces: list[str]) -> SampleDelta:
        self.ended = True
        self.num_tokens += num_kept
        return SampleDelta(
            self.index,
            "".join(pieces) + match.text,
            tokens.token_ids[:num_kept],
            None if tokens.logprobs is None else tokens.logprobs[:num_kept],
            None if tokens.top_logprobs is None else tokens.top_logprobs[:num_kept],
            Finish.STOP_STRING,
            match.stop,
        )
