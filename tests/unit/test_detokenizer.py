"""The incremental detokenizer equals the tokenizer's decoder, for every kind of tokenizer and any tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from server.rpc.detokenizer import MAX_RUN_BYTES, detokenizer_factory
from server.rpc.model_files import BUILTIN_FOLDER

TEXT = (
    "the cat sat on it, \u00e9t\u00e9 \u65e5\u672c\u8a9e \U0001f600\U0001f468\u200d\U0001f469 caf\u00e9 " * 3
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(BUILTIN_FOLDER / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("two words\u00e9", special=False)])
    return tokenizer


def sentencepiece(decoder: decoders.Decoder) -> Tokenizer:
    words = [
        "\u2581",
        "\u2581\u2581",
        "\u2581the",
        "\u2581cat",
        "s",
        "at",
        "\u2581on",
        "\u2581\u00e9",
        "a\u2581b",
        "\u65e5",
    ]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def llama2() -> Tokenizer:
    strip = decoders.Strip(" ", 1, 0)
    replace = decoders.Replace("\u2581", " ")
    return sentencepiece(decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip]))


def gemma() -> Tokenizer:
    replace = decoders.Replace("\u2581", " ")
    return sentencepiece(decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()]))


def metaspace() -> Tokenizer:
    return sentencepiece(decoders.Metaspace(prepend_scheme="always"))


def metaspace_never() -> Tokenizer:
    return sentencepiece(decoders.Metaspace(prepend_scheme="never"))


KINDS: list[Callable[[], Tokenizer]] = [byte_level, llama2, gemma, metaspace, metaspace_never]
TOKENIZERS = {kind.__name__: kind() for kind in KINDS}
FACTORIES = {name: detokenizer_factory(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def id_of(name: str, piece: str) -> int:
    token_id = TOKENIZERS[name].token_to_id(piece)
    assert token_id is not None
    return token_id


def ids_of(name: str, *, max_size: int = 40) -> st.SearchStrategy[list[int]]:
    """Draw token ids, half of them from single bytes, where characters break."""
    size = TOKENIZERS[name].get_vocab_size()
    some_bytes = st.integers(3, 262)
    return st.lists(st.one_of(some_bytes, st.integers(0, size - 1)), max_size=max_size)


@st.composite
def pushed(draw: st.DrawFn, name: str) -> tuple[list[int], list[int]]:
    ids = draw(ids_of(name))
    return ids, draw(st.lists(st.integers(1, 4), max_size=len(ids)))


def run(name: str, prompt: list[int], ids: list[int], cuts: list[int]) -> str:
    detokenizer = FACTORIES[name].begin(prompt)
    pieces, position = [], 0
    for cut in [*cuts, len(ids)]:
        pieces.append(detokenizer.push(ids[position : position + cut]))
        position += cut
    return "".join(pieces) + detokenizer.flush()


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_pieces_join_to_the_full_decode(name: str) -> None:
    @settings(max_examples=400, deadline=None)
    @given(pushed(name))
    def check(drawn: tuple[list[int], list[int]]) -> None:
        ids, cuts = drawn
        assert run(name, [], ids, cuts) == TOKENIZERS[name].decode(ids)

    check()


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_continuation_is_the_full_decode_less_the_prompts(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    # A prompt that ends within a run of bytes is decoded again with what follows: not what is asked here.
    prompt = [id_of(name, "s")]

    @settings(max_examples=200, deadline=None)
    @given(pushed(name))
    def check(drawn: tuple[list[int], list[int]]) -> None:
        ids, cuts = drawn
        before = tokenizer.decode(prompt)
        assert before + run(name, prompt, ids, cuts) == tokenizer.decode(prompt + ids)

    check()


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_real_text_arrives_in_whole_characters(name: str) -> None:
    ids = TOKENIZERS[name].encode(TEXT, add_special_tokens=False).ids
    detokenizer = FACTORIES[name].begin([])
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.flush() == TOKENIZERS[name].decode(ids)


def test_incomplete_character_is_replaced_when_flushed() -> None:
    ids = TOKENIZERS["byte_level"].encode("\U0001f600", add_special_tokens=False).ids
    detokenizer = FACTORIES["byte_level"].begin([])
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_run_of_byte_tokens_is_held_for_a_bounded_time() -> None:
    ids = [id_of("llama2", f"<0x{byte:02X}>") for byte in ("\u65e5" * 100).encode()]
    detokenizer = FACTORIES["llama2"].begin([])
    held, longest = 0, 0
    for token_id in ids:
        held = 0 if detokenizer.push([token_id]) else held + 1
        longest = max(longest, held)
    assert longest < MAX_RUN_BYTES


def test_first_space_survives_after_a_prompt_and_not_without() -> None:
    cat = id_of("llama2", "\u2581cat")
    assert FACTORIES["llama2"].begin([cat]).push([cat]) == " cat"
    assert FACTORIES["llama2"].begin([1]).push([cat]) == "cat"  # only a special token before it


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    tokenizer = byte_level()
    factory = detokenizer_factory(tokenizer)
    factory.cover(5000)
    detokenizer = factory.begin([4000])
    assert detokenizer.push([4999]) + detokenizer.flush() == ""


def test_other_decoders_fall_back_to_a_window() -> None:
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "##ed": 3, "cat": 4, ",": 5}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    ids = [1, 2, 4, 1, 3, 4] * 20
    detokenizer = detokenizer_factory(tokenizer).begin([])
    pieces = [detokenizer.push([token_id]) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)
