"""Tokens a second on one workload: ours over gRPC, the peers on the same prompts, in alternating order."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from loadgen.experiments.figures import Figure
from loadgen.experiments.machine import Limits
from loadgen.experiments.peer_jobs import Answer, Job, PeerSettings
from loadgen.experiments.processes import LineProcess, ProcessFailed, run_loadgen
from loadgen.experiments.shapes import ModelShape
from loadgen.summary import Summary
from loadgen.workloads import shared_prefix

__all__ = ["WORKLOADS", "Peer", "Workload", "calibrate", "compare"]

WARM_UP_SEED = 1_000_000


@dataclass(frozen=True, slots=True)
class Workload:
    """Groups of requests that begin alike, so many at a time; without shared tokens, unique prompts."""

    name: str
    num_groups: int
    requests_per_group: int
    shared_tokens: int
    own_tokens: int
    new_tokens: int
    concurrency: int

    def arguments(self, seed: int) -> list[str]:
        """Return loadgen's arguments."""
        values = {
            "--workload": "shared-prefix",
            "--groups": self.num_groups,
            "--requests": self.requests_per_group,
            "--shared": self.shared_tokens,
            "--own": self.own_tokens,
            "--new": self.new_tokens,
            "--concurrency": self.concurrency,
            "--seed": seed,
        }
        return [text for name, value in values.items() for text in (name, str(value))]

    def prompts(self, shape: ModelShape, seed: int) -> list[list[int]]:
        """Return the very prompts that loadgen sends, in its order."""
        conversations = shared_prefix(
            num_groups=self.num_groups,
            requests_per_group=self.requests_per_group,
            shared_tokens=self.shared_tokens,
            own_tokens=self.own_tokens,
            new_tokens=self.new_tokens,
            vocab_size=shape.vocab_size,
            seed=seed,
        )
        return [list(conversation.turns[0].token_ids) for conversation in conversations]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("4 groups x 8 at 8", 4, 8, 512, 32, 64, 8),
        Workload("1 group x 32 at 32", 1, 32, 512, 32, 64, 32),
        Workload("no sharing at 8", 32, 1, 0, 32, 128, 8),
        Workload("small", 2, 4, 96, 32, 16, 8),
    )
}


class Peer:
    """The peer's process, started when it is first asked, again if it was given up."""

    def __init__(self, shape: ModelShape, log: Path) -> None:
        self._shape = shape
        self._log = log
        self._process: LineProcess | None = None

    def ask(
        self, settings: PeerSettings, prompts: list[list[int]], new_tokens: int, timeout_s: float
    ) -> Answer:
        """Run one job. Raises ``ProcessFailed``; after ``timeout_s`` the process is ended."""
        if self._process is None:
            module = "loadgen.experiments.peer_transformers"
            self._process = LineProcess(
                [sys.executable, "-m", module, "--shape", self._shape.name], log=self._log
            )
            self._process.read(300.0)
        job = Job(settings=settings, prompts=prompts, max_new_tokens=new_tokens)
        try:
            self._process.write(msgspec.json.encode(job).decode())
            answer = msgspec.json.decode(self._process.read(timeout_s), type=Answer)
        except ProcessFailed:
            self.stop()
            raise
        if answer.error is not None:
            raise ProcessFailed(f"{settings.engine}: {answer.error}")
        return answer

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.stop()
            self._process = None


def calibrate(
    peer: Peer, shape: ModelShape, candidates: Sequence[PeerSettings], timeout_s: float
) -> tuple[PeerSettings, list[dict[str, object]]]:
    """Return the fastest settings on a small piece of the shared-prefix workload, and what each one did."""
    small, tried, best = WORKLOADS["small"], [], (0.0, candidates[0])
    limit_s = timeout_s
    for number, settings in enumerate(candidates):
        row: dict[str, object] = {"settings": msgspec.to_builtins(settings)}
        try:
            # The first run pays for what is set up once.
            peer.ask(settings, small.prompts(shape, WARM_UP_SEED)[:1], 2, limit_s)
            prompts = small.prompts(shape, WARM_UP_SEED + 1 + number)
            answer = peer.ask(settings, prompts, small.new_tokens, limit_s)
        except ProcessFailed as failure:
            row["failed"] = str(failure)
            print(f"    {_describe(settings)}: {failure}", flush=True)
        else:
            rate = answer.generated_tokens / answer.elapsed_s
            row["tokens_per_s"] = rate
            print(f"    {_describe(settings)}: {rate:.1f} tokens/s", flush=True)
            best = max(best, (rate, settings), key=lambda pair: pair[0])
            # Who takes over twice the best one's time is given up.
            limit_s = min(limit_s, 2 * answer.elapsed_s + 2.0)
        tried.append(row)
    return best[1], tried


