"""Composition root of the predict process: ``python -m server.predict_main --fd N``.

The only module that knows the host, the sources, reuse and the models' code. Started by
``server.predict.process``. Torch is imported beside the start where text models are configured, else with the
first of them: a process that serves none stays small.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvcore.clock import Clock
from server.predict.errors import ModelRefusedError
from server.predict.messages import ReuseEvent
from server.predict.model import FoundModel, LoadProgress, PredictModel
from server.predict.options import ModelSpec, PredictOptions
from server.predict.serve import Outbox, serve
from server.process.memory import available_host_bytes

if TYPE_CHECKING:
    from server.predict.host import PredictHost
    from server.predict.sources import SourceFolder

__all__ = ["Loader", "build", "main"]

log = logging.getLogger(__name__)


class Loader:
    """Makes models of any kind: a ``ModelLoader``. Any loader thread."""

    def __init__(self, options: PredictOptions, *, clock: Clock) -> None:
        from server.predict.sources import Sources

        self._options = options
        self._clock = clock
        self._sources = Sources(
            model_root=options.model_root,
            mlflow_uri=options.mlflow_uri,
            cache_folder=None if options.download_folder is None else Path(options.download_folder),
            cache_bytes=options.download_bytes,
        )
        self._torch_lock = threading.Lock()
        self._torch_is_ready = False

    def warm_up(self) -> None:
        """Import what text models need, so that the first of them does not wait for it."""
        self._prepare_torch()
        import server.worker.predict  # noqa: F401 - for its imports

    def find(self, spec: ModelSpec, *, on_progress: LoadProgress) -> FoundModel:
        if spec.source is None:
            return _FoundPredictor(spec, self._clock)
        folder = self._sources.resolve(spec, on_progress=on_progress)
        try:
            self._prepare_torch()
            from server.worker.predict import text_model_bytes

            num_bytes = text_model_bytes(folder.folder, root=folder.root, spec=spec)
        except BaseException:
            folder.close()
            raise
        return _FoundTextModel(spec, folder, num_bytes, device=self._options.device, clock=self._clock)

    def _prepare_torch(self) -> None:
        """Import torch and give it its threads, once."""
        with self._torch_lock:
            if self._torch_is_ready:
                return
            import torch

            # Counts for every thread that has not used torch yet, the compute thread among them.
            torch.set_num_threads(_num_threads(self._options))
            self._torch_is_ready = True


@dataclass(frozen=True, slots=True)
class _FoundPredictor:
    """A stateful encoder: a ``FoundModel`` without files."""

    spec: ModelSpec
    clock: Clock
    num_bytes: int | None = None

    def load(
        self,
        *,
        on_progress: LoadProgress,
        on_reuse_event: Callable[[ReuseEvent], None],
        embedder: PredictModel | None = None,
    ) -> PredictModel:
        from server.predict.reuse import build_feature_model

        return build_feature_model(self.spec, clock=self.clock, on_event=on_reuse_event)

    def close(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _FoundTextModel:
    """A checked folder: a ``FoundModel``. Torch is ready."""

    spec: ModelSpec
    folder: SourceFolder
    num_bytes: int | None
    device: str
    clock: Clock

    def load(
        self,
        *,
        on_progress: LoadProgress,
        on_reuse_event: Callable[[ReuseEvent], None],
        embedder: PredictModel | None = None,
    ) -> PredictModel:
        model = self._load(on_progress)
        if self.spec.semantic is None:
            return model
        from server.predict.reuse import SemanticModel

        try:
            if embedder is None:
                raise ModelRefusedError("the embedder of the semantic cache is not there")
            return SemanticModel(
                model, embedder, self.spec.semantic, clock=self.clock, on_event=on_reuse_event
            )
        except BaseException:
            model.close()
            raise

    def close(self) -> None:
        self.folder.close()

    def _load(self, on_progress: LoadProgress) -> PredictModel:
        from server.worker.predict import load_text_model

        spec, folder = self.spec, self.folder
        for note in folder.notes:
            log.info("model %s version %s: %s", spec.name, spec.version, note)
        model = load_text_model(
            folder.folder, root=folder.root, spec=spec, device=self.device, on_progress=on_progress
        )
        try:
            folder.check_unchanged()
        except BaseException:
            model.close()
            raise
        return model


def build(options: PredictOptions, clock: Clock, outbox: Outbox) -> PredictHost:
    """Put the host together; nothing is loaded or started. Raises ``ModelRefusedError``."""
    # Late, so that the process listens to its front end at once.
    from server.predict.host import PredictHost

    if options.memory_bytes is None:
        options = msgspec.structs.replace(options, memory_bytes=available_host_bytes() // 2)
    loader = Loader(options, clock=clock)
    if options.model_root is not None or any(spec.source is not None for spec in options.models):
        threading.Thread(target=loader.warm_up, name="warm-up", daemon=True).start()
    return PredictHost(
        options, loader, clock=clock, send=outbox.send, send_all=outbox.send_all, is_settled=True
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the predict process; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="server.predict_main", description="The predict process of kvserve."
    )
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the front end")
    # Its own threads would take the cores from the batch that is being computed.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return serve(parser.parse_args(argv).fd, build)


def _num_threads(options: PredictOptions) -> int:
    """Return the threads for computing: as wanted, or one less than the cores, which is the front end's."""
    if options.num_threads is not None:
        return max(1, options.num_threads)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, cores - 1)


if __name__ == "__main__":
    sys.exit(main())
