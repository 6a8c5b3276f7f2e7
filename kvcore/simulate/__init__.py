"""Replay a trace of requests through the policies that serve: ``python -m kvcore.simulate --help``.

Rates are percent. A hit is the longest cached prefix; its tokens are the matched blocks' tokens, never
more than the prompt's length.
"""

from __future__ import annotations

from kvcore.simulate.optimal import OPTIMAL, OptimalPolicy
from kvcore.simulate.replay import Half, SimulationResult, simulate
from kvcore.simulate.traces import Trace, TraceError, TraceRequest, read_trace

__all__ = [
    "OPTIMAL",
    "Half",
    "OptimalPolicy",
    "SimulationResult",
    "Trace",
    "TraceError",
    "TraceRequest",
    "read_trace",
    "simulate",
]
