"""What an operator, or the lead of a conversation, may ask of cached prefixes: by node, between two steps.

Names are resolved elsewhere (``locate`` for tokens, ``kvcore.index`` for digests); what comes in here is a
node that is shared, settled and not expired. Nothing here gives anybody's request less than it holds.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.errors import IntegrityError
from kvcore.events import LeaveCause
from kvcore.keys import NamespaceKey
from kvcore.lanes import Canary, EvictionLanes
from kvcore.node import Node, NodeState
from kvcore.pins import PinBook, PinKind, PinOutcome
from kvcore.policies import EvictionPolicy
from kvcore.quotas import Quotas
from kvcore.reclaim import Reclaimer
from kvcore.selection import Selection
from kvcore.spaces import Space
from kvcore.tails import TailStore
from kvcore.tree import PrefixTree, num_common_tokens

__all__ = ["CacheControl", "Located", "own_run", "with_what_leads_only_there"]


@dataclass(frozen=True, slots=True)
class Located:
    """Where the tokens of a prefix lie."""

    node: Node | None
    """The deepest block that holds tokens of the prefix and of which all do, or the last of which do."""
    num_tokens: int
    """How many leading tokens of the prefix are cached there and above."""
    ends: list[Node]
    """Blocks with the prefix's last token: with what is below them, all that continues the prefix."""


