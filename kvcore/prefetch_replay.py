"""Replay of recorded agent sessions against the session predictor: what prefetch hides, and what it wastes.

Sessions run beside each other, started at random over a while, and beside requests that come once and never
again, on a device whose memory holds only a part of it all (least recently used blocks leave, the deepest of
a prefix first) above a tier that holds everything ever computed and restores one block after the other. A
request that returns waits for the blocks of its prefix that have left the device; what a prefetch has brought
before, it does not wait for. The same replay without prefetch is the measure.

A prefetch uses the tier only when no request does. Its room is what is free or was used once, by a request
that is over: to push out another session's blocks would only change who waits, since the session that left
last is the one most likely to return first. Requests that come once come in bursts, as batch jobs do. A
session that was prefetched is held for the predictor's window, within a share of the device; what others lose
by that is in the figures.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvcore.prefetch import SessionPredictor

__all__ = ["Replay", "ReplayFigures", "Session", "Setting", "Turn", "load_sessions", "main", "replay"]

_TICK_S = 0.25
_STARTS, _ENDS = 0, 1
_UNKNOWN_TURN_S = 5.0
_SINGLE_BLOCKS, _SINGLE_EVERY_S, _SINGLE_S = 300, 2.0, 4.0
"""A request that does not return: its size, the time to the next one in a burst, and what it takes."""
_CALM_DECAY = 0.5 ** (_TICK_S / 20.0)
_CALM_SHARE = 0.1
"""Prefetch waits while more than this share of the device was newly filled within some 20 s."""
_MAX_TRIES = 50
"""Blocks in use that an eviction passes over; while more are, the device is overfull for a moment."""


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
    """Of the blocks that all sessions together end with."""
    restore_s_per_block: float = 0.0015
    copies: int = 6
    """Of each session, as different ones."""
    spread_s: float = 7200.0
    """Over which the sessions start."""
    burst_every_s: float = 900.0
    """Between two bursts of requests that do not return."""
    burst_share: float = 1.0
    """Of the device, which a burst fills within a minute or two."""
    room_share: float = 0.25
    """Of the device, at most, for what was prefetched and not used yet."""
    window_s: float = 1200.0
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
        """Share of the restore time that prefetch took off the requests."""
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


@dataclass(slots=True)
class _Live:
    """A session in the replay."""

    blocks: tuple[int, ...] = ()
    """Of its latest request."""
    computed: set[int] = field(default_factory=set)
    num_running: int = 0
    is_held: bool = False
    """Something was prefetched for it, and it has not returned yet."""


class Replay:
    """One run over some sessions, with or without a predictor."""

    def __init__(
        self, sessions: Sequence[Session], setting: Setting, predictor: SessionPredictor | None, seed: int
    ) -> None:
        draw = random.Random(seed)  # noqa: S311 - reproducible, not secret
        self._setting = setting
        self._predictor = predictor
        self._live: list[_Live] = []
        self._events: list[tuple[float, int, int, int, tuple[int, ...]]] = []
        self._single: OrderedDict[tuple[int, int], None] = OrderedDict()
        """Blocks on the device that were used once, by a request that is over."""
        footprint = 0
        for _ in range(setting.copies):
            for session in sessions:
                number = len(self._live)
                self._live.append(_Live())
                footprint += max(len(turn.blocks) for turn in session.turns)
                offset = draw.uniform(0.0, setting.spread_s)
                for turn in session.turns:
                    self._add(offset + turn.starts_at_s, number, _STARTS, turn.blocks)
                    self._add(offset + turn.ends_at_s, number, _ENDS, turn.blocks)
        self._num_sessions = setting.copies * len(sessions)
        self.device_blocks = int(setting.device_share * footprint)
        num_bursts = int((setting.spread_s + 7200.0) / setting.burst_every_s)
        for burst in range(num_bursts):
            begin = (burst + draw.random()) * setting.burst_every_s
            for count in range(int(setting.burst_share * self.device_blocks / _SINGLE_BLOCKS)):
                number = len(self._live)
                self._live.append(_Live())
                at = begin + count * _SINGLE_EVERY_S
                self._add(at, number, _STARTS, tuple(range(_SINGLE_BLOCKS)))
                self._add(at + _SINGLE_S, number, _ENDS, tuple(range(_SINGLE_BLOCKS)))
        self.restore_s = 0.0
        self._recent_blocks = 0.0
        """New blocks of requests, fading: the pressure on the device."""
        self.num_requests = 0
        self._device: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._busy_until = 0.0
        self._queue: deque[tuple[int, deque[int]]] = deque()
        self._held: dict[int, int] = {}
        """Blocks prefetched for a session, until it returns or its window ends."""

    def _add(self, at: float, number: int, what: int, blocks: tuple[int, ...]) -> None:
        heapq.heappush(self._events, (at, len(self._events), number, what, blocks))

    def run(self) -> None:
        """Run to the end of the last request."""
        now = 0.0
        while self._events:
            now += _TICK_S
            while self._events and self._events[0][0] <= now:
                at, _, number, what, blocks = heapq.heappop(self._events)
                if what == _STARTS:
                    self._start(at, number, blocks)
                else:
                    self._end(at, number, blocks)
            if self._predictor is not None:
                self._prefetch(now, self._predictor)

    def _start(self, now: float, number: int, blocks: tuple[int, ...]) -> None:
        live = self._live[number]
        if number >= self._num_sessions:
            live.num_running += 1
            self._touch(number, blocks)
            return
        self.num_requests += 1
        if self._predictor is not None and live.num_running == 0:
            self._predictor.returned(number, now)
            self._release(number)
        live.num_running += 1
        missing = self._missing(number, blocks)
        if missing:
            begin = max(now, self._busy_until)
            self._busy_until = begin + len(missing) * self._setting.restore_s_per_block
            self.restore_s += self._busy_until - now
        self._touch(number, blocks)

    def _end(self, now: float, number: int, blocks: tuple[int, ...]) -> None:
        live = self._live[number]
        live.num_running -= 1
        if number >= self._num_sessions:
            self._single.update(
                ((number, block), None) for block in blocks if (number, block) in self._device
            )
            return
        live.blocks = blocks
        live.computed.update(blocks)
        self._touch(number, blocks)
        if self._predictor is not None and live.num_running == 0:
            self._predictor.ended(number, now)

    def _prefetch(self, now: float, predictor: SessionPredictor) -> None:
        for key in predictor.expire(now):
            self._release(_number(key))
        self._recent_blocks *= _CALM_DECAY
        if self._recent_blocks > _CALM_SHARE * self.device_blocks:
            return  # what is free now is wanted by somebody else
        held = sum(self._held.values())
        queued = sum(len(blocks) for _, blocks in self._queue)
        free = max(0, self.device_blocks - len(self._device)) + len(self._single) - queued
        room = min(free, int(self._setting.room_share * self.device_blocks) - held)
        for key, num_blocks in predictor.due(now, room, self._num_missing):
            number = _number(key)
            predictor.started(number, now, num_blocks)
            live = self._live[number]
            live.is_held = True
            self._held[number] = num_blocks
            missing = self._missing(number, live.blocks)
            self._queue.append((number, deque(missing)))
            # The rest of its prefix is as much wanted as what is missing.
            self._touch(number, tuple(block for block in live.blocks if (number, block) in self._device))
        num_moves = int((now - max(self._busy_until, now - _TICK_S)) / self._setting.restore_s_per_block)
        while self._queue and num_moves > 0:
            number, blocks = self._queue[0]
            while blocks and num_moves > 0:
                self._make_room()
                self._put(number, blocks.popleft())
                num_moves -= 1
            if not blocks:
                self._queue.popleft()
                predictor.arrived(number)

    def _release(self, number: int) -> None:
        self._live[number].is_held = False
        self._held.pop(number, None)
        self._queue = deque(item for item in self._queue if item[0] != number)

    def _num_missing(self, key: object) -> int:
        number = _number(key)
        return len(self._missing(number, self._live[number].blocks))

    def _missing(self, number: int, blocks: tuple[int, ...]) -> list[int]:
        """Return what of a prefix was computed once and is not on the device."""
        missing = []
        for block in blocks:
            if (number, block) in self._device:
                continue
            if block not in self._live[number].computed:
                break
            missing.append(block)
        return missing

    def _touch(self, number: int, blocks: tuple[int, ...]) -> None:
        for block in reversed(blocks):
            self._recent_blocks += (number, block) not in self._device
            self._put(number, block)

    def _make_room(self) -> None:
        """Drop a block that was used once, if the device is full."""
        if len(self._device) >= self.device_blocks and self._single:
            oldest, _ = self._single.popitem(last=False)
            del self._device[oldest]

    def _put(self, number: int, block: int) -> None:
        self._device[number, block] = None
        self._device.move_to_end((number, block))
        num_tries = _MAX_TRIES
        while len(self._device) > self.device_blocks and num_tries > 0:
            num_tries -= 1
            oldest, _ = self._device.popitem(last=False)
            live = self._live[oldest[0]]
            if live.num_running > 0 or live.is_held:
                self._device[oldest] = None  # in use: as good as just used
            else:
                self._single.pop(oldest, None)


def _number(key: object) -> int:
    """Return a session's number, which is what the predictor knows it by."""
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
    """Print the figures of one setting as JSON, a line for each half of the sessions and seed."""
    defaults = Setting()
    parser = argparse.ArgumentParser(
        prog="kvcore.prefetch_replay", description="Replay sessions with prefetch."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    sessions = load_sessions(options.pop("folder"))
    seeds = options.pop("seeds")
    setting = Setting(**options)
    for half, chosen in (("tuned on", sessions[::2]), ("kept for checking", sessions[1::2])):
        for seed in range(seeds):
            figures = replay(chosen, setting, seed=seed)
            line = {"half": half, "seed": seed, **asdict(figures), "hidden": figures.hidden}
            sys.stdout.write(json.dumps({**line, "waste": figures.waste}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
