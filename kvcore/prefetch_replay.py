"""Replay of recorded agent sessions against the session predictor: what prefetch hides, and what it wastes.

Sessions run beside each other, started at random over a while, and beside requests that come once and never
again, on a device whose memory holds only a part of it all, above a tier that holds everything ever computed
and restores one block after the other. A request that returns waits for the blocks of its prefix that have
left the device; what a prefetch has brought before, it does not wait for. The same replay without prefetch is
the measure: what others lose because a prefetch took their blocks' place is in the figures.

The rules are the engine's (``server.engine.tiering.sessions``)::

    device, in the order in which blocks leave
    | nobody's (requests that came once, sessions) by latest use, the deepest first | held | running |
                                                                                      ^ prefetched, at most a
                                                                                        share of the device

A session goes on where a request continues all of the previous one; where it rewrites its prefix, what was
prefetched for it is wasted. A request that comes once is to the predictor a session like any other.

A session's blocks are private, and leave the deepest first: it is described by how many it still has.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from pathlib import Path

from kvcore.prefetch import SessionPredictor

__all__ = ["Replay", "ReplayFigures", "Session", "Setting", "Turn", "load_sessions", "main", "replay"]

_TICK_S = 0.5
_STARTS, _ENDS = 0, 1
_UNKNOWN_TURN_S = 5.0
_SINGLE_BLOCKS, _SINGLE_EVERY_S, _SINGLE_S = 300, 0.5, 4.0
"""A request that does not return: its size, the time to the next one in a burst, and what it takes."""
_PEAK_DECAY = 0.5 ** (_TICK_S / 1800.0)
_HEADROOM = 1.25
"""Room is what running requests have not needed of late; what they took half an hour ago counts half."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session, at its time after the session's start."""

    starts_at_s: float
    ends_at_s: float
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """One recorded session."""

    name: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Setting:
    """What is replayed, and on what."""

    device_share: float = 0.3
    """Of the blocks that the sessions have at the end which run beside each other at the busiest time."""
    restore_s_per_block: float = 0.0015
    copies: int = 12
    """Of each session, as different ones."""
    spread_s: float = 21_600.0
    """Over which the sessions start."""
    burst_every_s: float = 900.0
    """Between two bursts of requests that do not return."""
    burst_share: float = 1.0
    """Of the device, which a burst fills within half a minute or so."""
    room_share: float = 0.25
    """Of the device, at most, for prefixes that were prefetched and not used yet."""
    window_s: float = 1800.0
    max_waste: float = 0.2


@dataclass(frozen=True, slots=True)
class ReplayFigures:
    """What a replay found. Times are what requests waited for their restores, summed."""

    num_sessions: int
    num_requests: int
    device_blocks: int
    restore_s_without: float
    restore_s_with: float
    fetched: int
    in_time: int
    late: int
    wasted: int
    fetched_blocks: int
    wasted_blocks: int

    @property
    def hidden(self) -> float:
        """Share of the restore time that prefetch took off the requests; below zero it has added some."""
        return 1.0 - self.restore_s_with / self.restore_s_without if self.restore_s_without else 0.0

    @property
    def waste(self) -> float:
        """Share of the finished prefetches that nobody used."""
        finished = self.in_time + self.late + self.wasted
        return self.wasted / finished if finished else 0.0


def load_sessions(folder: Path) -> list[Session]:
    """Read every session of a folder. Requests of its sub-agents have prefixes of their own: left out."""
    sessions = []
    for path in sorted(folder.glob("*.json")):
        requests = [r for r in json.loads(path.read_text())["requests"] if "hash_ids" in r]
        turns = []
        for request, following in zip(requests, [*requests[1:], None], strict=True):
            start = float(request["t"])
            if "api_time" in request:
                end = start + float(request["api_time"])
            elif following is not None:
                end = float(following["t"]) - float(following.get("think_time", 0.0))
            else:
                end = start + _UNKNOWN_TURN_S
            turns.append(Turn(start, max(start + 0.1, end), tuple(request["hash_ids"])))
        sessions.append(Session(path.stem, tuple(turns)))
    return sessions


@dataclass(slots=True, eq=False)
class _Branch:
    """A prefix that one session's requests extend; a rewritten prefix begins another one."""

    key: int
    blocks: tuple[int, ...] = ()
    num_resident: int = 0
    num_shared: int = 0
    """Blocks that went over to the branch which the session went on with: counted there."""
    num_running: int = 0
    is_held: bool = False
    num_wanted: int = 0
    """Blocks of the fetch under way that have not come yet."""


