"""Models of the families that Predict serves, folders that must not be loaded, and transformers alone."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import pickle
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvserve
from kvserve import AsyncClient
from server.predict.messages import Task
from tests.e2e.predict_server import PredictServer, write_sums
from tests.model.predict_models import sample_pairs, sample_texts
from tests.model.predict_support import Reference

__all__ = ["TEXTS", "TOLERANCE", "ZOO", "Zoo", "alone", "inputs_of", "make_hostile", "storm"]

TOLERANCE = 1e-5
NUM_CALLERS = 16

Item = str | tuple[str, str]


@dataclass(frozen=True)
class Served:
    """A model of the zoo: how it is made, what it does."""

    kind: str
    task: Task = Task.CLASSIFY
    pooling: str = ""


ZOO = {
    **{
        family: Served(family)
        for family in ("bert", "distilbert", "roberta", "deberta", "deberta-v2", "gpt2", "t5", "bart")
    },
    "topics": Served("roberta-multilabel"),
    "entities": Served("bert-tokens", Task.CLASSIFY_TOKENS),
    "price": Served("bert-regression", Task.REGRESS),
    "grade": Served("t5-regression", Task.REGRESS),
    **{f"vectors-{how}": Served("bert-embed", Task.EMBED, how) for how in ("mean", "cls", "last")},
}
TEXTS = [*sample_texts(12, seed=21, max_words=6), "naïve café 東京", "a"]
PAIRS = sample_pairs(6, seed=22, max_words=3)


class PickledCanary:
    """Unpickling it leaves a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@dataclass(frozen=True)
class Zoo:
    """The server and its model root."""

    server: PredictServer
    root: Path
    canary: Path
    answers: dict[str, list[tuple[Item, Any, int]]] = field(default_factory=dict)
    """What the storm of calls got: input, prediction, and the inputs in its call's largest batch."""


def make_hostile(root: Path, outside: Path, canary: Path) -> None:
    """Put folders beside the good ones that must not be loaded."""
    for name in ("intact", "altered", "renamed-pickle", "own-code", "linked-weights"):
        shutil.copytree(root / "bert", root / name)
    for name in ("intact", "altered"):
        write_sums(root / name)
    weights = bytearray((root / "altered" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (root / "altered" / "model.safetensors").write_bytes(weights)
    (root / "renamed-pickle" / "model.safetensors").write_bytes(pickle.dumps(PickledCanary(canary)))
    config = json.loads((root / "own-code" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil"}
    (root / "own-code" / "config.json").write_text(json.dumps(config))
    (root / "own-code" / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    shutil.copytree(root / "bert", outside)
    (root / "linked-weights" / "model.safetensors").unlink()
    (root / "linked-weights" / "model.safetensors").symlink_to(outside / "model.safetensors")
    (root / "linked-folder").symlink_to(outside, target_is_directory=True)


async def storm(zoo: Zoo) -> None:
    """Let many callers ask all models at once, each in an order of its own; nothing is loaded before."""
    async with zoo.server.client() as client:
        await asyncio.gather(*(_call_all(client, zoo, random.Random(seed)) for seed in range(NUM_CALLERS)))


async def _call_all(client: AsyncClient, zoo: Zoo, draw: random.Random) -> None:
    names = draw.sample(2 * list(ZOO), 2 * len(ZOO))
    for name in names:
        items = draw.sample(inputs_of(name), draw.randint(1, 6))
        result = await client.predict(items, model=name, top_k=0)
        assert (result.model, result.version) == (name, "1")
        zoo.answers.setdefault(name, []).extend(
            (item, prediction, result.timings.batch_size)
            for item, prediction in zip(items, result, strict=True)
        )


def inputs_of(name: str) -> list[Item]:
    """Return what a model is asked; labels of tokens are compared on texts alone."""
    return [*TEXTS] if ZOO[name].task is Task.CLASSIFY_TOKENS else [*TEXTS, *PAIRS]


class Alone:
    """transformers by itself, one input at a time."""

    def __init__(self, folder: Path, served: Served) -> None:
        self.served = served
        self.reference = Reference(folder, served.task)
        self._of = functools.cache(self.reference.of)

    def check(self, item: Item, prediction: Any) -> None:
        """Compare a prediction of the service with what comes out here."""
        assert prediction.num_tokens > 0
        assert not prediction.truncated
        match self.served.task:
            case Task.CLASSIFY:
                self._check_label(item, prediction)
            case Task.CLASSIFY_TOKENS:
                self._check_tokens(item, prediction)
            case Task.REGRESS:
                wanted = self._of(item).logits[0].numpy()
                np.testing.assert_allclose(prediction.values, wanted, rtol=TOLERANCE, atol=TOLERANCE)
            case Task.EMBED:
                hidden = self._of(item).last_hidden_state[0].numpy()
                wanted = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[self.served.pooling]
                wanted = wanted / np.linalg.norm(wanted)
                np.testing.assert_allclose(np.asarray(prediction.vector), wanted, rtol=0, atol=TOLERANCE)

    def _check_label(self, item: Item, prediction: kvserve.Classification) -> None:
        logits = self._of(item).logits[0]
        labels = list(self.reference.model.config.id2label.values())
        if self.served.kind.endswith("multilabel"):
            wanted = logits.sigmoid().numpy()
            assert prediction.labels == tuple(
                label for label, score in zip(labels, wanted, strict=True) if score >= 0.5
            )
        else:
            wanted = logits.softmax(-1).numpy()
        found = [score.score for score in prediction.scores]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
        assert [score.label for score in prediction.scores] == labels
        assert prediction.label == labels[int(wanted.argmax())]
        assert prediction.score == max(found)

    def _check_tokens(self, item: Item, prediction: kvserve.TokenClassification) -> None:
        inputs = self.reference.tokenizer(
            item, return_tensors="pt", return_offsets_mapping=True, return_special_tokens_mask=True
        )
        own = inputs.pop("special_tokens_mask")[0] == 0
        spans = inputs.pop("offset_mapping")[0][own].tolist()
        wanted = self.reference.of_inputs(inputs).logits[0][own].softmax(-1).numpy()
        labels = self.reference.model.config.id2label
        assert [(token.label, token.start, token.end) for token in prediction.tokens] == [
            (labels[int(scores.argmax())], *span) for scores, span in zip(wanted, spans, strict=True)
        ]
        found = [token.score for token in prediction.tokens]
        np.testing.assert_allclose(found, wanted.max(-1), rtol=0, atol=TOLERANCE)


@functools.cache
def alone(root: Path, name: str) -> Alone:
    return Alone(root / ZOO[name].kind, ZOO[name])
