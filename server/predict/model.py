"""What a model is inside the predict process, whatever computes it.

::

    ModelLoader.find(spec) --> FoundModel           fetcher or loader thread
        .load() --> PredictModel                    loader thread
        .prepare(texts or rows) --> [Prepared]      tokenizer threads; checks what only the model can check
        .run([Prepared, ...]) --> [Output, ...]     one batch at a time over all models
        .close()                                    frees its memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from server.predict.messages import Inputs, ModelInfo, Output, ReuseEvent, ReuseReport
from server.predict.options import ModelSpec

__all__ = ["FoundModel", "LoadProgress", "ModelLoader", "PredictModel", "Prepared", "ReusingModel"]

LoadProgress = Callable[[str, int, int], None]
"""Called with a phase ("fetching", "checking", "reading", "building"), bytes done and in all (0: unknown)."""


class Prepared(msgspec.Struct, frozen=True):
    """One input, ready to be computed. A struct, since it is made for every input: a tenth of the time."""

    num_tokens: int
    """What it costs in a batch: tokens, or 1 for a row of features."""
    payload: Any
    """The model's own business."""
    truncated: bool = False
    reuse: bool = True
    tenant: str = ""


class PredictModel(Protocol):
    """A loaded model."""

    @property
    def info(self) -> ModelInfo: ...

    def prepare(self, inputs: Inputs, *, truncate: bool, reuse: bool, tenant: str) -> list[Prepared]:
        """Tokenize and check. Any thread, several at once. Raises ``InputError`` or ``WrongTaskError``."""
        ...

    def run(self, batch: Sequence[Prepared]) -> list[Output]:
        """Compute a batch; the outputs do not depend on what else is in it. Never two at once.

        Raises ``ComputeError``.
        """
        ...

    def close(self) -> None:
        """Free memory. Nothing is called afterwards."""
        ...


class ReusingModel(PredictModel, Protocol):
    """A model that reuses what was computed for other inputs, and knows the risk."""

    def reuse_report(self, *, max_keys: int) -> ReuseReport:
        """Return what reuse does; ``model`` and ``version`` are filled in by the caller. Any thread."""
        ...

    def clear_reuse(self) -> int:
        """Forget what is kept; return how many entries. Any thread."""
        ...


class ModelLoader(Protocol):
    """Finds models and makes them. Threads of the model cache, several at once; blocks."""

    def find(self, spec: ModelSpec, *, on_progress: LoadProgress) -> FoundModel:
        """Find what a model is made of, fetch it if need be, and check it; whoever asks closes it.

        ``on_progress`` may raise to give up. Raises ``PredictError``.
        """
        ...


class FoundModel(Protocol):
    """A model on this machine, checked, and not loaded. Its files stay where they are until it is closed."""

    @property
    def num_bytes(self) -> int | None:
        """Return an upper bound of the memory that the model will take; None: not known."""
        ...

    def load(
        self,
        *,
        on_progress: LoadProgress,
        on_reuse_event: Callable[[ReuseEvent], None],
        embedder: PredictModel | None = None,
    ) -> PredictModel:
        """Load it. ``embedder``: the model that ``spec.semantic`` names, loaded and kept so by the caller.

        Raises ``ModelRefusedError``; anything else is logged, and refuses the model without details.
        """
        ...

    def close(self) -> None:
        """Let go of the files; a model that was loaded from them is closed by now."""
        ...
