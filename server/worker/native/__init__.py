"""Fused native CPU kernels: compiled for this machine at first use, loaded with ctypes.

``build`` compiles the C++ sources beside it, ``library`` mirrors their C interface, ``executor`` and
``attention`` put it behind the worker's interfaces. Where there is no compiler, :class:`NativeUnavailable`
says so, and the server takes another executor.
"""

from server.worker.native.attention import NativeAttention
from server.worker.native.build import NativeUnavailable
from server.worker.native.executor import NativeExecutor
from server.worker.native.library import NativeTools

__all__ = ["NativeAttention", "NativeExecutor", "NativeTools", "NativeUnavailable"]
