"""Models that are loaded at the same time, by several threads, as the model cache does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from tests.model.predict_models import make_model
from tests.model.predict_support import load

torch.set_num_threads(2)


def test_models_loaded_at_once_do_not_disturb_each_other(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers patches its classes while it builds: T5 missed its tied weights, and so did all later."""
    kinds = ["t5", "bert", "t5-embed", "gpt2"]
    folders = [make_model(kind, tmp_path / kind) for kind in kinds]
    original = PreTrainedModel.__dict__["tie_weights"]
    with monkeypatch.context() as patch:
        # Kept even where a load leaves something else behind: other tests need it.
        patch.setattr(PreTrainedModel, "tie_weights", original)
        with ThreadPoolExecutor(4) as pool:
            models = list(pool.map(load, 6 * folders))
        assert PreTrainedModel.tie_weights is original
    assert [model.info.family for model in models[:4]] == ["t5", "bert", "t5", "gpt2"]
    assert torch.get_default_dtype() is torch.float32
