"""Models that are loaded at the same time, by several threads, as the model cache does."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from tests.model.predict_models import make_model
from tests.model.predict_support import load

torch.set_num_threads(2)


def test_models_loaded_at_once_are_built_one_after_the_other(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers patches its classes while it builds: T5 missed its tied weights, and so did all later."""
    tie_weights = PreTrainedModel.__dict__["tie_weights"]
    build = PreTrainedModel.from_pretrained.__func__
    is_crowded = threading.Event()
    found_patched: list[bool] = []
    num_building = [0]

    def watched(cls, *arguments, **options):
        num_building[0] += 1
        if num_building[0] > 1:
            is_crowded.set()
        is_crowded.wait(0.2)  # for another, which must not come
        found_patched.append(PreTrainedModel.__dict__["tie_weights"] is not tie_weights)
        try:
            return build(cls, *arguments, **options)
        finally:
            num_building[0] -= 1

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    folders = [make_model(kind, tmp_path / kind) for kind in ("t5", "bert", "gpt2")]
    with ThreadPoolExecutor(3) as pool:
        models = list(pool.map(load, folders))
    assert not is_crowded.is_set()
    assert not any(found_patched)
    assert [model.info.family for model in models] == ["t5", "bert", "gpt2"]
    assert PreTrainedModel.__dict__["tie_weights"] is tie_weights
    assert torch.get_default_dtype() is torch.float32
