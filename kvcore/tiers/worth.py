"""Whether bringing KV from a tier beats computing it again, from what both were measured to take.

Both sides are lines through few numbers, kept current by every real fetch and every real step::

    fetch(bytes)          =  latency  +  bytes / bandwidth  +  overhead         per tier, and the engine's own
    recompute(n, start)   =  linear * n  +  attention * n * (start + n / 2)     of this model

The second term grows with the position because a token attends to everything before it. So a slow tier can
lose for a short prefix and win for a long one; ``crossover_tokens`` says where.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Decision", "DecisionReason", "TierSpeed", "Worth"]


_START_BYTES = (float(1 << 16), float(1 << 22))


class DecisionReason(StrEnum):
    """Why it was decided so."""

    FETCH_FASTER = "fetch_faster"
    HIDDEN = "hidden_by_queue"
    """The fetch ends before the request would have been admitted anyway."""
    RECOMPUTE_FASTER = "recompute_faster"
    UNMEASURED = "unmeasured"
    """One side has never been seen: fetch, which is how it becomes known."""
    NOTHING = "nothing_to_fetch"


_MAX_OVERHEAD_SURPRISE = 4.0
_LEAST_OVERHEAD_S = 0.0005


@dataclass(frozen=True, slots=True)
class Decision:
    """Fetch or recompute, and the figures it rests on."""

    fetch: bool
    fetch_s: float | None
    """Expected, from submission to the last byte. None: not known."""
    recompute_s: float | None
    reason: DecisionReason


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """A tier as it is known now."""

    latency_s: float
    read_bytes_per_s: float
    write_bytes_per_s: float
    """0 until known."""


class _Line:
    """``y = a * x + b * z`` with a, b >= 0, fitted to recent observations; old ones fade.

    Least squares of the relative error: a row is divided by what such a one took at first, so that long ones
    do not drown the short. One observation counts as at most ``_MAX_SURPRISE`` times the expectation: a
    hiccup moves little, a lasting change moves everything within a few observations.
    """

    _FADE = 0.85
    _MAX_SURPRISE = 4.0
    _PRIOR = 0.01
    """Weight, in rows, of staying where the line was: decides what the observations leave open."""

    def __init__(self, *, splits_first: bool) -> None:
        """``splits_first``: give half of the first observation to each term; else all to the first one."""
        self._splits_first = splits_first
        self._a: float | None = None
        self._b: float | None = None
        self._scale: tuple[float, float] = (0.0, 0.0)
        self._xx = self._xz = self._zz = self._xy = self._zy = 0.0

    @property
    def is_known(self) -> bool:
        return self._a is not None

    @property
    def a(self) -> float:
        return self._a or 0.0

    @property
    def b(self) -> float:
        return self._b or 0.0

    def predict(self, x: float, z: float) -> float:
        return self.a * x + self.b * z

    def start_at(self, a: float, b: float) -> None:
        """Take a first measurement, as if small and large ones had been observed a few times."""
        self._a, self._b = self._scale = a, b
        self._xx = self._xz = self._zz = self._xy = self._zy = 0.0
        for z in _START_BYTES:
            for _ in range(3):
                self.observe(1.0, z, self.predict(1.0, z))

    def observe(self, x: float, z: float, y: float) -> None:
        """Learn from one observation; what cannot be one (nothing done, no time) is left out."""
        if not (math.isfinite(y) and y > 0) or x + z <= 0:
            return
        expected = self.predict(x, z)
        if self._a is None or expected <= 0:
            # Until observations of other sizes tell.
            num_terms = (x > 0) + (z > 0) if self._splits_first else 1
            self._a, self._b = self._scale = (
                y / (num_terms * x) if x > 0 else 0.0,
                y / (num_terms * z) if z > 0 and (num_terms == 2 or x <= 0) else 0.0,
            )
            expected = y
        y = min(y, self._MAX_SURPRISE * expected)
        usual = self._scale[0] * x + self._scale[1] * z or expected
        x, z, y = x / usual, z / usual, y / usual
        fade = self._FADE
        self._xx, self._xz, self._zz = (
            fade * self._xx + x * x,
            fade * self._xz + x * z,
            fade * self._zz + z * z,
        )
        self._xy, self._zy = fade * self._xy + x * y, fade * self._zy + z * y
        self._solve()

    def _solve(self) -> None:
        # The prior pulls each coefficient to its last value with a share of the row's own scale.
        px, pz = self._PRIOR * self._xx, self._PRIOR * self._zz
        xx, zz = self._xx + px, self._zz + pz
        xy, zy = self._xy + px * self.a, self._zy + pz * self.b
        determinant = xx * zz - self._xz * self._xz
        if xx <= 0 or zz <= 0 or determinant <= 1e-12 * xx * zz:
            # Only one of the terms has ever been seen.
            self._a, self._b = (xy / xx, self.b) if xx > 0 else (self.a, zy / zz)
            return
        a = (xy * zz - zy * self._xz) / determinant
        b = (zy * xx - xy * self._xz) / determinant
        if a < 0:
            a, b = 0.0, zy / zz
        elif b < 0:
            a, b = xy / xx, 0.0
        self._a, self._b = a, b


class Worth:
    """What fetching from each tier and recomputing take, and the decisions that follow. One thread."""

    def __init__(
        self,
        *,
        device_bytes_per_s: float = math.inf,
        write_weight: float = 0.1,
        margin: float = 1.0,
        overhead_s: float = 0.0,
    ) -> None:
        """Know nothing yet.

        ``device_bytes_per_s``: copying into the device's memory, added to every fetch. ``write_weight``: how
        much a second of a tier's writing counts against one of the model's (it is beside the step).
        ``margin``: a fetch must take less than recomputing by this factor.
        """
        if device_bytes_per_s <= 0 or write_weight < 0 or margin <= 0:
            raise ValueError("device_bytes_per_s and margin > 0, write_weight >= 0")
        self._device_bytes_per_s = device_bytes_per_s
        self._write_weight = write_weight
        self._margin = margin
        self._overhead_s = overhead_s
        self._fetches: dict[str, _Line] = {}
        self._write_bytes_per_s: dict[str, float] = {}
        # The attention term is small until prefixes are long: a first short computation tells nothing of it.
        self._recompute = _Line(splits_first=False)

    # ------------------------------------------------------------------------------------- what was seen

    def start_tier(
        self, tier: str, *, latency_s: float, read_bytes_per_s: float, write_bytes_per_s: float = 0.0
    ) -> None:
        """Take over what a tier measured of itself at its start."""
        if read_bytes_per_s > 0:
            self._fetches.setdefault(tier, _Line(splits_first=True)).start_at(latency_s, 1 / read_bytes_per_s)
        if write_bytes_per_s > 0:
            self._write_bytes_per_s[tier] = write_bytes_per_s

    def observe_fetch(self, tier: str, num_bytes: int, seconds: float) -> None:
        """Learn from objects that came together: their bytes, and the time from submission to the last."""
        if num_bytes > 0:
            self._fetches.setdefault(tier, _Line(splits_first=True)).observe(1.0, float(num_bytes), seconds)

    def observe_restore(self, expected_s: float, took_s: float) -> None:
        """Learn what the engine adds from a restore that nothing else held up: expected, and what it took."""
        if math.isfinite(took_s) and took_s > 0:
            extra_s = max(0.0, took_s - (expected_s - self._overhead_s))
            surprise_s = min(extra_s, _MAX_OVERHEAD_SURPRISE * max(self._overhead_s, _LEAST_OVERHEAD_S))
            self._overhead_s += 0.2 * (surprise_s - self._overhead_s)

    def observe_write(self, tier: str, bytes_per_s: float) -> None:
        """Take over a tier's current figure of its writing."""
        if bytes_per_s > 0:
            self._write_bytes_per_s[tier] = bytes_per_s

    def observe_recompute(self, num_tokens: int, start_position: int, seconds: float) -> None:
        """Learn from ``num_tokens`` of one sequence, from ``start_position``, computed in ``seconds``."""
        if num_tokens > 0:
            self._recompute.observe(
                float(num_tokens), num_tokens * (start_position + num_tokens / 2), seconds
            )

    # --------------------------------------------------------------------------------------- what it tells

    def is_measured(self, tier: str) -> bool:
        line = self._fetches.get(tier)
        return line is not None and line.is_known

    def speed(self, tier: str) -> TierSpeed | None:
        """Return what is known of a tier; None while nothing is."""
        line = self._fetches.get(tier)
        if line is None or not line.is_known:
            return None
        bandwidth = 1 / line.b if line.b > 0 else math.inf
        return TierSpeed(line.a, bandwidth, self._write_bytes_per_s.get(tier, 0.0))

    def fetch_s(self, tier: str, num_bytes: int) -> float | None:
        """Return the expected time to bring ``num_bytes`` and copy them into the device; None: not known."""
        line = self._fetches.get(tier)
        if line is None or not line.is_known:
            return None
        fetch_s = line.predict(1.0, float(num_bytes)) + num_bytes / self._device_bytes_per_s
        return fetch_s + self._overhead_s

    def recompute_s(self, num_tokens: int, start_position: int = 0) -> float | None:
        """Return the expected time to compute tokens from a position on; None: not known."""
        if not self._recompute.is_known:
            return None
        return self._recompute.predict(num_tokens, num_tokens * (start_position + num_tokens / 2))

    def decide(
        self, tier: str, *, num_bytes: int, num_tokens: int, start_position: int, queue_wait_s: float = 0.0
    ) -> Decision:
        """Decide for one request: what of the fetch does not hide behind its wait, against recomputing."""
        return self.decide_between(
            self.fetch_s(tier, num_bytes), self.recompute_s(num_tokens, start_position), queue_wait_s
        )

    def decide_between(
        self, fetch_s: float | None, recompute_s: float | None, queue_wait_s: float = 0.0
    ) -> Decision:
        """Decide from the two times."""
        if fetch_s is None or recompute_s is None:
            return Decision(
                fetch=True, fetch_s=fetch_s, recompute_s=recompute_s, reason=DecisionReason.UNMEASURED
            )
        if fetch_s <= queue_wait_s:
            return Decision(
                fetch=True, fetch_s=fetch_s, recompute_s=recompute_s, reason=DecisionReason.HIDDEN
            )
        wins = (fetch_s - queue_wait_s) * self._margin < recompute_s
        reason = DecisionReason.FETCH_FASTER if wins else DecisionReason.RECOMPUTE_FASTER
        return Decision(fetch=wins, fetch_s=fetch_s, recompute_s=recompute_s, reason=reason)

    def crossover_tokens(self, tier: str, *, bytes_per_token: float, start_position: int = 0) -> float | None:
        """Return the length from which fetching wins; ``inf`` if it never does, None if not known.

        The root of ``linear n + attention n (start + n/2) = (latency + bytes n / bandwidth) * margin``. The
        left side bends upwards and the right is straight from a positive latency, so there is one.
        """
        line = self._fetches.get(tier)
        if line is None or not line.is_known or not self._recompute.is_known:
            return None
        per_token = self._margin * bytes_per_token * (line.b + 1 / self._device_bytes_per_s)
        latency = self._margin * (line.a + self._overhead_s)
        slope = self._recompute.a + self._recompute.b * start_position - per_token
        bend = self._recompute.b / 2
        if bend == 0:
            return latency / slope if slope > 0 else math.inf
        return (-slope + math.sqrt(slope * slope + 4 * bend * latency)) / (2 * bend)

    def is_worth_storing(
        self, tier: str, *, num_bytes: int, num_tokens: int, start_position: int, expected_reuses: float = 1.0
    ) -> bool:
        """Say whether one block should go down to a tier.

        A block comes back together with its prefix, so the latency is not charged to it: what counts is its
        bytes against its tokens. What can never win a fetch is not stored; nor what is not expected to be
        reused often enough to pay for the write. Unknown: yes.
        """
        line = self._fetches.get(tier)
        recompute_s = self.recompute_s(num_tokens, start_position)
        if line is None or not line.is_known or recompute_s is None:
            return True
        fetch_s = self._margin * num_bytes * (line.b + 1 / self._device_bytes_per_s)
        written_per_s = self._write_bytes_per_s.get(tier, 0.0)
        write_s = num_bytes / written_per_s if written_per_s > 0 else 0.0
        return (
            recompute_s > fetch_s and expected_reuses * (recompute_s - fetch_s) > self._write_weight * write_s
        )
