"""Parameters of requests and of requested outputs."""

from __future__ import annotations

from collections.abc import Sequence

from server.rpc.errors import InvalidArgument
from server.rpc.oip import open_inference_pb2 as pb
from server.rpc.oip.tensors import OutputTensor

__all__ = ["InferOptions", "wanted_tensor", "wanted_tensors"]

MAX_CLASSES = 10_000
_IGNORED = frozenset({"priority", "sequence_id", "sequence_start", "sequence_end", "binary_data_output"})
"""Parameters that Triton's clients may add and that mean nothing here."""


class InferOptions:
    """A request's parameters."""

    def __init__(self, request: pb.ModelInferRequest) -> None:
        """Raise :class:`InvalidArgument` for one that is not known or not of its type."""
        self.truncate = False
        self.reuse = True
        self.timeout_s: float | None = None
        for name, parameter in request.parameters.items():
            kind = parameter.WhichOneof("parameter_choice")
            if name == "truncate" and kind == "bool_param":
                self.truncate = parameter.bool_param
            elif name == "reuse" and kind == "bool_param":
                self.reuse = parameter.bool_param
            elif name == "timeout" and kind in ("int64_param", "uint64_param"):
                microseconds = parameter.int64_param or parameter.uint64_param
                self.timeout_s = microseconds * 1e-6 if microseconds > 0 else None
            elif name not in _IGNORED and not name.startswith("triton_"):
                known = "truncate and reuse (bool) and timeout (int, microseconds)"
                raise InvalidArgument.of("parameters", f"{name[:64]!r} is not known; known are {known}")


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