class Replay:
    """One run over some sessions, with or without a predictor."""

    def __init__(
        self, sessions: Sequence[Session], setting: Setting, predictor: SessionPredictor | None, seed: int
    ) -> None:
        draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self._setting = setting
        self._predictor = predictor
        self._events: list[tuple[float, int, int, int, Turn]] = []
        self._running: dict[tuple[int, Turn], _Branch] = {}
        self._branches: list[_Branch] = []
        """By the key that the predictor knows them by."""
        self._of_session: dict[int, _Branch] = {}
        self._device: OrderedDict[_Branch, None] = OrderedDict()
        """What has blocks there, by latest use."""
        self._num_used = 0
        self._peak_running = 0.0
        """Blocks in use at the busiest time of late."""
        self._queue: deque[_Branch] = deque()
        self._busy_until = 0.0
        self.restore_s = 0.0
        self.num_requests = 0
        lives: list[tuple[float, int]] = []
        numbers = iter(range(1_000_000))
        for _ in range(setting.copies):
            for session in sessions:
                begin = draw.uniform(0.0, setting.spread_s)
                size = max(len(turn.blocks) for turn in session.turns)
                lives += [(begin, size), (begin + session.turns[-1].ends_at_s, -size)]
                self._add(next(numbers), begin, session.turns)
        self.device_blocks = int(setting.device_share * max(accumulate(size for _, size in sorted(lives))))
        once = (Turn(0.0, _SINGLE_S, tuple(range(_SINGLE_BLOCKS))),)
        for burst in range(int((setting.spread_s + 7200.0) / setting.burst_every_s)):
            begin = (burst + draw.random()) * setting.burst_every_s
            for count in range(int(setting.burst_share * self.device_blocks / _SINGLE_BLOCKS)):
                self._add(next(numbers), begin + count * _SINGLE_EVERY_S, once)

    def _add(self, number: int, at: float, turns: Sequence[Turn]) -> None:
        for turn in turns:
            for what, when in ((_STARTS, turn.starts_at_s), (_ENDS, turn.ends_at_s)):
                heapq.heappush(self._events, (at + when, len(self._events), number, what, turn))

    def run(self) -> None:
        """Run to the end of the last request."""
        now = 0.0
        while self._events:
            now += _TICK_S
            while self._events and self._events[0][0] <= now:
                at, _, number, what, turn = heapq.heappop(self._events)
                if what == _STARTS:
                    self._start(at, number, turn)
                else:
                    self._end(at, number, turn)
            if self._predictor is not None:
                self._prefetch(now, self._predictor)
        if self._predictor is not None:
            self._predictor.expire(float("inf"))

    def _start(self, now: float, number: int, turn: Turn) -> None:
        blocks = turn.blocks
        self.num_requests += 1
        previous = self._of_session.get(number)
        num_common = 0 if previous is None else _num_common(previous.blocks, blocks)
        if previous is not None and num_common >= len(previous.blocks) - 1:  # the last one may be partial
            branch = previous
            if self._predictor is not None and branch.num_running == 0:
                self._predictor.returned(branch.key, now)
            self._release(branch)
        else:
            branch = _Branch(len(self._branches))
            self._branches.append(branch)
            self._of_session[number] = branch
        branch.num_running += 1
        self._running[number, turn] = branch
        num_there = num_common if previous is None else min(num_common, previous.num_resident)
        if num_common > num_there:
            begin = max(now, self._busy_until)
            self._busy_until = begin + (num_common - num_there) * self._setting.restore_s_per_block
            self.restore_s += self._busy_until - now
        branch.blocks = blocks
        if previous is not None and previous is not branch:  # what both share is now the new one's
            previous.num_shared += num_there
            self._resize(previous, previous.num_resident - num_there)
            self._resize(branch, num_there)
        self._resize(branch, len(blocks))
        self._device.move_to_end(branch)
        self._evict()
        self._note_running()

    def _end(self, now: float, number: int, turn: Turn) -> None:
        branch = self._running.pop((number, turn))
        branch.num_running -= 1
        if branch in self._device:
            self._device.move_to_end(branch)
        if self._predictor is not None and branch.num_running == 0:
            self._predictor.ended(branch.key, now)

    def _prefetch(self, now: float, predictor: SessionPredictor) -> None:
        for key in predictor.expire(now):
            self._release(self._branches[_number(key)])
        held = sum(branch.num_resident + branch.num_wanted for branch in self._device if branch.is_held)
        held += sum(branch.num_wanted for branch in self._queue if branch not in self._device)
        self._peak_running *= _PEAK_DECAY
        self._note_running()
        share = int(self._setting.room_share * self.device_blocks)
        room = min(self.device_blocks - int(_HEADROOM * self._peak_running), share) - held
        for key, num_blocks in predictor.due(now, room, self._num_missing):
            branch = self._branches[_number(key)]
            if len(branch.blocks) > room:
                continue  # all of the prefix will be held, not only what comes
            room -= len(branch.blocks)
            predictor.started(key, now, num_blocks)
            branch.is_held, branch.num_wanted = True, num_blocks
            self._queue.append(branch)
        num_moves = int((now - max(self._busy_until, now - _TICK_S)) / self._setting.restore_s_per_block)
        while self._queue and num_moves > 0:
            branch = self._queue[0]
            count = min(num_moves, branch.num_wanted)
            num_moves -= count
            branch.num_wanted -= count
            self._resize(branch, branch.num_resident + count)
            self._device.move_to_end(branch)
            self._evict()
            if self._queue and self._queue[0] is branch and not branch.num_wanted:
                self._queue.popleft()
                predictor.arrived(branch.key)

    def _note_running(self) -> None:
        running = sum(branch.num_resident for branch in self._device if branch.num_running)
        self._peak_running = max(self._peak_running, float(running))

    def _num_missing(self, key: Hashable) -> int:
        branch = self._branches[_number(key)]
        return len(branch.blocks) - branch.num_shared - branch.num_resident

    def _release(self, branch: _Branch) -> None:
        branch.is_held, branch.num_wanted = False, 0
        if branch in self._queue:
            self._queue.remove(branch)

    def _resize(self, branch: _Branch, num_resident: int) -> None:
        self._num_used += num_resident - branch.num_resident
        branch.num_resident = num_resident
        if not num_resident:
            self._device.pop(branch, None)
        elif branch not in self._device:
            self._device[branch] = None

    def _evict(self) -> None:
        """Drop what is too much: what nobody uses by latest use, and what is held after that."""
        for are_held in (False, True):
            if self._num_used <= self.device_blocks:
                return
            idle = [b for b in self._device if not b.num_running and b.is_held is are_held]
            for branch in idle:
                count = min(branch.num_resident, self._num_used - self.device_blocks)
                if count <= 0:
                    return
                self._resize(branch, branch.num_resident - count)
                if are_held:
                    self._release(branch)
                    if self._predictor is not None:
                        self._predictor.lost(branch.key)


