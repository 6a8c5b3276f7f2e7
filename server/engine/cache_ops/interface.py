"""What operations are made of: a refusal, the pieces of a long one, and what they ask of tiers and trials.

An operation is a generator: it does a bounded piece of work, yields (what there is to say of its progress,
or None), goes on when it is resumed between two later steps, and returns its answer. One that is short
yields never. It refuses by raising ``OperationRefused``, before it has changed anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvcore.clock import Clock
from kvcore.keys import NamespaceKey, PrefixDigest
from kvcore.manager import CacheManager
from kvcore.node import Node
from kvcore.spaces import Space
from server.engine.admin_messages import (
    AdminErrorKind,
    AdminRefusal,
    AdminResult,
    PrefetchReport,
    SnapshotDone,
    TierReport,
    TrialReport,
)

__all__ = [
    "MAX_NODES_PER_PIECE",
    "NoTiers",
    "Operation",
    "OperationContext",
    "OperationRefused",
    "SnapshotStep",
    "SnapshotWork",
    "TierView",
    "TrialView",
]

MAX_NODES_PER_PIECE = 2000
"""Blocks that an operation looks at before it lets the engine go on: some milliseconds."""


class OperationRefused(Exception):
    """An operation is not carried out; nothing has changed."""

    def __init__(self, kind: AdminErrorKind, reason: str, field: str = "") -> None:
        super().__init__(reason)
        self.refusal = AdminRefusal(kind, reason, field)


@dataclass(frozen=True, slots=True)
class SnapshotStep:
    """How far a snapshot is."""

    done_objects: int
    total_objects: int
    done_bytes: int
    skipped_objects: int


Operation = Generator[SnapshotStep | None, None, AdminResult]
SnapshotWork = Generator[SnapshotStep, None, SnapshotDone]


class TierView(Protocol):
    """What operations ask of the tiers below the device. Engine's thread; nothing blocks."""

    def blocks_of(self, digests: Sequence[PrefixDigest]) -> dict[str, int]:
        """Return how many of these blocks each tier has; tiers that have none may be left out."""
        ...

    def lookup_beyond(self, namespace: NamespaceKey, tokens: array[int], from_block: int) -> dict[str, int]:
        """Return, by tier, how many blocks of a prompt from ``from_block`` on would be brought back."""
        ...

    def remove(
        self, *, digests: Sequence[PrefixDigest] | None = None, namespace: PrefixDigest | None = None
    ) -> int:
        """Forget objects; return how many.

        Those of these prefixes and, as far as it is known, of what continues them; or those of a namespace
        (its seed); or, given neither, all.
        """
        ...

    def renew(self, nodes: Sequence[Node]) -> None:
        """Write the copies of these blocks anew: their lifetime is another, or they were removed."""
        ...

    def reports(self) -> list[TierReport]:
        """Return what each tier holds and has counted."""
        ...

    def prefetch(self) -> PrefetchReport:
        """Return what was fetched ahead."""
        ...

    def save(self, name: str, *, namespace: PrefixDigest | None, replace: bool) -> SnapshotWork:
        """Write a snapshot, an object or a few per piece. Closed early, it leaves nothing half done.

        Raises ``OperationRefused``: UNSUPPORTED, EXISTS, INVALID (``name``) or FAILED.
        """
        ...

    def restore(self, name: str) -> SnapshotWork:
        """Read a snapshot. Raises ``OperationRefused``: UNSUPPORTED, NOT_FOUND, INVALID or FAILED."""
        ...


class NoTiers:
    """The device alone."""

    def blocks_of(self, digests: Sequence[PrefixDigest]) -> dict[str, int]:
        return {}

    def lookup_beyond(self, namespace: NamespaceKey, tokens: array[int], from_block: int) -> dict[str, int]:
        return {}

    def remove(
        self, *, digests: Sequence[PrefixDigest] | None = None, namespace: PrefixDigest | None = None
    ) -> int:
        return 0

    def renew(self, nodes: Sequence[Node]) -> None:
        return None

    def reports(self) -> list[TierReport]:
        return []

    def prefetch(self) -> PrefetchReport:
        return PrefetchReport()

    def save(self, name: str, *, namespace: PrefixDigest | None, replace: bool) -> SnapshotWork:
        raise OperationRefused(AdminErrorKind.UNSUPPORTED, "no snapshot folder is configured (--snapshots)")

    def restore(self, name: str) -> SnapshotWork:
        raise OperationRefused(AdminErrorKind.UNSUPPORTED, "no snapshot folder is configured (--snapshots)")


class TrialView(Protocol):
    """Policies that run in the shadow of the live one."""

    @property
    def policies(self) -> Sequence[str]:
        """Return those on trial, besides the live one."""
        ...

    def choose(self, policies: Sequence[str]) -> None:
        """Try these from now on, instead of those before; none: no trial. Names are known to be valid."""
        ...

    def reports(self) -> list[TrialReport]:
        """Return what each would have hit."""
        ...


@dataclass(frozen=True, slots=True)
class OperationContext:
    """What operations work on."""

    cache: CacheManager
    clock: Clock
    fingerprint: str
    epoch: int
    tiers: TierView
    trial: TrialView | None
    largest_need: Callable[[], int]
    """Blocks that the largest accepted request needs: hard pins must leave them."""

    def namespace(self, salt: str) -> NamespaceKey:
        return NamespaceKey(self.fingerprint, salt=salt)

    def space_of(self, namespace_id: str) -> Space:
        """Return the namespace that people know by this id. Raises ``OperationRefused`` if there is none."""
        for space in self.cache.tree.spaces.all:
            if space.id == namespace_id:
                return space
        raise OperationRefused(AdminErrorKind.NOT_FOUND, "no such namespace is known", "namespace")
