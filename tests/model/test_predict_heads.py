"""Heads on packed hidden states: the family's own code gives what it gives in the whole model.

The states come from the model's own encoder, one text at a time; the native kernels have tests of their own.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from server.predict.messages import Task
from server.worker.predict.executors import TransformersExecutor
from server.worker.predict.native_executor import NativeExecutor
from server.worker.predict.probe import agree, run_alone
from server.worker.predict.recipe import Recipe
from tests.model.predict_models import make_model, sample_pairs, sample_texts
from tests.model.predict_support import load, prepare

torch.set_num_threads(2)

FAMILIES = ("bert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")


class OneByOneEncoder:
    """Packed hidden states, computed by transformers without packing anything."""

    num_bytes = 0

    def __init__(self, encoder) -> None:
        self._encoder = encoder
        self._takes = inspect.signature(encoder.forward).parameters

    def forward(self, token_ids, position_ids, type_ids, lengths):
        states, start = [], 0
        for length in lengths:
            columns = {"input_ids": token_ids, "position_ids": position_ids, "token_type_ids": type_ids}
            inputs = {
                name: torch.from_numpy(column[start : start + length].astype(np.int64))[None]
                for name, column in columns.items()
                if name in self._takes
            }
            states.append(self._encoder(**inputs).last_hidden_state[0])
            start += length
        assert start == len(token_ids)
        return torch.cat(states).clone()


def recipe(task: Task, pooling: str = "") -> Recipe:
    return Recipe(task, None, (), False, pooling, False, False, None)


def check(folder, kind, plan) -> None:
    """Compare both executors on a mixed batch."""
    prepared = prepare(load(folder), [*sample_texts(7, seed=1, max_words=6), *sample_pairs(4, max_words=3)])
    batch = [item.payload for item in prepared]
    model = kind.from_pretrained(folder).eval()
    encoder = OneByOneEncoder(model if plan.task is Task.EMBED else model.base_model)
    found = NativeExecutor(encoder, model, plan).run(batch)
    wanted = TransformersExecutor(model, plan).run(batch)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == np.float32
        assert np.abs(a - b).max() < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_head_over_a_text(tmp_path, family):
    check(make_model(family, tmp_path), AutoModelForSequenceClassification, recipe(Task.CLASSIFY))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_over_tokens(tmp_path, family):
    folder = make_model(f"{family}-tokens", tmp_path)
    check(folder, AutoModelForTokenClassification, recipe(Task.CLASSIFY_TOKENS))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling(tmp_path, pooling):
    check(make_model("roberta-embed", tmp_path), AutoModel, recipe(Task.EMBED, pooling))


def test_head_that_pools_in_its_own_way_is_noticed(tmp_path):
    folder = make_model("albert", tmp_path)
    batch = [item.payload for item in prepare(load(folder), sample_texts(3))]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plan = recipe(Task.CLASSIFY)
    alone = run_alone(TransformersExecutor(model, plan), batch)
    native = NativeExecutor(OneByOneEncoder(model.base_model), model, plan)
    assert not agree(native, batch, alone, dtype="float32")
    assert agree(TransformersExecutor(model, plan), batch, alone, dtype="float32")


def test_model_itself_stays_as_it_is(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(make_model("bert", tmp_path)).eval()
    before = list(model.state_dict())
    NativeExecutor(OneByOneEncoder(model.base_model), model, recipe(Task.CLASSIFY))
    assert list(model.state_dict()) == before
    assert model.base_model is model.bert
