"""Stop strings in text that comes in pieces, against a search in the whole text."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.messages import Finish, Tokens
from server.rpc.detokenizer import detokenizer_factory
from server.rpc.samples import Sample
from server.rpc.stop_strings import StopMatch, StopMatcher, StopStrings
from tests.campaigns import cases
from tests.rpc.harness import TOKENIZER

letters = st.text("ab", min_size=1, max_size=6)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """Return where the stop string that ends first (and of those, the longest) begins."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return None
    end, _, stop = min(ends)
    return end - len(stop), stop


@settings(max_examples=cases(200, full=1000), deadline=None)
@given(st.lists(letters, min_size=1, max_size=5), st.lists(st.text("abc", max_size=5), max_size=12))
def test_released_text_is_what_stands_before_the_first_stop(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    released, match = "", None
    so_far = ""
    for piece in pieces:
        so_far += piece
        found = matcher.push(piece)
        if isinstance(found, StopMatch):
            released, match = released + found.text, found.stop
            break
        released += found
        # Nothing that could still become a stop string has been given away, and no more is held than that.
        held = so_far[len(released) :]
        assert so_far.startswith(released)
        assert held == max(
            (
                so_far[-size:]
                for size in range(1, 7)
                if size <= len(so_far) and any(s.startswith(so_far[-size:]) for s in stops)
            ),
            key=len,
            default="",
        )
    expected = first_stop("".join(pieces), stops)
    if expected is None:
        assert match is None
        assert released + matcher.release() == "".join(pieces)
    else:
        assert (len(released), match) == expected


def test_unmatched_text_may_begin_a_later_stop() -> None:
    matcher = StopMatcher(StopStrings(["abc"]))
    assert matcher.push_unmatched("abc ab") == "abc "
    assert matcher.push("c") == StopMatch("", "abc")


def sample(stops: list[str], *, min_new_tokens: int = 0) -> Sample:
    return Sample(
        0,
        detokenizer_factory(TOKENIZER._tokenizer).begin([5]),
        matcher=StopMatcher(StopStrings(stops)) if stops else None,
        min_new_tokens=min_new_tokens,
        text_of=TOKENIZER.text_of,
    )


def ids_of(text: str) -> list[int]:
    return [TOKENIZER._tokenizer.encode(character, add_special_tokens=False).ids[0] for character in text]


def test_tokens_after_a_stop_string_in_the_same_message_are_dropped() -> None:
    delta = sample(["cd"]).push(Tokens(1, 0, ids_of("abcdef"), logprobs=[0.0] * 6))
    assert delta is not None
    assert (delta.text, delta.finish, delta.stop_reason) == ("ab", Finish.STOP_STRING, "cd")
    assert delta.token_ids == ids_of("abcd")
    assert delta.logprobs == [0.0] * 4


def test_what_comes_after_the_end_is_ignored() -> None:
    ended = sample(["b"])
    assert ended.push(Tokens(1, 0, ids_of("ab"))) is not None
    assert ended.push(Tokens(1, 0, ids_of("c"), finish=Finish.CANCELLED)) is None
    assert ended.num_tokens == 2


def test_stop_strings_count_only_after_min_new_tokens() -> None:
    late = sample(["b"], min_new_tokens=3)
    first = late.push(Tokens(1, 0, ids_of("ab")))
    assert first is not None
    assert first.finish is None
    second = late.push(Tokens(1, 0, ids_of("cb")))
    assert second is not None
    assert (first.text + second.text, second.finish) == ("abc", Finish.STOP_STRING)


def test_held_text_is_released_at_the_end() -> None:
    held = sample(["bcd"])
    first = held.push(Tokens(1, 0, ids_of("abc")))
    last = held.push(Tokens(1, 0, ids_of("x"), finish=Finish.LENGTH))
    assert first is not None
    assert last is not None
    assert (first.text, last.text, last.finish) == ("a", "bcx", Finish.LENGTH)


def test_broken_last_character_can_complete_a_stop_string() -> None:
    half = TOKENIZER._tokenizer.encode("\N{SNOWMAN}", add_special_tokens=False).ids[:1]
    delta = sample(["\ufffd"]).push(Tokens(1, 0, ids_of("a") + half, finish=Finish.LENGTH))
    assert delta is not None
    assert (delta.text, delta.finish) == ("a", Finish.STOP_STRING)


def test_adversarial_stop_strings_cost_constant_work_per_character() -> None:
    import time

    matcher = StopMatcher(StopStrings(["a" * 255 + chr(ord("b") + index) for index in range(16)]))
    started_s = time.process_time()
    for _ in range(1000):
        matcher.push("a" * 100)
    assert time.process_time() - started_s < 1.0
