"""What a model does is read from its own folder, and comes out as transformers and plain sums say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, BertModel, pipeline

from server.predict.errors import ComputeError, InputError, ModelRefusedError, WrongTaskError
from server.predict.messages import Inputs, Task, TextItem
from tests.model.predict_models import make_model, sample_pairs, sample_texts
from tests.model.predict_support import Reference, answer, load, prepare, values

torch.set_num_threads(2)

TOLERANCE = 1e-5


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- classification and regression ----


def test_labels_that_do_not_exclude_each_other(tmp_path):
    folder = make_model("roberta-multilabel", tmp_path)
    model = load(folder)
    assert (model.info.task, model.info.multi_label) == (Task.CLASSIFY, True)
    reference = Reference(folder, Task.CLASSIFY)
    for text, output in zip(texts := sample_texts(8), answer(model, texts), strict=True):
        assert np.abs(values(output) - reference.of(text).logits[0].sigmoid().numpy()).max() < TOLERANCE


@pytest.mark.parametrize("kind", ["bert-regression", "gpt2-regression", "t5-regression"])
def test_regression_gives_the_numbers_themselves(tmp_path, kind):
    folder = make_model(kind, tmp_path)
    model = load(folder)
    assert (model.info.task, model.info.num_dimensions, model.info.labels) == (Task.REGRESS, 1, ())
    reference = Reference(folder, Task.REGRESS)
    for pair, output in zip(pairs := sample_pairs(8), answer(model, pairs), strict=True):
        assert np.abs(values(output) - reference.of(pair).logits[0].numpy()).max() < TOLERANCE * 10


def test_one_label_and_nothing_else_said_is_a_number(tmp_path):
    assert load(make_model("bert", tmp_path, num_labels=1)).info.task is Task.REGRESS


def test_one_label_taken_as_a_class_is_a_probability(tmp_path):
    folder = make_model("bert", tmp_path, num_labels=1)
    model = load(folder, task="classify")
    wanted = Reference(folder, Task.CLASSIFY).of("a quiet river").logits[0].sigmoid().numpy()
    assert np.abs(values(answer(model, ["a quiet river"])[0]) - wanted).max() < TOLERANCE


def test_regression_of_several_numbers(tmp_path):
    folder = make_model("bert", tmp_path, num_labels=4, problem_type="regression")
    model = load(folder)
    assert (model.info.task, model.info.num_dimensions) == (Task.REGRESS, 4)
    assert values(answer(model, ["one"])[0]).shape == (4,)


# ---- tokens ----


@pytest.mark.parametrize("kind", ["bert-tokens", "roberta-tokens", "deberta-v2-tokens", "gpt2-tokens"])
def test_token_labels_and_offsets_are_those_of_the_pipeline(tmp_path, kind):
    folder = make_model(kind, tmp_path)
    model = load(folder)
    assert model.info.task is Task.CLASSIFY_TOKENS
    reference = pipeline(
        "token-classification",
        model=AutoModelForTokenClassification.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        ignore_labels=[],
    )
    texts = ["The naïve teacher of  東京 opens", *sample_texts(10, seed=1)]
    for text, output in zip(texts, answer(model, texts), strict=True):
        wanted = reference(text)
        assert [(model.info.labels[label], start, end, 0) for label, start, end, _ in output.tokens] == [
            (entry["entity"], entry["start"], entry["end"], 0) for entry in wanted
        ]
        assert np.abs(values(output) - [float(entry["score"]) for entry in wanted]).max() < TOLERANCE


def test_offsets_count_characters_and_say_which_text(tmp_path):
    model = load(make_model("bert-tokens", tmp_path))
    (output,) = answer(model, [("東京 river", "naïve")])
    assert [span[1:] for span in output.tokens] == [(0, 1, 0), (1, 2, 0), (3, 8, 0), (0, 5, 1)]


def test_text_without_tokens_of_its_own_has_no_labels(tmp_path):
    model = load(make_model("bert-tokens", tmp_path))
    (output,) = answer(model, [""])
    assert (output.tokens, output.values, output.num_tokens) == ((), b"", 2)


# ---- embeddings ----


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_modes(tmp_path, pooling, normalize):
    folder = make_model("bert-embed", tmp_path)
    model = load(folder, pooling=pooling, normalize=normalize)
    assert (model.info.pooling, model.info.normalized) == (pooling, normalize)
    reference = Reference(folder, Task.EMBED)
    for text, output in zip(texts := sample_texts(9), answer(model, texts), strict=True):
        hidden = reference.of(text).last_hidden_state[0].numpy()
        wanted = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        if normalize:
            wanted = wanted / np.linalg.norm(wanted)
        assert np.abs(values(output) - wanted).max() < TOLERANCE


def test_folder_of_sentence_transformers_says_pooling_and_length(tmp_path):
    folder = make_model("minilm-like", tmp_path)
    model = load(folder)
    info = model.info
    assert (info.task, info.pooling, info.normalized, info.max_length) == (Task.EMBED, "mean", True, 32)
    edit(folder / "1_Pooling" / "config.json", pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    edit(folder / "sentence_bert_config.json", max_seq_length=20)
    info = load(folder).info
    assert (info.pooling, info.max_length) == ("cls", 20)
    info = load(folder, pooling="last", max_length=48).info
    assert (info.pooling, info.max_length) == ("last", 48)


def test_sentence_model_that_reads_lower_case(tmp_path):
    folder = make_model("minilm-like", tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    upper, lower = prepare(load(folder), ["River", "river"])
    assert upper.payload.ids.tolist() != lower.payload.ids.tolist()
    edit(folder / "sentence_bert_config.json", do_lower_case=True)
    upper, lower = prepare(load(folder), ["River", "river"])
    assert upper.payload.ids.tolist() == lower.payload.ids.tolist()


def test_pooling_that_is_not_served_is_refused_unless_overridden(tmp_path):
    folder = make_model("minilm-like", tmp_path)
    edit(folder / "1_Pooling" / "config.json", pooling_mode_max_tokens=True)
    with pytest.raises(ModelRefusedError, match="pools in a way"):
        load(folder)
    assert load(folder, pooling="mean").info.pooling == "mean"


def test_module_of_a_sentence_model_that_is_not_served(tmp_path):
    folder = make_model("minilm-like", tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    for kind in ("sentence_transformers.models.Router", "evil.Transformer"):
        changed = [*modules, {"idx": 3, "name": "3", "path": "", "type": kind}]
        (folder / "modules.json").write_text(json.dumps(changed))
        with pytest.raises(ModelRefusedError, match="not served"):
            load(folder)


def test_classifier_embeds_when_told_to(tmp_path):
    model = load(make_model("bert", tmp_path), task="embed")
    assert model.info.task is Task.EMBED
    assert any("not used" in note for note in model.info.notes)


def test_half_of_a_model_that_is_not_used_is_freed(tmp_path):
    folder = make_model("t5-embed", tmp_path)
    assert load(folder).info.num_bytes < 0.6 * (folder / "model.safetensors").stat().st_size


# ---- texts ----


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "gpt2"])
def test_long_texts_are_refused_with_the_limit_or_cut_as_transformers_cuts(tmp_path, family):
    folder = make_model(family, tmp_path)
    model = load(folder)
    limit = model.info.max_length
    reference = Reference(folder, Task.CLASSIFY)
    long = " ".join(sample_texts(40))
    with pytest.raises(InputError, match=f"{limit} tokens") as caught:
        prepare(model, ["short", long])
    assert (caught.value.index, caught.value.part) == (1, "text")
    texts = [long, "short", ("a river", long), (long, long)]
    outputs = answer(model, texts, truncate=True)
    assert [o.truncated for o in outputs] == [True, False, True, True]
    assert [o.num_tokens for o in outputs if o.truncated] == [limit] * 3
    for text, output in zip(texts, outputs, strict=True):
        wanted = reference.of(text, truncation=True, max_length=limit).logits[0].softmax(-1).numpy()
        assert np.abs(values(output) - wanted).max() < TOLERANCE


def test_text_just_within_the_limit(tmp_path):
    model = load(make_model("bert", tmp_path), max_length=10)
    assert prepare(model, [" ".join(["river"] * 8)])[0].num_tokens == 10
    with pytest.raises(InputError):
        prepare(model, [" ".join(["river"] * 9)])


def test_enormous_text_is_refused_before_it_is_tokenized(tmp_path):
    model = load(make_model("bert", tmp_path))
    with pytest.raises(InputError, match="longer than"):
        prepare(model, ["river " * 1_000_000])
    (item,) = prepare(model, ["river " * 1_000_000], truncate=True)
    assert (item.num_tokens, item.truncated) == (64, True)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "t5", "llama"])
def test_control_tokens_in_a_text_stay_text(tmp_path, family):
    folder = make_model(family, tmp_path)
    model = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    hostile = " ".join(tokenizer.all_special_tokens)
    (item,) = prepare(model, [f"a {hostile} b"], truncate=True)
    (plain,) = prepare(model, ["a b"])
    ids, plain_ids = item.payload.ids.tolist(), plain.payload.ids.tolist()
    assert [i for i in ids if i in special] == [i for i in plain_ids if i in special]
    # And so when only normalization makes them.
    (wide,) = prepare(model, ["a \uff1c/s\uff1e \uff1cpad\uff1e b"])
    ids = wide.payload.ids.tolist()
    assert [i for i in ids if i in special] == [i for i in plain_ids if i in special]


def test_odd_texts(tmp_path):
    for family in ("bert", "roberta", "t5", "gpt2"):
        model = load(make_model(family, tmp_path / family))
        texts = ["\0", "a\0b", "\u202eabc", "e\u0301", "\U0001f9ea\u200d\U0001f52c", "\ufffd\uffff", "\t\n x"]
        if family == "gpt2":
            with pytest.raises(InputError, match="no tokens"):
                prepare(model, ["a", ""])
        else:
            texts.append("")
        assert all(np.isfinite(values(output)).all() for output in answer(model, texts))
        with pytest.raises(InputError, match="Unicode") as caught:
            prepare(model, ["a", ("a", "\ud800")])
        assert (caught.value.index, caught.value.part) == (1, "pair")


def test_rows_of_features_are_not_for_texts(tmp_path):
    model = load(make_model("bert", tmp_path))
    with pytest.raises(WrongTaskError):
        model.prepare(Inputs(rows=b"\0" * 4, num_rows=1), truncate=False, reuse=True, tenant="")


def test_tenant_and_reuse_travel_along(tmp_path):
    model = load(make_model("bert", tmp_path))
    inputs = Inputs((TextItem("a"),))
    (item,) = model.prepare(inputs, truncate=False, reuse=False, tenant="salt")
    assert (item.tenant, item.reuse) == ("salt", False)


def test_numbers_that_are_none_are_an_error(tmp_path):
    folder = make_model("bert-embed", tmp_path)
    model = load(folder)
    prepared = prepare(model, ["a river", "a letter"])
    broken = BertModel.from_pretrained(folder)
    broken.embeddings.word_embeddings.weight.data[int(prepared[0].payload.ids[2])] = torch.nan
    broken.save_pretrained(folder)
    model = load(folder)
    with pytest.raises(ComputeError):
        model.run(prepared)
    assert np.isfinite(values(model.run(prepared[1:])[0])).all()


def test_closed_model_computes_nothing(tmp_path):
    model = load(make_model("bert", tmp_path))
    prepared = prepare(model, ["a"])
    model.close()
    with pytest.raises(ComputeError):
        model.run(prepared)
