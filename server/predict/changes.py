"""What operators have changed at run time, kept by the front end so that a new process can be told.

::

    LoadModel with a source   ("load", model, version)    entered again; loaded on first use
    UnloadModel               ("held", model, version)    unloaded again; gone once the version is loaded
    SetAlias                  ("alias", model, alias)     with its share; empty if it was taken away

Of each the last one counts. Only what succeeded is remembered, as it came out: with the version that it got.
"""

from __future__ import annotations

import logging

import msgspec

from server.predict.messages import LoadModel, ModelList, OneModel, SetAlias, UnloadModel

__all__ = ["Change", "Changes"]

log = logging.getLogger(__name__)

MAX_CHANGES = 20_000
"""As many as the catalogue has versions, and their aliases; the oldest are forgotten."""
LATEST = "latest"
"""The alias that has no share of its own."""

Change = LoadModel | UnloadModel | SetAlias


class Changes:
    """The changes that are in force, in the order in which they were made. Not thread-safe."""

    def __init__(self) -> None:
        self._changes: dict[tuple[str, str, str], Change] = {}

    def __len__(self) -> int:
        return len(self._changes)

    def note(self, op: object, result: object) -> None:
        """Take note of an operation that succeeded; one that changes nothing for later is passed over."""
        match op, result:
            case LoadModel(), OneModel(model):
                self._changes.pop(("held", model.name, model.version), None)
                if op.source:
                    self._put(
                        "load", model.version, msgspec.structs.replace(op, version=model.version, lazy=True)
                    )
            case UnloadModel(), ModelList(models):
                for model in models:
                    self._put("held", model.version, UnloadModel(op.model, model.version))
            case SetAlias(), _:
                self._put("alias", op.alias, self._with_share(op))
            case _:
                pass

    def forget(self, change: Change) -> None:
        """Forget a change, if it still stands as it was returned."""
        for key, present in self._changes.items():
            if present is change:
                del self._changes[key]
                return

    def to_repeat(self) -> list[Change]:
        """Return what to do again."""
        return list(self._changes.values())

    def _put(self, kind: str, name: str, change: Change) -> None:
        key = (kind, change.model, name)
        self._changes.pop(key, None)
        self._changes[key] = change
        if len(self._changes) > MAX_CHANGES:
            oldest = next(iter(self._changes))
            del self._changes[oldest]
            log.warning("too many changes at run time: after a restart one of %s is not repeated", oldest[1])

    def _with_share(self, op: SetAlias) -> SetAlias:
        """Return the operation with the share that the alias has now: none given leaves what it had."""
        before = self._changes.get(("alias", op.model, op.alias))
        if op.traffic_share is not None or op.alias == LATEST or not isinstance(before, SetAlias):
            return op
        return msgspec.structs.replace(op, traffic_share=before.traffic_share if before.version else 0.0)
