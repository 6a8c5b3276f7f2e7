"""Predictors by name: those registered here, and those that installed packages bring.

A package offers one through the entry point group ``kvserve.predictors``::

    [project.entry-points."kvserve.predictors"]
    churn = "ourpackage.churn:make_predictor"      # () -> server.predict.reuse.Predictor

Installed packages run their own code, as everything that an operator installs does; nothing is imported
before its name is asked for.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

from server.predict.errors import ModelRefusedError
from server.predict.reuse.builtin import make_builtin
from server.predict.reuse.predictor import Predictor, PredictorFactory

__all__ = ["ENTRY_POINTS", "make_predictor", "register_predictor"]

ENTRY_POINTS = "kvserve.predictors"

log = logging.getLogger("kvserve.predict.reuse")

_factories: dict[str, PredictorFactory] = {"builtin": make_builtin}


def register_predictor(name: str, factory: PredictorFactory) -> None:
    """Let ``name`` be what ``factory`` makes. Raises ``ValueError`` if the name is empty or taken."""
    if not name or name in _factories:
        raise ValueError(f"a predictor needs a name of its own, not {name!r}")
    _factories[name] = factory


def make_predictor(name: str) -> Predictor:
    """Make the predictor of this name. Raises ``ModelRefusedError``: there is none, or it cannot be made."""
    factory = _factories.get(name)
    try:
        if factory is None:
            found = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name]
            if not found:
                raise ModelRefusedError(f"no predictor {name!r} is registered")
            factory = found[0].load()
        made: object = factory()
    except ModelRefusedError:
        raise
    except Exception as fault:  # somebody else's code: it refuses this model alone
        log.error("predictor %s could not be made: %r", name, fault)
        raise ModelRefusedError(f"the predictor {name!r} could not be made") from fault
    if not isinstance(made, Predictor):
        raise ModelRefusedError(f"what is registered as {name!r} makes no predictor")
    return made
