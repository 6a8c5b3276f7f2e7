"""Every family gives what transformers gives for each input alone, whatever it is batched with."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from server.predict.errors import ModelRefusedError
from server.predict.messages import Task
from server.predict.model import Prepared
from server.worker.native import NativeUnavailable
from server.worker.native.library import load as load_kernels
from server.worker.predict.tokenizer import EncodedText
from tests.model.predict_models import FAMILIES, make_model, make_tokenizer, sample_pairs, sample_texts
from tests.model.predict_support import Reference, answer, load, prepare, values

torch.set_num_threads(2)

TOLERANCE = 1e-5
NATIVE = ("bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
EXECUTORS = ("auto", "transformers")
_LAYERS = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
OTHERS = {
    "big_bird": {**_LAYERS, "block_size": 4, "num_random_blocks": 1},
    "convbert": {**_LAYERS, "embedding_size": 32},
    "ernie": _LAYERS,
    "fnet": _LAYERS,
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64},
    "mobilebert": {
        **_LAYERS, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16,
    },
    "rembert": {**_LAYERS, "input_embedding_size": 16, "output_embedding_size": 16},
    "roformer": {**_LAYERS, "embedding_size": 32},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that makes each kind once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def is_native(family: str) -> bool:
    """Say whether the native encoder computes this family here; it needs a compiler."""
    try:
        load_kernels()
    except NativeUnavailable:
        return False
    return family in NATIVE


def close(found, wanted) -> bool:
    """Say whether two answers are equal within the tolerance, with the same best label."""
    return bool(np.abs(found - wanted).max() <= TOLERANCE and found.argmax() == wanted.argmax())


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_gives_what_transformers_gives_one_at_a_time(folders, family, executor):
    folder = folders(family)
    model = load(folder, executor=executor)
    assert model.info.executor == ("native" if executor == "auto" and is_native(family) else "transformers")
    reference = Reference(folder, Task.CLASSIFY)
    texts = [*sample_texts(24, seed=1, max_words=6), *sample_pairs(12, seed=2, max_words=3)]
    random.Random(3).shuffle(texts)
    for text, output in zip(texts, answer(model, texts), strict=True):
        wanted = reference.of(text).logits[0].softmax(-1).numpy()
        assert close(values(output), wanted), text
    assert model.info.labels == ("negative", "neutral", "positive")
    assert not model.info.multi_label


@pytest.mark.parametrize("family", FAMILIES)
def test_every_length_up_to_the_limit(folders, family):
    folder = folders(family)
    model = load(folder)
    reference = Reference(folder, Task.CLASSIFY)
    limit = model.info.max_length
    long = prepare(model, [" ".join(sample_texts(40, seed=4))], truncate=True)[0].payload
    assert len(long) == limit
    # Cut before the last token: some heads read the end token.
    lengths = list(range(1, limit + 1))
    ids = [np.r_[long.ids[: n - 1], long.ids[-1:]] for n in lengths]
    random.Random(5).shuffle(ids)
    types = None if long.type_ids is None else np.zeros_like
    batch = [Prepared(len(i), EncodedText(i, types(i) if types else None)) for i in ids]
    for one, output in zip(ids, model.run(batch), strict=True):
        wanted = reference.of_ids(one).logits[0].softmax(-1).numpy()
        assert close(values(output), wanted), len(one)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_do_not_depend_on_the_rest_of_the_batch(folders, family):
    model = load(folders(family))
    prepared = prepare(model, sample_texts(40, seed=6))
    alone = [values(model.run([item])[0]) for item in prepared]
    for seed in range(3):
        order = random.Random(seed).sample(range(40), 10 * (seed + 2))
        for index, output in zip(order, model.run([prepared[i] for i in order]), strict=True):
            assert close(values(output), alone[index])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_head_on_the_last_token_needs_no_padding_token(tmp_path, family):
    folder = make_model(family, tmp_path, pad_token_id=None)
    model = load(folder)
    reference = Reference(folder, Task.CLASSIFY)
    texts = sample_texts(12, seed=7)
    for text, output in zip(texts, answer(model, texts), strict=True):
        # Batches of one: transformers itself refuses larger ones here.
        assert close(values(output), reference.of(text).logits[0].softmax(-1).numpy())
    assert model.num_padding_tokens > 0


@pytest.mark.parametrize("family", OTHERS)
def test_family_that_nobody_prepared_for(tmp_path, family):
    tokenizer = make_tokenizer("wordpiece", "[CLS]", "[SEP]")
    tokenizer.model_max_length = 48
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **OTHERS[family], vocab_size=300, initializer_range=0.3,
        num_labels=3, pad_token_id=0, bos_token_id=2, eos_token_id=3, sep_token_id=3,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    reference = Reference(tmp_path, Task.CLASSIFY)
    texts = sample_texts(12, seed=8)
    for text, output in zip(texts, answer(model, texts), strict=True):
        assert close(values(output), reference.of(text).logits[0].softmax(-1).numpy())


def test_family_that_fails_on_most_lengths_is_refused(tmp_path):
    make_tokenizer("wordpiece", "[CLS]", "[SEP]").save_pretrained(tmp_path)
    config = AutoConfig.for_model(
        "nystromformer", **_LAYERS, vocab_size=300, num_landmarks=4, segment_means_seq_len=64
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelRefusedError, match="fails on a text"):
        load(tmp_path)


def test_family_that_padding_disturbs_is_computed_without(tmp_path):
    tokenizer = make_tokenizer("wordpiece", "[CLS]", "[SEP]")
    tokenizer.save_pretrained(tmp_path)
    config = AutoConfig.for_model("fnet", **OTHERS["fnet"], vocab_size=300, initializer_range=0.3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert any("computed equal lengths" in note for note in model.info.notes)
    answer(model, sample_texts(20, seed=8))
    assert model.num_padding_tokens == 0


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "t5", "bart", "deberta-v2"])
def test_embeddings_of_a_bare_model(folders, family):
    folder = folders(f"{family}-embed")
    model = load(folder)
    assert model.info.task is Task.EMBED
    reference = Reference(folder, Task.EMBED)
    texts = sample_texts(16, seed=9)
    for text, output in zip(texts, answer(model, texts), strict=True):
        mean = reference.of(text).last_hidden_state[0].mean(0)
        assert np.abs(values(output) - (mean / mean.norm()).numpy()).max() <= TOLERANCE


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "mpnet", "gpt2"])
def test_language_models_embed_without_their_heads(tmp_path, family):
    folder = make_model(f"{family}-embed", tmp_path)
    kind = AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM
    torch.manual_seed(1)
    kind.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    model = load(folder, normalize=False)
    assert model.info.task is Task.EMBED
    reference = Reference(folder, Task.EMBED)
    (output,) = answer(model, ["a quiet river"])
    wanted = reference.of("a quiet river").last_hidden_state[0].mean(0).numpy()
    assert np.abs(values(output) - wanted).max() <= TOLERANCE
    with pytest.raises(ModelRefusedError, match="lack"):
        load(folder, task="classify")


def test_native_executor_holds_one_copy_of_the_weights(tmp_path):
    folder = make_model("bert", tmp_path, hidden_size=128, intermediate_size=512, num_hidden_layers=4)
    native, plain = load(folder), load(folder, executor="transformers")
    assert native.info.num_parameters == plain.info.num_parameters
    assert native.info.num_bytes < 1.1 * plain.info.num_bytes


def test_padding_is_counted_and_small(folders):
    model = load(folders("bert"), executor="transformers")
    prepared = prepare(model, [" ".join(["river"] * (1 + i % 50)) for i in range(200)])
    model.run(prepared)
    num_tokens = sum(item.num_tokens for item in prepared)
    assert 0 < model.num_padding_tokens < 0.1 * num_tokens


def test_lower_precision_is_done_as_asked(folders):
    folder = folders("bert")
    for dtype in ("bfloat16", "float16"):
        model = load(folder, dtype=dtype)
        assert model.info.dtype == dtype
        exact = load(folder)
        assert exact.info.dtype == "float32"
        texts = sample_texts(10, seed=10)
        for rough, fine in zip(answer(model, texts), answer(exact, texts), strict=True):
            assert np.abs(values(rough) - values(fine)).max() < 0.2
        assert model.info.num_bytes < exact.info.num_bytes
        assert model.info.fingerprint != exact.info.fingerprint


def test_stored_precision_is_kept_but_for_float16_on_a_cpu(folders, tmp_path):
    folder = make_model("bert-embed", tmp_path)
    for stored, computed in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32")):
        AutoModel.from_pretrained(folder, dtype=stored).save_pretrained(folder)
        assert load(folder).info.dtype == computed
