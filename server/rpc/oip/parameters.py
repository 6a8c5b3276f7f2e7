"""Parameters of requests and of requested outputs."""

from __future__ import annotations

from collections.abc import Sequence

from server.rpc.errors import InvalidArgument
from server.rpc.oip import open_inference_pb2 as pb
from server.rpc.oip.tensors import OutputTensor
from server.rpc.validation import Violations

__all__ = ["InferOptions", "check_model", "check_repository", "wanted_tensor", "wanted_tensors"]

MAX_CLASSES = 10_000
MAX_ID_CHARS = 128
_IGNORED = frozenset({"priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"})
"""Parameters that Triton's clients may add and that mean nothing here."""


def check_model(name_field: str, name: str, version_field: str = "", version: str = "") -> None:
    """Refuse what cannot be a model's name before it goes anywhere. Raises :class:`InvalidArgument`.

    No name is none either: inside, it would stand for all models.
    """
    violations = Violations()
    if not name:
        violations.add(name_field, "must not be empty")
    violations.model_name(name_field, name)
    if version:
        violations.plain_name(version_field, version)
    violations.raise_if_any()


def check_repository(name: str) -> None:
    """Refuse to look at another repository than the catalogue. Raises :class:`InvalidArgument`."""
    if name:
        raise InvalidArgument.of("repository_name", "must be empty: there is one catalogue")


class InferOptions:
    """A request's parameters, and its id, which is echoed."""

    def __init__(self, request: pb.ModelInferRequest) -> None:
        """Raise :class:`InvalidArgument` for one that is not known or not of its type."""
        self.truncate = False
        self.reuse = True
        self.timeout_s: float | None = None
        violations = Violations()
        violations.printable("id", request.id, max_chars=MAX_ID_CHARS)
        violations.raise_if_any()
        for name, parameter in request.parameters.items():
            kind = parameter.WhichOneof("parameter_choice")
            if name == "truncate" and kind == "bool_param":
                self.truncate = parameter.bool_param
            elif name == "reuse" and kind == "bool_param":
                self.reuse = parameter.bool_param
            elif name == "timeout" and kind in ("int64_param", "uint64_param"):
                microseconds = parameter.int64_param or parameter.uint64_param
                if microseconds < 0:
                    raise InvalidArgument.of("parameters", "timeout must not be negative")
                self.timeout_s = microseconds * 1e-6 if microseconds else None
            elif name not in _IGNORED and not name.startswith("triton_"):
                known = "truncate and reuse (bool) and timeout (int, microseconds)"
                reason = f"{name[:64]!r} is not known, or not of its type; known are {known}"
                raise InvalidArgument.of("parameters", reason)


def wanted_tensors(
    outputs: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor], tensors: dict[str, OutputTensor]
) -> list[tuple[OutputTensor, int]]:
    """Return the requested tensors, each as :func:`wanted_tensor`; all of them if none is requested.

    Each at most once: an answer must not be many times what the model gave.
    """
    names = {output.name for output in outputs}
    if len(names) < len(outputs):
        raise InvalidArgument.of("outputs", "must not name a tensor twice")
    if not outputs:
        return [(tensor, 0) for tensor in tensors.values()]
    return [wanted_tensor(output, tensors) for output in outputs]


def wanted_tensor(
    output: pb.ModelInferRequest.InferRequestedOutputTensor, tensors: dict[str, OutputTensor]
) -> tuple[OutputTensor, int]:
    """Return a requested tensor, and how many classes of it are asked for instead."""
    if output.name not in tensors:
        raise InvalidArgument.of("outputs", f"the model gives {', '.join(tensors)}")
    num_classes = 0
    for name, parameter in output.parameters.items():
        if name == "classification" and output.name == "scores":
            num_classes = parameter.int64_param
            if not 1 <= num_classes <= MAX_CLASSES:
                raise InvalidArgument.of("outputs", f"classification must be between 1 and {MAX_CLASSES}")
        elif name != "binary_data":
            raise InvalidArgument.of("outputs", "the parameter classification is known, of scores alone")
    return tensors[output.name], num_classes
