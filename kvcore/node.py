"""One node of the prefix tree: a block, its tokens, and what hangs below it."""

from __future__ import annotations

from array import array
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any

from kvcore.blocks import BlockId
from kvcore.errors import IntegrityError

if TYPE_CHECKING:
    from kvcore.cursors import CursorGroup
    from kvcore.keys import PrefixDigest
    from kvcore.lease import Lease
    from kvcore.pins import Pin
    from kvcore.spaces import Space
    from kvcore.tails import Tail

__all__ = ["Key", "Node", "NodeState", "key_of"]

Key = bytes | tuple[int, bytes]
"""Packed tokens; for a private entry with its owner in front, which no packed tokens can spell."""

_serials = count(1)


def key_of(packed: bytes, owner: int | None) -> Key:
    """Return the key of an entry that ``owner`` alone may find, or everybody if it is None."""
    return packed if owner is None else (owner, packed)


class NodeState(Enum):
    """What a node's block holds."""

    OPEN = "open"
    """The leading ``len(tokens)`` slots, fewer than a block; others may copy them, not share them."""
    PENDING = "pending"
    """All slots once the running step is done: may be shared within this step, never copied."""
    READY = "ready"


class Node:
    """One cached block (or a namespace's root, whose block is None)."""

    __slots__ = (
        "block",
        "children",
        "cursors",
        "depth",
        "digest",
        "expires_at",
        "heat",
        "hits",
        "inserted_at",
        "is_lossy",
        "is_released",
        "last_used",
        "mark",
        "num_busy_children",
        "num_children",
        "num_holds",
        "open_children",
        "owner",
        "packed",
        "parent",
        "pin",
        "producer",
        "serial",
        "space",
        "state",
        "tails",
        "used_at",
    )

    def __init__(
        self, *, parent: Node | None, block: BlockId | None, owner: int | None, tick: int, space: Space
    ) -> None:
        self.space = space
        """Of its namespace; the same for the whole tree below a root."""
        self.parent = parent
        """None of a root, and of a node that was removed."""
        self.block = block
        self.owner = owner
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.packed = b""
        """Token ids of the settled slots, as ``kvcore.keys.pack_tokens`` packs them."""
        self.state = NodeState.OPEN
        self.children: dict[Key, Node] = {}
        self.open_children: dict[Node, None] = {}
        self.num_children = 0
        """All nodes whose parent this is, the displaced ones too (expired, and replaced under their key)."""
        self.num_holds = 0
        self.num_busy_children = 0
        self.last_used = tick
        self.used_at: float | None = None
        """When a request last began or ended with it; None before the first has ended."""
        self.inserted_at: float | None = None
        """When its first slot was filled: a block is as old as its oldest slot."""
        self.expires_at: float | None = None
        self.hits = 0
        self.heat: float | None = None
        """Uses that ended here, faded with time: see ``kvcore.heat``."""
        self.mark: Any = None
        """What the policy keeps of it; nobody else reads it."""
        self.digest: PrefixDigest | None = None
        """Kept by ``kvcore.index.digest_of`` once somebody has asked; None of an OPEN node."""
        self.pin: Pin | None = None
        """An operator's hold that ends here and covers the path to here."""
        self.is_released = False
        """Somebody said that it is not needed any more; a reuse takes that back."""
        self.is_lossy: bool = parent is not None and parent.is_lossy
        """A lossy codec had a hand in its content, or in what that was computed from."""
        self.producer: Lease | None = None
        """Who fills a PENDING node."""
        self.tails: dict[Key, Tail] | None = None
        self.cursors: dict[bytes | None, CursorGroup] | None = None
        self.serial = next(_serials)

    def __repr__(self) -> str:
        tokens = self.tokens
        shown = ",".join(map(str, tokens[:4])) + ("…" if len(tokens) > 4 else "")
        place = f"block={self.block} depth={self.depth} holds={self.num_holds}"
        return f"Node#{self.serial}({self.state.value} [{shown}] {place})"

    @property
    def tokens(self) -> tuple[int, ...]:
        """Unpack the token ids of the settled slots (of all slots while PENDING)."""
        return tuple(array("i", self.packed))

    @property
    def key(self) -> Key:
        """Return the key under which the parent lists a full node."""
        return key_of(self.packed, self.owner)

    @property
    def is_root(self) -> bool:
        return self.block is None

    @property
    def is_busy(self) -> bool:
        """Say whether a lease or a hard pin holds this node or one below it."""
        return self.num_holds > 0 or self.num_busy_children > 0

    def is_expired(self, now: float) -> bool:
        """Say whether the lifetime is over."""
        return self.expires_at is not None and self.expires_at <= now

    def limit_life(self, expires_at: float | None) -> None:
        """Let the node expire at ``expires_at`` at the latest."""
        if expires_at is not None and (self.expires_at is None or expires_at < self.expires_at):
            self.expires_at = expires_at

    def real_block(self) -> BlockId:
        """Return the block; raise ``IntegrityError`` for a root, which has none."""
        if self.block is None:
            raise IntegrityError(f"{self!r} has no block")
        return self.block

    def real_parent(self) -> Node:
        """Return the parent; raise ``IntegrityError`` for a root or a node that was removed."""
        if self.parent is None:
            raise IntegrityError(f"{self!r} is a root or was removed")
        return self.parent
