"""Run the Dockerfile's steps where there is no container engine, in a temporary folder that stands for the
image.

    python scripts/docker_steps.py [--keep] [--probe-seconds 180]

The Dockerfile itself is read, so that this cannot drift from it. Every absolute folder that the Dockerfile
names (``WORKDIR``, ``COPY`` targets, folders on ``PATH``) becomes a folder under the temporary one; ``RUN``
lines have those names replaced and run with the Dockerfile's ``ENV``. System packages and users belong to
the image alone: those commands are shown and left out. At the end the entry point is started from the
copied environment on a free port, and the ``HEALTHCHECK`` command must succeed against it.

What this does not show: the base image, its libc, the user switch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE_PYTHON: str = getattr(sys, "_base_executable", sys.executable)
"""The interpreter behind this one, where this one is an environment's."""
SYSTEM_COMMANDS = ("apt-get", "useradd", "rm -rf /var/lib/apt")
"""Beginnings of commands that change the image's system."""
INHERITED = (
    "HOME",
    "LANG",
    "PIP_CERT",
    "PIP_CONFIG_FILE",
    "PIP_FIND_LINKS",
    "SSL_CERT_FILE",
    "http_proxy",
    "https_proxy",
)
"""What a step sees of this process's environment: how pip reaches packages here, nothing else."""


@dataclass(slots=True)
class Stage:
    """One ``FROM`` and what followed: its folder, environment and the image's settings."""

    name: str
    root: Path
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Return where an image's path lies in the temporary folder."""
        absolute = path if path.startswith("/") else f"{self.workdir.rstrip('/')}/{path}"
        return self.root / absolute.lstrip("/")


class UnknownStepError(Exception):
    """The Dockerfile says something that this script does not act out."""


def read_instructions(text: str) -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order: keyword and arguments, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [(keyword.upper(), arguments.strip()) for keyword, arguments in pairs]


def say(text: str) -> None:
    """Print one line of the account."""
    print(text, flush=True)