def _describe(settings: PeerSettings) -> str:
    words = [settings.engine, settings.dtype, f"{settings.threads} threads", settings.attention]
    if settings.engine == "continuous":
        words.append(f"pages of {settings.page_size}")
    return ", ".join(words)


@dataclass(slots=True)
class _Series:
    """One contestant's runs."""

    name: str
    run: Callable[[int], float]
    rates: list[float] = field(default_factory=list)
    failed: str | None = None


def compare(
    workload: Workload,
    shape: ModelShape,
    *,
    target: str,
    peer: Peer,
    settings: dict[str, PeerSettings],
    targets: dict[str, float],
    limits: Limits,
    repeats: int,
    budget_s: float,
) -> tuple[list[Figure], dict[str, object]]:
    """Run the workload on ours and on every peer, ``repeats`` times or until the budget is spent.

    Every repeat draws new prompts (the same for all), so nobody finds the last one's in a cache; the order
    turns round with every repeat. ``targets``: the ratio to reach, by peer.
    """
    shares: list[float] = []

    def run_ours(seed: int) -> float:
        summary = run_loadgen(target, workload.arguments(seed), timeout_s=budget_s).summary
        shares.append(_limit_s(workload, shape, summary, limits) / summary.elapsed_s)
        return summary.generated_tokens_per_s

    def run_peer(name: str) -> Callable[[int], float]:
        chosen = msgspec.structs.replace(settings[name], batch_size=workload.concurrency)

        def run(seed: int) -> float:
            answer = peer.ask(chosen, workload.prompts(shape, seed), workload.new_tokens, budget_s)
            return answer.generated_tokens / answer.elapsed_s

        return run

    series = [_Series("kvserve", run_ours), *(_Series(name, run_peer(name)) for name in settings)]
    started = time.monotonic()
    for repeat in range(repeats):
        for contestant in series if repeat % 2 == 0 else reversed(series):
            if contestant.failed is not None:
                continue
            try:
                contestant.rates.append(contestant.run(1 + repeat))
            except ProcessFailed as failure:
                contestant.failed = str(failure)
        if time.monotonic() - started > budget_s:
            break
    details: dict[str, object] = {
        one.name: {"tokens_per_s": one.rates, "failed": one.failed} for one in series
    }
    ours = series[0]
    if not ours.rates:
        raise ProcessFailed(ours.failed or "no run ended")
    median = statistics.median(ours.rates)
    figures = [
        Figure(experiment=workload.name, shape=shape.name, name="kvserve", value=median, unit="tokens/s"),
        Figure(
            experiment=workload.name,
            shape=shape.name,
            name="against torch's matrix rate or the read bandwidth",
            value=statistics.median(shares),
            unit="",
            note="least time of the computed tokens by these, over the time taken",
        ),
    ]
    for one in series[1:]:
        if one.rates:
            other = statistics.median(one.rates)
            figures.append(
                Figure(
                    experiment=workload.name,
                    shape=shape.name,
                    name=f"against {one.name}",
                    value=median / other,
                    unit="x",
                    target=targets.get(one.name),
                    ours=median,
                    other=other,
                    other_name="tokens/s",
                    note=f"{len(one.rates)} runs",
                )
            )
    return figures, details


def _limit_s(workload: Workload, shape: ModelShape, summary: Summary, limits: Limits) -> float:
    """Return the least time that the computed tokens cost here: by arithmetic, or by reading weights."""
    head = shape.vocab_size * shape.hidden_size
    body = shape.weights_read_per_step - head
    num_tokens = summary.computed_prompt_tokens + summary.generated_tokens
    operations = 2 * (body * num_tokens + head * summary.generated_tokens)
    num_steps = summary.generated_tokens / workload.concurrency
    return max(
        operations / max(limits.float32_flops, limits.bfloat16_flops),
        num_steps * shape.bytes_read_per_step / limits.read_bytes_per_s,
    )
