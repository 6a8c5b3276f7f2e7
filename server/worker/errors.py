"""Why a worker could not start. Both are fit for an operator's eyes, neither for a client's.

WorkerStartError
    ModelLoadError      the model's files can not or may not be loaded
    UnsupportedModel    the model loads, but this server would compute it wrongly
"""

from __future__ import annotations

__all__ = ["ModelLoadError", "UnsupportedModel", "WorkerStartError"]


class WorkerStartError(Exception):
    """The worker can not serve what it was asked to."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ModelLoadError(WorkerStartError):
    """The model's files are missing, unreachable, damaged or of a kind that is not loaded."""


class UnsupportedModel(WorkerStartError):
    """The model's family or configuration can not be computed rightly over paged KV."""
