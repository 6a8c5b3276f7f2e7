"""Where a model is computed and in which precision."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from server.worker.checkpoint import WeightFile
from server.worker.errors import ModelLoadError

__all__ = ["DTYPES", "choose_device", "num_elements", "stored_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(wanted: str) -> torch.device:
    """Return the device of this name, or the best one for "auto". Raises ``ModelLoadError``."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ModelLoadError(f"{wanted!r} is not a device") from None
    if not {"cpu": True, "cuda": has_cuda, "mps": has_mps}.get(device.type, False):
        raise ModelLoadError(f"device {wanted!r} is not available here")
    return device


def stored_dtype(files: Iterable[WeightFile]) -> torch.dtype:
    """Return the precision that weights are stored in; float32 if any of them are."""
    stored = {tensor.dtype for file in files for tensor in file.tensors}
    if "F32" in stored:
        return torch.float32
    return torch.bfloat16 if "BF16" in stored else torch.float16 if "F16" in stored else torch.float32


def num_elements(files: Iterable[WeightFile]) -> int:
    """Return how many numbers the files hold."""
    return sum(math.prod(tensor.shape) for file in files for tensor in file.tensors)
