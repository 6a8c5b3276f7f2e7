"""What is computed next: batches over all callers and all models. No threads, no clock of its own.

::

    add ---> ring of model A --+
             ring of model B --+--> next(now) --> a batch of one model, to compute --> done(batch, seconds)
             ring of model C --+              or: nothing before this time

**Budget.** A batch holds at most ``max_batch_tokens`` tokens (a row of features counts 1; where the executor
pads, padding counts); one input that is longer goes alone.

**Turns.** Models with work take turns, a batch each; within a model calls do (``server.predict.waiting``).
While at most ``m`` models have work, a call with ``p`` calls before it in its ring has an input computed
within ``m * (p + 1)`` batches, whatever comes later: four thousand inputs of one call delay a single one by a
batch.

**Deadlines.** A call whose deadline comes before all that waits could be computed, but not before it could be
itself, is near its deadline: the nearest goes first. At most every other batch is so decided, and takes no
model's turn: the bound above doubles and still holds, whatever deadlines others set.

**Holding.** A batch that could start is held back only while that pays, at most ``max_delay_s``, only while
its model alone has work, and never past the time at which it has to start for every waiting deadline to be
met. The rule is in ``server.predict.holding``; with few calls nothing is held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from server.predict.batch import Batch, BatchCounters, Turn
from server.predict.cost import CostModel
from server.predict.deadlines import Deadlines
from server.predict.errors import OverloadedError
from server.predict.holding import RESOLUTION_S, Arrivals
from server.predict.waiting import Ring, WaitingCall

__all__ = ["Batcher"]

MAX_IDLE_MODELS = 256
"""Of so many models without work what was learned is kept."""
UNKNOWN_RETRY_S = 1.0
MIN_RETRY_S, MAX_RETRY_S = 0.05, 60.0

KeyT = TypeVar("KeyT", bound=Hashable)


class _Queue(Generic[KeyT]):
    """What the batcher knows of one model."""

    __slots__ = ("arrivals", "cost", "is_padded", "model", "ring")

    def __init__(self, model: Hashable, *, is_padded: bool) -> None:
        self.model = model
        self.is_padded = is_padded
        self.ring: Ring[KeyT] = Ring()
        self.cost = CostModel()
        self.arrivals = Arrivals()

    def backlog_s(self, budget: int) -> float:
        """Return how long computing all that waits should take."""
        num_tokens = self.ring.num_tokens
        return -(-num_tokens // budget) * self.cost.a_s + num_tokens * self.cost.b_s


class Batcher(Generic[KeyT]):
    """See the module's text. Not for several threads at once. Times are seconds of the caller's clock."""

    def __init__(self, *, max_batch_tokens: int, max_delay_s: float, max_waiting_tokens: int) -> None:
        self._budget = max_batch_tokens
        self._max_delay_s = max_delay_s
        self._max_waiting_tokens = max_waiting_tokens
        self._queues: OrderedDict[Hashable, _Queue[KeyT]] = OrderedDict()
        """All models known; those without work are dropped from the front when they are too many."""
        self._turns: OrderedDict[Hashable, _Queue[KeyT]] = OrderedDict()
        """Models with work, in the order of their turns."""
        self._queue_of: dict[KeyT, _Queue[KeyT]] = {}
        self._deadlines: Deadlines[KeyT] = Deadlines()
        self._near: Deadlines[KeyT] = Deadlines()
        """Deadlines that may still be met."""
        self._was_near = False
        self._held_since_s: float | None = None
        self.num_waiting_tokens = 0
        self.num_waiting_inputs = 0
        self.counters = BatchCounters()

    @property
    def num_waiting_calls(self) -> int:
        """Return how many calls have inputs that wait."""
        return len(self._queue_of)

    @property
    def backlog_s(self) -> float:
        """Return how long computing all that waits should take; 0 if nothing was learned yet."""
        return sum(queue.backlog_s(self._budget) for queue in self._turns.values())

    @property
    def next_deadline_s(self) -> float | None:
        """Return when the next waiting call expires."""
        return self._deadlines.first_s

    def expected_s(self, model: Hashable, num_tokens: int) -> float:
        """Return how long a batch of the model should take; 0 if nothing was learned yet."""
        queue = self._queues.get(model)
        return 0.0 if queue is None else queue.cost.expected_s(num_tokens)

    def refuse_beyond(self, num_tokens: int, *, num_elsewhere: int = 0) -> None:
        """Raise ``OverloadedError`` if so many tokens more are too many; never if they would wait alone.

        ``num_elsewhere``: tokens that are not here yet, and count too.
        """
        waiting = self.num_waiting_tokens + num_elsewhere
        if waiting and waiting + num_tokens > self._max_waiting_tokens:
            share = min(1.0, (waiting + num_tokens - self._max_waiting_tokens) / waiting)
            retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, share * self.backlog_s or UNKNOWN_RETRY_S))
            raise OverloadedError("too many inputs wait to be computed", retry_after_s=retry_after_s)

    def add(
        self,
        model: Hashable,
        key: KeyT,
        lengths: Sequence[int],
        *,
        now_s: float,
        deadline_s: float | None = None,
        is_padded: bool = False,
    ) -> None:
        """Let a call wait, with all its inputs (one at least). Raises ``OverloadedError``; then none does.

        ``is_padded``: the model's executor pads inputs to the longest.
        """
        call = WaitingCall(key, lengths, by_length=is_padded)
        try:
            self.refuse_beyond(call.num_tokens)
        except OverloadedError:
            self.counters.num_refused += len(lengths)
            raise
        queue = self._queues.get(model)
        if queue is None or (queue.is_padded is not is_padded and not queue.ring):
            queue = self._new_queue(model, is_padded=is_padded)
        queue.arrivals.note(now_s, call.num_tokens)
        queue.ring.add(call)
        self._turns[model] = queue
        self._queue_of[key] = queue
        if deadline_s is not None:
            self._deadlines.add(key, deadline_s)
            self._near.add(key, deadline_s)
        self.num_waiting_tokens += call.num_tokens
        self.num_waiting_inputs += len(lengths)
        self.counters.num_added += len(lengths)

    def cancel(self, key: KeyT) -> None:
        """Drop what waits of a call, if anything does."""
        self.counters.num_cancelled += self._drop(key)

    def expire(self, now_s: float) -> list[KeyT]:
        """Drop and return the calls whose deadline has come while some of their inputs wait."""
        keys = self._deadlines.due(now_s)
        for key in keys:
            self.counters.num_expired += self._drop(key)
        return keys

    def next(self, now_s: float) -> Turn[KeyT]:
        """Say what to compute, now that nothing is computed."""
        expired = self.expire(now_s)
        if not self._turns:
            self._held_since_s = None
            return Turn(None, expired)
        near = None if self._was_near else self._nearest(now_s)
        self._was_near = near is not None
        if near is None:
            hold_s = self._hold_s(now_s)
            if hold_s > 0.0:
                if self._held_since_s is None:
                    self._held_since_s = now_s
                return Turn(None, expired, now_s + hold_s)
            queue = next(iter(self._turns.values()))
        else:
            queue = self._queue_of[near]
            queue.ring.to_head(near)
        if self._held_since_s is not None:
            self.counters.num_held_batches += 1
            self.counters.held_s += now_s - self._held_since_s
            self._held_since_s = None
        return Turn(self._take(queue), expired)

    def done(self, batch: Batch[KeyT], seconds: float) -> None:
        """Learn from a batch that was computed. Not from one that failed."""
        queue = self._queues.get(batch.model)
        if queue is not None:
            queue.cost.learn(batch.num_tokens + (batch.num_padding_tokens if queue.is_padded else 0), seconds)

    def _take(self, queue: _Queue[KeyT]) -> Batch[KeyT]:
        ring = queue.ring
        if queue.is_padded:
            slack = queue.cost.a_s / queue.cost.b_s if queue.cost.b_s > 0.0 else 0.0
            shares = ring.take_padded(self._budget, slack)
        else:
            shares = ring.take_packed(self._budget)
        num_inputs = sum(len(share.indices) for share in shares)
        num_tokens = sum(share.num_tokens for share in shares)
        for share in shares:
            if share.key not in ring and share.key in self._queue_of:
                self._forget(share.key)
        self.num_waiting_tokens -= num_tokens
        self.num_waiting_inputs -= num_inputs
        self.counters.num_taken += num_inputs
        self.counters.num_batches += 1
        if not ring:
            del self._turns[queue.model]
        elif not self._was_near:
            self._turns.move_to_end(queue.model)
        num_padding = 0
        if queue.is_padded:
            num_padding = max(share.longest for share in shares) * num_inputs - num_tokens
        return Batch(queue.model, tuple(shares), num_inputs, num_tokens, num_padding)

    def _nearest(self, now_s: float) -> KeyT | None:
        """Return the call that has to go first so that its deadline is met."""
        if not self._near:
            return None
        backlog_s = self.backlog_s
        while (deadline_s := self._near.first_s) is not None and deadline_s - now_s <= backlog_s:
            key = self._near.first()
            assert key is not None
            queue = self._queue_of[key]
            if queue.ring.waiting_tokens_of(key) * queue.cost.b_s + queue.cost.a_s <= deadline_s - now_s:
                return key
            # It cannot be met any more: others shall not wait for it. It keeps its turn.
            self._near.discard(key)
        return None

    def _hold_s(self, now_s: float) -> float:
        """Return how long the next batch should be held back from now on."""
        if len(self._turns) > 1 or self._max_delay_s <= 0.0:
            return 0.0
        queue = next(iter(self._turns.values()))
        num_tokens = queue.ring.num_tokens
        if num_tokens >= self._budget:
            return 0.0
        held_s = 0.0 if self._held_since_s is None else now_s - self._held_since_s
        limit_s = self._max_delay_s - held_s
        if (deadline_s := self._deadlines.first_s) is not None:
            limit_s = min(limit_s, deadline_s - queue.cost.expected_s(num_tokens) - now_s)
        if limit_s <= RESOLUTION_S:
            return 0.0
        hold_s = queue.arrivals.hold_s(now_s, num_calls=len(queue.ring), cost=queue.cost)
        return min(limit_s, hold_s)

    def _drop(self, key: KeyT) -> int:
        """Forget a call; return how many of its inputs waited."""
        queue = self._queue_of.get(key)
        if queue is None:
            return 0
        self._forget(key)
        call = queue.ring.remove(key)
        assert call is not None
        if not queue.ring:
            del self._turns[queue.model]
        self.num_waiting_tokens -= call.num_tokens
        self.num_waiting_inputs -= call.num_inputs
        return call.num_inputs

    def _forget(self, key: KeyT) -> None:
        del self._queue_of[key]
        self._deadlines.discard(key)
        self._near.discard(key)

    def _new_queue(self, model: Hashable, *, is_padded: bool) -> _Queue[KeyT]:
        if len(self._queues) >= MAX_IDLE_MODELS:
            for idle in [name for name in self._queues if name not in self._turns][: MAX_IDLE_MODELS // 4]:
                del self._queues[idle]
        queue: _Queue[KeyT] = _Queue(model, is_padded=is_padded)
        self._queues[model] = queue
        return queue
