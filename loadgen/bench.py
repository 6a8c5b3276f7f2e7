"""``python -m loadgen.bench``: measure the server beside its peers and its limits, in one run.

::

    limits (bandwidth, matrix rate)
    core (tree, plan)              no model
    front end alone                a fake engine
    for each shape:                our server and the peer's process stand side by side, one works at a time
        repeats, identical prompts, decode of one sequence
        peer's best settings ──► workloads, order alternating
    for each shape:                our server alone, started anew for each of
        restore against recompute, each tier and codec
        restart, prefetch, trial of policies
    recorded traces (--trace, --sessions)   no server
    predict: encoder against its matrix products, then over gRPC

Writes ``bench.json`` and ``bench.md``. An experiment that cannot be run is named in the report and the others
go on; the exit status says how many could not.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

import kvserve
from loadgen.experiments.core import measure_core
from loadgen.experiments.figures import Figure, Report, markdown_lines
from loadgen.experiments.front_end import measure_front_end
from loadgen.experiments.machine import Limits, load_average, machine_facts
from loadgen.experiments.plan import (
    CONTINUOUS,
    GENERATE,
    PLANS,
    TARGETS,
    Plan,
    continuous_candidates,
    generate_candidates,
)
from loadgen.experiments.policies import measure_policies
from loadgen.experiments.predict import (
    measure_encoder,
    measure_features,
    measure_first_answer,
    measure_texts,
)
from loadgen.experiments.prefetch import measure_prefetch, replay_sessions
from loadgen.experiments.processes import ProcessFailed, Server, run_json, serve
from loadgen.experiments.repeats import measure_cold_prompts, measure_repeats
from loadgen.experiments.restart import measure_restart
from loadgen.experiments.shapes import SHAPES, ModelShape, write_model_folder
from loadgen.experiments.single_sequence import measure_decode
from loadgen.experiments.throughput import WORKLOADS, Peer, calibrate, compare
from loadgen.experiments.tier_places import PLACES, ExperimentSkipped
from loadgen.experiments.tiers import Prefixes, compute_prefixes, measure_tier
from loadgen.experiments.trial import measure_trial

__all__ = ["Bench", "main"]

BUILTIN_FOLDER = Path(__file__).resolve().parent.parent / "server" / "worker" / "builtin"
"""Whose tokenizer the random models borrow: prompts are token ids, but a server wants a tokenizer."""

LONG_MODEL_LENGTH = 8192
"""So that a prefix of 4,096 tokens has room for a question."""

Outcome = tuple[list[Figure], dict[str, object]]


class Bench:
    """One run: owns the report and the folder of logs."""

    def __init__(
        self, plan: Plan, *, mode: str, folder: Path, limits: Limits, server_arguments: list[str]
    ) -> None:
        self._plan = plan
        self._is_thorough = mode == "full"
        self._folder = folder
        self._limits = limits
        self._server_arguments = server_arguments
        self.report = Report(
            started_at=time.strftime("%Y-%m-%d %H:%M:%S %Z"), mode=mode, machine=machine_facts(limits)
        )

    def attempt(self, name: str, experiment: Callable[[], Outcome]) -> None:
        """Run one experiment and add what it says to the report, or why it said nothing."""
        print(f"{name} ...", flush=True)
        before, started = load_average(), time.monotonic()
        try:
            figures, details = experiment()
        except ExperimentSkipped as reason:
            self.report.skipped.append(f"{name}: {reason}")
            print(f"    left out: {reason}", flush=True)
            return
        except (ProcessFailed, kvserve.Error, msgspec.DecodeError, OSError) as failure:
            self.report.problems.append(f"{name}: {failure}")
            print(f"    not measured: {failure}", flush=True)
            return
        self.report.figures += figures
        if isinstance(table := details.pop("markdown", None), str):
            self.report.tables[name] = table
        self.report.details[name] = details | {
            "load_before": before,
            "load_after": load_average(),
            "took_s": time.monotonic() - started,
        }
        for figure in figures:
            beside = "" if figure.other is None else f" (beside: {figure.other:.4g} {figure.other_name})"
            met = {True: ", met", False: ", MISSED", None: ""}[figure.is_met]
            print(f"    {figure.name}: {figure.value:.4g} {figure.unit}{beside}{met}", flush=True)

    def run_core(self) -> None:
        """Measure the tree and the scheduler."""
        self.attempt("core", lambda: measure_core(self._plan.budget_s))

    def run_front_end(self) -> None:
        """Measure the front end alone."""
        self.attempt(
            "front end alone",
            lambda: measure_front_end(
                log=self._folder / "front-end.log",
                num_loads=max(1, min(4, self._limits.cores - 1)),
                streams=32,
                new_tokens=4096,
                timeout_s=self._plan.budget_s,
            ),
        )

    def run_shape(self, shape: ModelShape, *, only: set[str]) -> None:
        """Measure everything that has a model of this shape in it."""
        folder = write_model_folder(shape, self._folder / shape.name, tokenizer_from=BUILTIN_FOLDER)
        arguments = ["--random-weights", "--dtype", "bfloat16", *self._server_arguments]
        peer = Peer(shape, self._folder / f"peer-{shape.name}.log")
        try:
            with serve(str(folder), arguments, log=self._folder / f"server-{shape.name}.log") as server:
                self.report.details[f"server, {shape.name}"] = server.said
                self._run_on(shape, server, peer, only)
        except ProcessFailed as failure:
            self.report.problems.append(f"{shape.name}: {failure}")
            print(f"    not measured: {failure}", flush=True)
        finally:
            peer.stop()

    def _run_on(self, shape: ModelShape, server: Server, peer: Peer, only: set[str]) -> None:
        plan, target = self._plan, server.target
        cores, capability = self._limits.cores, self._limits.torch_capability
        if "repeats" in only:
            self.attempt(
                f"exact repeats, {shape.name}",
                lambda: measure_repeats(
                    shape.name,
                    target=target,
                    prompt_lengths=plan.repeat_lengths,
                    repeats=plan.num_repeats,
                    timeout_s=plan.budget_s,
                ),
            )
            self.attempt(
                f"identical cold prompts, {shape.name}",
                lambda: measure_cold_prompts(
                    shape.name,
                    target=target,
                    num_requests=64,
                    prompt_tokens=512,
                    seed=7,
                    timeout_s=plan.budget_s,
                ),
            )
        if "decode" in only:
            self._measure_bandwidth_again()
            self.attempt(
                f"decode of one sequence, {shape.name}",
                lambda: measure_decode(
                    shape,
                    target=target,
                    peer=peer,
                    candidates=generate_candidates(cores, capability),
                    read_bytes_per_s=self._limits.read_bytes_per_s,
                    repeats=plan.decode_repeats,
                    timeout_s=plan.budget_s,
                ),
            )
        if "throughput" in only and plan.workloads[shape.name]:
            self._run_workloads(shape, target, peer)

    def _measure_bandwidth_again(self) -> None:
        """Keep the higher bandwidth: what another process disturbed would make too low a limit."""
        try:
            again = msgspec.convert(run_json(["loadgen.experiments.limits"], timeout_s=300.0), Limits)
        except ProcessFailed as failure:
            self.report.problems.append(f"bandwidth, measured again: {failure}")
            return
        if again.read_bytes_per_s > self._limits.read_bytes_per_s:
            self._limits = again
            self.report.machine |= {
                name: value for name, value in machine_facts(again).items() if name != "load before"
            }

    def _run_workloads(self, shape: ModelShape, target: str, peer: Peer) -> None:
        plan, cores, capability = self._plan, self._limits.cores, self._limits.torch_capability
        print(f"best settings of the peers, {shape.name} ...", flush=True)
        generate, tried = calibrate(peer, shape, generate_candidates(cores, capability), plan.calibration_s)
        candidates = continuous_candidates(cores, capability, is_thorough=self._is_thorough, like=generate)
        continuous, also_tried = calibrate(peer, shape, candidates, plan.calibration_s)
        settings = {CONTINUOUS: continuous, GENERATE: generate}
        self.report.details[f"best settings of the peers, {shape.name}"] = {
            "tried": tried + also_tried,
            "best": {name: msgspec.to_builtins(chosen) for name, chosen in settings.items()},
        }
        for name in plan.workloads[shape.name]:
            self.attempt(
                f"{name}, {shape.name}",
                lambda name=name: compare(  # type: ignore[misc]
                    WORKLOADS[name],
                    shape,
                    target=target,
                    peer=peer,
                    settings=settings,
                    targets=TARGETS.get(shape.name, {}).get(name, {}),
                    limits=self._limits,
                    repeats=plan.repeats,
                    budget_s=plan.budget_s,
                ),
            )

    def run_shape_alone(self, shape: ModelShape, *, only: set[str]) -> None:
        """Measure what needs servers of its own: tiers, restarts, prefetch, trials."""
        plan = self._plan
        shape = dataclasses.replace(shape, max_model_length=LONG_MODEL_LENGTH)
        folder = self._folder / f"{shape.name}-alone"
        model = write_model_folder(shape, folder / "model", tokenizer_from=BUILTIN_FOLDER)
        arguments = ["--random-weights", "--dtype", "bfloat16", *self._server_arguments]
        if "tiers" in only:
            self._run_tiers(shape, model, arguments, folder)
        if "restart" in only:
            self.attempt(
                f"restart, {shape.name}",
                lambda: measure_restart(
                    shape,
                    model,
                    arguments,
                    prefix_tokens=plan.restart_tokens,
                    repeats=plan.restart_repeats,
                    folder=folder,
                    timeout_s=plan.budget_s,
                ),
            )
        if "prefetch" in only:
            self.attempt(
                f"prefetch, {shape.name}",
                lambda: measure_prefetch(
                    shape, model, arguments, sizes=plan.prefetch, folder=folder, timeout_s=plan.budget_s
                ),
            )
        if "trial" in only:
            self.attempt(
                f"policies on trial, {shape.name}",
                lambda: measure_trial(
                    shape,
                    model,
                    arguments,
                    workload=plan.trial_workload,
                    folder=folder,
                    timeout_s=plan.budget_s,
                ),
            )

    def _run_tiers(self, shape: ModelShape, model: Path, arguments: list[str], folder: Path) -> None:
        sizes, timeout_s = self._plan.tiers, self._plan.budget_s
        computed: list[Prefixes] = []

        def compute() -> Outcome:
            prefixes, outcome = compute_prefixes(
                shape,
                model,
                arguments,
                sizes=sizes,
                snapshots=folder / "snapshots",
                log=folder / "server-recompute.log",
                timeout_s=timeout_s,
            )
            computed.append(prefixes)
            return outcome

        self.attempt(f"recompute, {shape.name}", compute)
        for prefixes in computed:
            for name in sizes.places:
                self.attempt(
                    f"restore from {name}, {shape.name}",
                    lambda name=name, prefixes=prefixes: measure_tier(  # type: ignore[misc]
                        shape,
                        model,
                        arguments,
                        PLACES[name],
                        prefixes,
                        sizes=sizes,
                        folder=folder,
                        timeout_s=timeout_s,
                    ),
                )

    def run_traces(self, *, trace: Path | None, sessions: Path | None, only: set[str]) -> None:
        """Replay recorded traffic; without a trace, say so."""
        plan = self._plan

        def replay() -> Outcome:
            if sessions is None:
                raise ExperimentSkipped("no recorded sessions; name a folder of them with --sessions")
            return replay_sessions(sessions, seeds=plan.replay_seeds)

        def simulate() -> Outcome:
            if trace is None:
                raise ExperimentSkipped("no recorded trace; name one with --trace")
            return measure_policies(trace, capacities=plan.policy_capacities, timeout_s=plan.budget_s)

        if "prefetch" in only:
            self.attempt("prefetch for sessions, replay", replay)
        if "policies" in only:
            self.attempt("eviction policies", simulate)

    def run_predict(self) -> None:
        """Measure encoders, models of texts and the stateful encoder."""
        plan, timeout_s = self._plan, self._plan.budget_s
        for shape, dtype in plan.encoders:
            self.attempt(
                f"encoder, {shape}, {dtype}",
                lambda shape=shape, dtype=dtype: measure_encoder(  # type: ignore[misc]
                    shape, dtype, folder=self._folder, timeout_s=timeout_s
                ),
            )
        self.attempt(
            "texts over gRPC",
            lambda: measure_texts(
                cores=self._limits.cores,
                matrix_gflop_per_s=self._limits.float32_flops / 1e9,
                seconds=plan.predict_seconds,
                folder=self._folder / "texts",
                timeout_s=timeout_s,
            ),
        )
        self.attempt(
            "stateful encoder over gRPC",
            lambda: measure_features(
                seconds=plan.predict_seconds,
                num_loads=max(1, min(2, self._limits.cores - 2)),
                folder=self._folder,
                timeout_s=timeout_s,
            ),
        )
        self.attempt(
            "from file to answer",
            lambda: measure_first_answer(repeats=5, folder=self._folder / "load", timeout_s=timeout_s),
        )

    def write(self, folder: Path) -> None:
        """Write the report as JSON and as Markdown."""
        self.report.machine["load after"] = load_average()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_bytes(msgspec.json.format(msgspec.json.encode(self.report)))
        (folder / "bench.md").write_text("\n".join(markdown_lines(self.report)) + "\n")


EXPERIMENTS = (
    *("core", "front-end", "repeats", "decode", "throughput"),
    *("tiers", "restart", "prefetch", "policies", "trial", "predict"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return 0 if every experiment could be run. Missed targets are not failures."""
    parser = argparse.ArgumentParser(prog="loadgen.bench", description=(__doc__ or "").partition("\n")[0])
    modes = parser.add_mutually_exclusive_group()
    for name in PLANS:
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    parser.set_defaults(mode="quick")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=None)
    parser.add_argument(
        "--workloads", nargs="+", choices=sorted(WORKLOADS), default=None, help="instead of the mode's own"
    )
    parser.add_argument("--repeats", type=int, default=None, help="runs of each workload")
    parser.add_argument("--budget", type=float, default=None, help="seconds for one workload on one shape")
    parser.add_argument("--trace", type=Path, default=None, metavar="FILE", help="requests, for policies")
    parser.add_argument(
        "--sessions", type=Path, default=None, metavar="FOLDER", help="recorded sessions, for prefetch"
    )
    parser.add_argument("--out", type=Path, default=Path("reports"), help="folder of the report")
    parser.add_argument("--server-argument", action="append", default=[], help="for the server; repeatable")
    options = parser.parse_args(arguments)
    plan, only = PLANS[options.mode], set(options.only)
    if options.workloads is not None:
        plan = msgspec.structs.replace(plan, workloads=dict.fromkeys(SHAPES, tuple(options.workloads)))
    if options.repeats is not None:
        plan = msgspec.structs.replace(plan, repeats=options.repeats)
    if options.budget is not None:
        plan = msgspec.structs.replace(plan, budget_s=options.budget)
    # So that a terminated run, too, ends the processes it started and writes what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="kvserve-bench-") as folder:
        print("limits of the machine ...", flush=True)
        limits = msgspec.convert(run_json(["loadgen.experiments.limits"], timeout_s=300.0), Limits)
        bench = Bench(
            plan,
            mode=options.mode,
            folder=Path(folder),
            limits=limits,
            server_arguments=options.server_argument,
        )
        command = sys.argv[1:] if arguments is None else arguments
        bench.report.machine["command"] = shlex.join(["python", "-m", "loadgen.bench", *command])
        try:
            if "core" in only:
                bench.run_core()
            if "front-end" in only:
                bench.run_front_end()
            if only & {"repeats", "decode", "throughput"}:
                for name in options.shapes or plan.shapes:
                    bench.run_shape(SHAPES[name], only=only)
            if only & {"tiers", "restart", "prefetch", "trial"}:
                for name in options.shapes or plan.shapes:
                    bench.run_shape_alone(SHAPES[name], only=only)
            if "predict" in only:
                bench.run_predict()
            bench.run_traces(trace=options.trace, sessions=options.sessions, only=only)
        finally:
            bench.write(options.out)
    print(f"report: {options.out / 'bench.md'}")
    return 1 if bench.report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
