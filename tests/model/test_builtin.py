"""The built-in model's folder: small, loads with transformers alone, writes documentation English."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "server" / "worker" / "builtin"
MAX_BYTES = 8_000_000
MAX_PERPLEXITY = 25.0
"""Of DOCUMENTATION for the trained model (12.7 when it was made); random weights give some 3,000."""

# Written for this test, so that no model was trained on it.
DOCUMENTATION = """\
Return the number of items that were read from the file. If the file is empty, the function returns \
zero. The optional argument must be a string or None; otherwise a TypeError is raised.

This method is called when the connection is closed. Subclasses may override it to release the \
resources that they use. The default implementation does nothing.

When a class is created, the name is looked up in the namespace of the module, and the result is \
stored in the dictionary of the object."""

DOCUMENTATION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are argument arguments as at attribute be by call called can class code default "
        "dictionary does error exception file first for from function given has if in instance is it item "
        "list may method module must name not object of on one or other raised result return returned "
        "returns sequence set should string that the then there this to true type used value values was "
        "when which with",
    )
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def continue_greedily(model: Any, ids: list[int], *, num_tokens: int) -> list[int]:
    """Return at most ``num_tokens`` greedy ids after ``ids``."""
    output = model.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False)
    continued: list[int] = output[0].tolist()[len(ids) :]
    return continued


def perplexity(model: Any, ids: list[int]) -> float:
    with torch.inference_mode():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss
    return math.exp(loss.item())


def test_folder_is_complete_and_within_its_size() -> None:
    names = {path.name for path in FOLDER.iterdir()}

    assert names >= {
        "MODEL_CARD.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) <= MAX_BYTES


def test_folder_is_a_plain_llama_without_remote_code() -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))

    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in config
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    with safe_open(FOLDER / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert "lm_head.weight" not in names  # tied to the embeddings
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=200))
def test_tokenizer_gives_back_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]

    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize(
    "text", ["", "  two  spaces ", "tab\tand\r\nline", "naïve café 日本語 🎉", "\x00\x7f\u200d"]
)
def test_tokenizer_gives_back_hard_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_chat_template_marks_each_turn_and_opens_the_answer(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What does len do? "},
        {"role": "assistant", "content": "It counts."},
        {"role": "user", "content": "More?"},
    ]

    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert text == (
        "<|bos|><|system|>Be brief.<|end|><|user|>What does len do?<|end|>"
        "<|assistant|>It counts.<|end|><|user|>More?<|end|><|assistant|>"
    )
    closed = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert closed.endswith("<|end|>")


def test_chat_template_gives_one_id_to_each_mark(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]

    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:2] == ["<|bos|>", "<|user|>"]
    assert tokens[-2:] == ["<|end|>", "<|assistant|>"]
    assert tokens.count("<|bos|>") == 1


def test_chat_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(TemplateError, match="unknown role: narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "Once"}], tokenize=False)


def test_generation_ends_at_end_of_text_and_end_of_turn(tokenizer: Any, model: Any) -> None:
    ends = tokenizer.convert_tokens_to_ids(["<|eos|>", "<|end|>"])

    assert model.generation_config.eos_token_id == ends


def test_trained_weights_expect_documentation_and_random_ones_do_not(tokenizer: Any, model: Any) -> None:
    ids = tokenizer(DOCUMENTATION)["input_ids"]
    torch.manual_seed(0)
    untrained = type(model)(model.config)

    assert perplexity(model, ids) < MAX_PERPLEXITY
    assert perplexity(untrained, ids) > 40 * MAX_PERPLEXITY


def test_greedy_text_reads_as_documentation(tokenizer: Any, model: Any) -> None:
    ids = continue_greedily(model, tokenizer("The function returns")["input_ids"], num_tokens=48)

    text = tokenizer.decode(ids, skip_special_tokens=True)
    words = re.findall(r"[a-z]+", text.lower())
    assert text.isascii()
    assert len(words) >= 5
    assert sum(word in DOCUMENTATION_WORDS for word in words) >= 0.4 * len(words)


def test_chat_answer_ends_by_itself(tokenizer: Any, model: Any) -> None:
    messages = [{"role": "user", "content": "What does textwrap.fill do?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]

    answer = continue_greedily(model, ids, num_tokens=256)

    assert answer[-1] in model.generation_config.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True).isascii()


def test_last_position_gives_finite_logits(model: Any) -> None:
    num_positions = model.config.max_position_embeddings
    ids = torch.arange(num_positions).remainder(model.config.vocab_size - 7) + 7

    with torch.inference_mode():
        logits = model(ids[None], logits_to_keep=1, use_cache=False).logits

    assert logits.shape == (1, 1, model.config.vocab_size)
    assert logits.isfinite().all()


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the corpus module as the training script does, and forget it afterwards."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts")
        yield importlib.import_module("builtin_corpus")
        sys.modules.pop("builtin_corpus")


def test_corpus_keeps_prose_and_drops_code(corpus: ModuleType) -> None:
    text = """Return the name of the
    file that was opened.

    >>> name_of(file)
    'spam'

       stmt ::= "assert" expression

    * The first item of the list is wrapped
      over two lines.
    * Copyright of the file is with the author.
    """

    assert corpus.paragraphs_of(text) == [
        "Return the name of the file that was opened.",
        "The first item of the list is wrapped over two lines.",
    ]


def test_corpus_keeps_a_repeated_paragraph_once_and_skips_tests(corpus: ModuleType, tmp_path: Path) -> None:
    source = '"""Read the whole file and return it."""\nclass A:\n    """Hold one item of the list."""\n'
    for name in ("b.py", "a.py", "test/c.py", "site-packages/d.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source, encoding="utf-8")
    (tmp_path / "broken.py").write_text("def", encoding="utf-8")

    documents = corpus.collect(tmp_path)

    assert [(document.name, document.text) for document in documents] == [
        ("a", "Read the whole file and return it."),
        ("a.A", "Hold one item of the list."),
    ]