def _num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """Return how many blocks two prefixes begin with together."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _number(key: Hashable) -> int:
    """Return the number that the predictor knows a prefix by."""
    assert isinstance(key, int)
    return key


def replay(sessions: Sequence[Session], setting: Setting, *, seed: int) -> ReplayFigures:
    """Replay with and without prefetch, and compare."""
    plain = Replay(sessions, setting, None, seed)
    plain.run()
    predictor = SessionPredictor(max_waste=setting.max_waste, window_s=setting.window_s)
    ahead = Replay(sessions, setting, predictor, seed)
    ahead.run()
    counters = predictor.counters
    return ReplayFigures(
        num_sessions=len(sessions) * setting.copies,
        num_requests=plain.num_requests,
        device_blocks=plain.device_blocks,
        restore_s_without=plain.restore_s,
        restore_s_with=ahead.restore_s,
        fetched=counters.fetched,
        in_time=counters.in_time,
        late=counters.late,
        wasted=counters.wasted,
        fetched_blocks=counters.fetched_blocks,
        wasted_blocks=counters.wasted_blocks,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures of one setting as JSON, a line for each half of the sessions, device and seed."""
    defaults = Setting()
    parser = argparse.ArgumentParser(
        prog="kvcore.prefetch_replay", description="Replay sessions with prefetch."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device-shares", type=float, nargs="+", default=[0.2, 0.3, 0.5], metavar="SHARE")
    for name, value in asdict(defaults).items():
        if name == "device_share":
            continue
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    sessions = load_sessions(options.pop("folder"))
    seeds = options.pop("seeds")
    shares = options.pop("device_shares")
    settings = [Setting(device_share=share, **options) for share in shares]
    for half, chosen in (("tuned on", sessions[::2]), ("kept for checking", sessions[1::2])):
        for setting, seed in product(settings, range(seeds)):
            figures = replay(chosen, setting, seed=seed)
            line = {"half": half, "seed": seed, "device_share": setting.device_share, **asdict(figures)}
            line |= {"hidden": figures.hidden, "waste": figures.waste}
            sys.stdout.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
