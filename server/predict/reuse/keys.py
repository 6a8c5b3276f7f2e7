"""What rows are kept under: their first features, exact or in bins, and whose they are.

A key is bytes, the tenant's salt and then the features: two tenants never share one. What the key says of the
inputs stays inside; outside it is named by a keyed digest, which guessing features does not undo.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import numpy as np

from server.predict.reuse.predictor import Singles

__all__ = ["KeyNames", "KeyRule", "shares_of"]


@dataclass(frozen=True, slots=True)
class KeyRule:
    """The first ``num_features`` of a row, rounded to multiples of ``bin_width`` (0: exact)."""

    num_features: int
    bin_width: float = 0.0

    def keys(self, rows: Singles, tenant: str = "") -> list[bytes]:
        """Return the key of each row of [n, F]. A zero's sign does not matter."""
        owner = tenant.encode()
        part = rows[:, : self.num_features]
        binned = np.rint(part.astype(np.float64) / self.bin_width) + 0.0 if self.bin_width else part + 0.0
        data = binned.tobytes()
        size = len(data) // len(rows) if len(rows) else 0
        return [owner + data[start : start + size] for start in range(0, len(data), size)] if data else []

    def owner_of(self, key: bytes) -> bytes:
        """Return the tenant's part of a key: what comes before the features."""
        return key[: -self.num_features * (8 if self.bin_width else 4)]


def shares_of(rows: Singles, rule: KeyRule, seed: int) -> list[float]:
    """Return a number in [0, 1) for each row, always the same for rows with the same key."""
    salt = seed.to_bytes(16, "little", signed=True)
    digests = (hashlib.blake2b(key, digest_size=7, key=salt).digest() for key in rule.keys(rows))
    return [int.from_bytes(digest, "little") / 2**56 for digest in digests]


class KeyNames:
    """Names of keys for reports, events and logs. They mean nothing in another process."""

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)

    def name(self, key: bytes) -> str:
        """Return 16 hexadecimal digits."""
        return hashlib.blake2b(key, digest_size=8, key=self._salt).hexdigest()