class CacheControl:
    """Pins, lifetimes, hints, explicit eviction, quotas, policies. Part of a ``CacheManager``."""

    def __init__(
        self,
        *,
        tree: PrefixTree,
        tails: TailStore,
        pins: PinBook,
        quotas: Quotas,
        lanes: EvictionLanes,
        reclaimer: Reclaimer,
        clock: Clock,
    ) -> None:
        self._tree = tree
        self._tails = tails
        self._pins = pins
        self._quotas = quotas
        self._lanes = lanes
        self._reclaimer = reclaimer
        self._clock = clock

    # -- naming -------------------------------------------------------------------------------------

    def locate(self, namespace: NamespaceKey, tokens: array[int]) -> Located:
        """Find a prefix by its tokens. Touches no recency, makes no root."""
        root = self._tree.roots.get(namespace)
        if root is None:
            return Located(None, 0, [])
        now, size = self._clock.now(), self._tree.block_size
        path = self._tree.walk(root, tokens, len(tokens), None, now)
        node = path[-1] if path else root
        covered = len(path) * size
        rest = tokens[covered:].tobytes()
        if not rest:
            return Located(path[-1] if path else None, covered, path[-1:])
        ends = [n for n in self._settled_below(node, now) if n.packed.startswith(rest)]
        if ends:
            return Located(ends[0], len(tokens), ends)
        partial = max((num_common_tokens(rest, n.packed) for n in self._settled_below(node, now)), default=0)
        return Located(path[-1] if path else None, covered + (0 if path else partial), [])

    def path_of(self, namespace: NamespaceKey, tokens: array[int]) -> list[Node]:
        """Return the whole blocks of a prompt that are cached."""
        root = self._tree.roots.get(namespace)
        if root is None:
            return []
        return self._tree.walk(root, tokens, len(tokens), None, self._clock.now())

    def is_findable(self, node: Node) -> bool:
        """Say whether a node may be named: in the tree, shared, settled, and nothing on its path expired."""
        if node.is_root or node.owner is not None or node.state is NodeState.PENDING:
            return False
        if node.state is NodeState.OPEN and (node.is_busy and node.pin is None):
            return False
        now = self._clock.now()
        current = node
        while not current.is_root:
            if current.parent is None or current.is_expired(now):
                return False
            current = current.parent
        return True

    # -- pins ---------------------------------------------------------------------------------------

    def pin(
        self, node: Node, kind: PinKind, *, lifetime_s: float | None = None, budget: int | None = None
    ) -> PinOutcome:
        """Pin the path down to a node; see ``PinBook.pin``. ``OverBudget``: nothing was changed."""
        self._require(node)
        return self._pins.pin(node, kind, now=self._clock.now(), lifetime_s=lifetime_s, budget=budget)

    def unpin(self, node: Node) -> int:
        """Take a pin away; return how many blocks it covered, 0 if there was none."""
        pin = node.pin
        if pin is None:
            return 0
        self._pins.end(pin)
        return node.depth

    # -- lifetimes and hints ------------------------------------------------------------------------

    def set_lifetime(self, node: Node, lifetime_s: float | None) -> list[Node]:
        """Let a prefix live for so long from now (None: without end); return the blocks that this changed.

        The blocks that this prefix alone needs (``own_run``) get exactly this lifetime, longer or shorter,
        and so do the last logits kept at its end. Those above, which others share, only get more, as much
        as is needed for the prefix to be reachable. What continues the prefix keeps its own lifetime, and
        is unreachable once the prefix has expired.
        """
        self._require(node)
        ends_at = None if lifetime_s is None else self._clock.now() + lifetime_s
        own, changed = set(own_run(node)), []
        current = node
        while not current.is_root:
            is_longer = current.expires_at is not None and (ends_at is None or current.expires_at < ends_at)
            if is_longer or (current in own and current.expires_at != ends_at):
                current.expires_at = ends_at
                self._reclaimer.watch_lifetime(current)
                changed.append(current)
            current = current.real_parent()
        holder = node.real_parent() if node.state is NodeState.OPEN else node
        for key, tail in (holder.tails or {}).items():
            is_its = holder is node or (isinstance(key, bytes) and node.packed.startswith(key))
            if isinstance(key, bytes) and is_its:
                tail.expires_at = ends_at
        return changed

    def release(self, node: Node) -> list[Node]:
        """Note that a prefix is not needed any more: the blocks that it alone needs go before all others.

        Return them. Whoever uses one of them takes the hint back.
        """
        self._require(node)
        run = own_run(node)
        for released in run:
            released.is_released = True
        self._reclaimer.offer(node)
        return run

    # -- explicit eviction --------------------------------------------------------------------------

    def selection(
        self,
        *,
        below: Sequence[Node] | None = None,
        space: Space | None = None,
        min_idle_s: float | None = None,
    ) -> Selection:
        """Begin to find what an eviction of everything that meets all conditions would take."""
        last_use = None if min_idle_s is None else self._clock.now() - min_idle_s
        return Selection(self._tree, below=below, space=space, last_use=last_use)

    def select(
        self,
        *,
        below: Sequence[Node] | None = None,
        space: Space | None = None,
        min_idle_s: float | None = None,
    ) -> Selection:
        """Find it at once. Changes nothing."""
        chosen = self.selection(below=below, space=space, min_idle_s=min_idle_s)
        chosen.advance(2 * self._tree.num_nodes + len(self._tree.roots) + 1)
        return chosen

    def take_out(self, nodes: Iterable[Node]) -> int:
        """Evict those of ``nodes`` (children first) that nobody holds now; return how many."""
        num_taken = 0
        for node in nodes:
            if node.parent is None or node.num_children or node.is_busy:
                continue
            self._reclaimer.remove(node, LeaveCause.ADMIN)
            num_taken += 1
        return num_taken

    def forget_tails(self, space: Space | None = None) -> None:
        """Forget the last logits of prompts shorter than a block, of one namespace or of all."""
        roots = self._tree.roots.values() if space is None else [space.root]
        for root in roots:
            if root is not None:
                self._tails.clear_at(root)
        self._tree.drop_empty_roots()

    # -- quotas and policies ------------------------------------------------------------------------

    def set_quota(self, namespace: NamespaceKey, max_share: float | None) -> None:
        """Limit what one namespace may keep when others want room, to a share of the pool; None: no limit.

        Evicts nothing by itself. Raises ``ValueError`` for a share that is not above 0 and at most 1.
        """
        self._quotas.set(namespace, max_share)
        self._quotas.note(self._tree.spaces.get(namespace))

    @property
    def policy(self) -> EvictionPolicy:
        """Return the live policy."""
        return self._lanes.policy

    @property
    def canary(self) -> Canary | None:
        """Return the canary, if there is one."""
        return self._lanes.canary

    def policy_of(self, space: Space) -> EvictionPolicy:
        """Return the policy that judges a namespace's blocks."""
        return self._lanes.policy_of(space)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Let a new policy judge from now on, outside the canary. Evicts nothing; O(n log n) once."""
        self._reclaimer.rebuild(policy, self._lanes.canary)

    def start_canary(self, policy: EvictionPolicy, share: float) -> None:
        """Let another policy judge in a share of the namespaces, instead of a canary there was.

        Raises ``ValueError`` for a share that is not above 0 and at most 0.5.
        """
        self._reclaimer.rebuild(self._lanes.policy, Canary(policy, share))

    def end_canary(self) -> None:
        """Let the live policy judge everywhere."""
        if self._lanes.canary is not None:
            self._reclaimer.rebuild(self._lanes.policy, None)

    # -- inside -------------------------------------------------------------------------------------

    def _require(self, node: Node) -> None:
        if not self.is_findable(node):
            raise IntegrityError(f"{node!r} cannot be named: it is not there, not shared, or not settled")

    def _settled_below(self, node: Node, now: float) -> list[Node]:
        """Return the shared children whose content stands: OPEN ones that nobody fills come first."""
        children = [n for n in node.open_children if n.pin is not None or not n.is_busy]
        children += [n for n in node.children.values() if n.state is NodeState.READY]
        return [n for n in children if n.owner is None and n.packed and not n.is_expired(now)]


def with_what_leads_only_there(nodes: Sequence[Node]) -> list[Node]:
    """Return the highest nodes below which there is nothing but ``nodes`` and what continues them.

    Goes up from siblings past blocks that lead nowhere else, up to a branch, a pin's end, or the end of a
    shorter prompt whose last logits are kept.
    """
    tops = list(nodes)
    while tops:
        above = tops[0].real_parent()
        is_needed = above.is_root or above.pin is not None or above.tails or above.num_children != len(tops)
        if is_needed or any(node.parent is not above for node in tops):
            break
        tops = [above]
    return tops


def own_run(node: Node) -> list[Node]:
    """Return a node and those above it that only lead to it: up to a branch, or where another pin ends."""
    run = [node]
    above = node.real_parent()
    while not above.is_root and above.num_children == 1 and above.pin is None:
        run.append(above)
        above = above.real_parent()
    return run