class Build:
    """Act out instructions one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stages: dict[str, Stage] = {}
        self.stage: Stage | None = None
        self.arguments: dict[str, str] = {}
        self.owned: set[str] = set()
        self.bin = folder / "host-bin"
        self.bin.mkdir()
        # Not a link: an environment made from a link takes the link's folder for Python's home.
        python = self.bin / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(BASE_PYTHON)} "$@"\n')
        python.chmod(0o755)

    def current(self) -> Stage:
        """Return the stage being built."""
        if self.stage is None:
            raise UnknownStepError("an instruction before the first FROM")
        return self.stage

    def expand(self, text: str) -> str:
        """Replace ``${NAME}`` by build arguments and the stage's environment."""
        known = self.arguments | (self.stage.env if self.stage else {})
        return re.sub(r"\$\{(\w+)\}", lambda match: known.get(match[1], match[0]), text)

    def environment(self, stage: Stage) -> dict[str, str]:
        """Return what a process of this stage sees: image paths replaced by their places."""
        inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
        system_path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        settings = {name: self.relocate(stage, value) for name, value in stage.env.items()}
        settings["PATH"] = settings.get("PATH", "${PATH}").replace("${PATH}", system_path)
        return inherited | settings

    def relocate(self, stage: Stage, text: str) -> str:
        """Replace every folder of the image that the Dockerfile named by its place."""
        for path in sorted(self.owned, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.]){re.escape(path)}(?![\w-])", str(stage.place(path)), text)
        return text

    def act(self, keyword: str, arguments: str) -> None:
        """Act out one instruction; raise ``UnknownStepError`` for one it does not know."""
        say(f"{keyword} {arguments}")
        method = getattr(self, f"do_{keyword.lower()}", None)
        if method is None:
            raise UnknownStepError(f"{keyword} is not acted out by this script")
        method(arguments)

    def do_arg(self, arguments: str) -> None:
        name, _, default = arguments.partition("=")
        self.arguments.setdefault(name, default.strip('"'))

    def do_from(self, arguments: str) -> None:
        words = self.expand(arguments).split()
        name = words[2] if len(words) == 3 else "final"
        root = self.folder / name
        root.mkdir()
        self.stage = self.stages[name] = Stage(name, root)
        say(f"    base image left out; {BASE_PYTHON} {sys.version.split()[0]} stands for its python")

    def do_workdir(self, arguments: str) -> None:
        stage = self.current()
        stage.workdir = arguments
        self.owned.add(arguments)
        stage.place(arguments).mkdir(parents=True, exist_ok=True)

    def do_env(self, arguments: str) -> None:
        name, _, value = arguments.partition("=")
        self.current().env[name] = value.strip('"')
        for path in value.strip('"').split(":"):
            if path.startswith("/"):
                self.owned.add(str(Path(path).parent if path.endswith("/bin") else Path(path)))

    def do_copy(self, arguments: str) -> None:
        stage = self.current()
        words = arguments.split()
        source = None
        if words[0].startswith("--from="):
            source = self.stages[words.pop(0).removeprefix("--from=")]
        *names, target = words
        if target.startswith("/"):
            self.owned.add(target.rstrip("/"))
        for name in names:
            origin = source.place(name) if source else ROOT / name
            place = stage.place(target)
            if origin.is_dir():
                ignore = None if source else shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
                shutil.copytree(origin, place, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy2(origin, place / Path(name).name)
            if source:
                self.repoint(source.place(name), place)

    def repoint(self, old: Path, new: Path) -> None:
        """Give a copied environment's scripts their new place, which in an image is the old one."""
        for script in (new / "bin").glob("*"):
            if script.is_file() and not script.is_symlink():
                content = script.read_bytes()
                script.write_bytes(content.replace(str(old).encode(), str(new).encode()))

    def do_run(self, arguments: str) -> None:
        stage = self.current()
        for part in (piece.strip() for piece in self.expand(arguments).split("&&")):
            if part.startswith(SYSTEM_COMMANDS):
                say(f"    left out (changes the image's system): {part}")
                continue
            for match in re.findall(r"(?<=\s)/[\w./-]+", part):
                self.owned.add(match)
            command = self.relocate(stage, part)
            say(f"    $ {command}")
            started = time.monotonic()
            subprocess.run(
                ["/bin/sh", "-c", command],
                cwd=stage.place(stage.workdir),
                env=self.environment(stage),
                check=True,
            )
            say(f"    done in {time.monotonic() - started:.1f} s")

    def do_user(self, arguments: str) -> None:
        say(f"    left out: this process keeps its user instead of becoming {arguments}")

    def do_expose(self, arguments: str) -> None:
        del arguments

    def do_stopsignal(self, arguments: str) -> None:
        del arguments

    def do_healthcheck(self, arguments: str) -> None:
        self.current().healthcheck = json.loads(arguments[arguments.index("[") :])

    def do_entrypoint(self, arguments: str) -> None:
        self.current().entrypoint = json.loads(arguments)

    def do_cmd(self, arguments: str) -> None:
        self.current().command = json.loads(arguments)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_and_probe(build: Build, stage: Stage, probe_s: float) -> None:
    """Start the image's command, wait until its health probe succeeds, and end it.

    Raises ``TimeoutError`` or ``ChildProcessError``.
    """
    port = free_port()
    environment = build.environment(stage) | {
        "KVSERVE_PORT": str(port),
        "KVSERVE_METRICS_PORT": str(free_port()),
        "KVSERVE_TARGET": f"127.0.0.1:{port}",
        "HOME": str(stage.place(stage.workdir)),
    }
    path = environment["PATH"]
    words = [*stage.entrypoint, *stage.command]
    executable = shutil.which(words[0], path=path)
    if executable is None:
        raise FileNotFoundError(f"{words[0]} is not on the image's PATH")
    say(f"    $ {shlex.join(words)}   (port {port})")
    server = subprocess.Popen([executable, *words[1:]], cwd=stage.place(stage.workdir), env=environment)
    try:
        deadline = time.monotonic() + probe_s
        name, *rest = stage.healthcheck
        probe = [shutil.which(name, path=path) or name, *rest]
        while subprocess.run(probe, env=environment, capture_output=True, check=False).returncode != 0:
            if server.poll() is not None:
                raise ChildProcessError(f"the server ended with status {server.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the health probe did not succeed within {probe_s:.0f} s")
            time.sleep(0.5)
        say(f"    health probe `{shlex.join(stage.healthcheck)}` succeeded")
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=60)
        say(f"    SIGTERM: the server ended with status {status}")
        if status != 0:
            raise ChildProcessError(f"the server ended with status {status} after SIGTERM")
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def main() -> int:
    """Act out the Dockerfile; return 0 if every step and the probe succeeded."""
    parser = argparse.ArgumentParser(description="Run the Dockerfile's steps without a container engine.")
    parser.add_argument("--keep", action="store_true", help="leave the temporary folder behind")
    parser.add_argument(
        "--no-start", action="store_true", help="only build; do not start and probe the server"
    )
    parser.add_argument(
        "--probe-seconds", type=float, default=180.0, help="how long the server may take to be ready"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvserve-image-"))
    try:
        build = Build(folder)
        for keyword, arguments in read_instructions((ROOT / "Dockerfile").read_text()):
            build.act(keyword, arguments)
        if not options.no_start:
            say("start and probe")
            start_and_probe(build, build.current(), options.probe_seconds)
        say("every step of the Dockerfile succeeded (base image, system packages and user left out)")
    finally:
        if options.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
