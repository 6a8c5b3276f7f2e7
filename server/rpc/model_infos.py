"""What the numbers of an answer mean: known to the backend, asked for after each answer."""

from __future__ import annotations

from server.predict.errors import PredictError, PredictLostError
from server.predict.interface import PredictBackend
from server.predict.messages import ModelInfo
from server.rpc.errors import Unavailable
from server.rpc.predict_errors import error_from_predict

__all__ = ["ModelInfos"]


class ModelInfos:
    """Of the versions of one backend. Event loop only."""

    def __init__(self, backend: PredictBackend) -> None:
        self._backend = backend
        self._known: dict[tuple[str, str], ModelInfo] = {}
        """Of versions that have answered: never more than the catalogue has had."""

    async def of(self, model: str, version: str) -> ModelInfo:
        """Return what a version's numbers mean, which has just answered. Raises errors of calls."""
        backend = self._backend
        try:
            info = (await backend.describe(model, version)).info
            if info is None:  # a description that was kept from before the model was loaded
                infos = {(one.name, one.version): one.info for one in (await backend.models()).models}
                info = infos.get((model, version))
        except PredictLostError as error:
            # Draining takes no questions any more, and the answer is there.
            info = self._known.get((model, version))
            if info is None:
                raise error_from_predict(error) from error
        except PredictError as error:
            raise error_from_predict(error) from error
        if info is None:  # another process than the one that answered
            raise Unavailable(
                "the model was lost while it answered", reason="PREDICT_LOST", retry_after_s=1.0
            )
        self._known[model, version] = info
        return info
