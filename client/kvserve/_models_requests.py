"""From arguments to the calls about models and their reuse, for both clients.

Refused here, with ``ValueError`` or ``TypeError`` that name the argument: what can't mean anything to any
server. The rest is the server's to judge.
"""

from __future__ import annotations

from kvserve import _calls
from kvserve._calls import Call
from kvserve._fields import check_seconds, fill_duration, set_field
from kvserve._options import TimeoutOptions, check_options
from kvserve._predict_inputs import ModelOptions
from kvserve._requests import CallFactory
from kvserve.v1 import cache_admin_pb2 as pb

__all__ = ["LoadOptions", "ModelCalls", "ReuseOptions"]


class LoadOptions(TimeoutOptions, total=False):
    """Keyword arguments of ``models.load``. None and absent mean the same."""

    version: str | None
    """Of a predict model. Default: the latest; with ``source``: the next number."""
    source: str | None
    """Add this version first: a folder below the server's model root, "hf:owner/name@commit" or
    "models:/name/version" of the server's MLflow registry. ``AlreadyExists`` if the version is there with
    another source, task or pooling; the same again is no error."""
    task: str | None
    """With ``source``: "classify", "classify_tokens", "regress" or "embed". Default: as the model says."""
    pooling: str | None
    """With ``source``: "mean", "cls" or "last". Default: as the model says."""


class ReuseOptions(ModelOptions, total=False):
    """Keyword arguments of ``models.reuse``."""

    max_keys: int | None
    """How many of the keys with the highest risk to list, at most 1,000. Default: 0."""


class ModelCalls:
    """Makes the calls of CacheAdminService about models."""

    def __init__(self, factory: CallFactory) -> None:
        self._factory = factory

    def list_models(self, options: TimeoutOptions) -> Call[pb.ListModelsRequest, pb.ListModelsResponse]:
        """Make a call of ListModels."""
        check_options(options, TimeoutOptions, method="list")
        return self._factory.call(_calls.LIST_MODELS, pb.ListModelsRequest(), options)

    def load(self, name: str, options: LoadOptions) -> Call[pb.LoadModelRequest, pb.LoadModelProgress]:
        """Make a call of LoadModel."""
        check_options(options, LoadOptions, method="load")
        if not options.get("source"):
            for argument in ("task", "pooling"):
                if options.get(argument):
                    raise TypeError(f"load(): {argument} needs source")
        request = pb.LoadModelRequest()
        _fill_model(request, name)
        for field in ("version", "source", "task", "pooling"):
            set_field(request, field, options.get(field))
        return self._factory.call(_calls.LOAD_MODEL, request, options)

    def unload(
        self, name: str, drain_s: float | None, options: ModelOptions
    ) -> Call[pb.UnloadModelRequest, pb.UnloadModelResponse]:
        """Make a call of UnloadModel."""
        check_options(options, ModelOptions, method="unload")
        request = pb.UnloadModelRequest()
        _fill_model(request, name)
        check_seconds("drain_s", drain_s)
        fill_duration(request.drain, drain_s, field="drain")
        set_field(request, "version", options.get("version"))
        return self._factory.call(_calls.UNLOAD_MODEL, request, options)

    def set_alias(
        self, name: str, alias: str, version: str | None, traffic_share: float | None, options: TimeoutOptions
    ) -> Call[pb.SetModelAliasRequest, pb.SetModelAliasResponse]:
        """Make a call of SetModelAlias."""
        check_options(options, TimeoutOptions, method="set_alias")
        if not alias:
            raise ValueError("an alias can't be empty")
        if traffic_share is not None and not 0 <= traffic_share <= 1:
            raise ValueError("traffic_share must be from 0 to 1")
        request = pb.SetModelAliasRequest()
        _fill_model(request, name)
        set_field(request, "alias", alias)
        set_field(request, "version", version)
        set_field(request, "traffic_share", traffic_share)
        return self._factory.call(_calls.SET_MODEL_ALIAS, request, options)

    def reuse(self, name: str, options: ReuseOptions) -> Call[pb.GetReuseRequest, pb.GetReuseResponse]:
        """Make a call of GetReuse."""
        check_options(options, ReuseOptions, method="reuse")
        request = pb.GetReuseRequest()
        _fill_model(request, name)
        set_field(request, "version", options.get("version"))
        set_field(request, "max_keys", options.get("max_keys"))
        return self._factory.call(_calls.GET_REUSE, request, options)

    def watch_reuse(
        self, name: str | None, options: TimeoutOptions
    ) -> Call[pb.WatchReuseRequest, pb.ReuseEvent]:
        """Make a call of WatchReuse: without a deadline unless it names one of its own."""
        check_options(options, TimeoutOptions, method="watch_reuse")
        request = pb.WatchReuseRequest()
        set_field(request, "model", name)
        unending: TimeoutOptions = {"timeout_s": options.get("timeout_s")}
        return self._factory.call(_calls.WATCH_REUSE, request, unending)

    def clear_reuse(
        self, name: str, options: ModelOptions
    ) -> Call[pb.ClearReuseRequest, pb.ClearReuseResponse]:
        """Make a call of ClearReuse."""
        check_options(options, ModelOptions, method="clear_reuse")
        request = pb.ClearReuseRequest()
        _fill_model(request, name)
        set_field(request, "version", options.get("version"))
        return self._factory.call(_calls.CLEAR_REUSE, request, options)


_ModelRequest = (
    pb.LoadModelRequest
    | pb.UnloadModelRequest
    | pb.SetModelAliasRequest
    | pb.GetReuseRequest
    | pb.ClearReuseRequest
)


def _fill_model(request: _ModelRequest, name: str) -> None:
    if not name:
        raise ValueError("a model's name can't be empty")
    set_field(request, "model", name)
