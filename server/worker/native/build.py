"""Compile the kernels for this machine and keep the result in a folder of this user alone.

A shared library in a cache is code that will run, so the folder and the file must belong to the current
user and be writable by nobody else; otherwise it is refused, not repaired. The file's name is a digest of
everything that decides its content (sources, compiler, flags, processor), so nothing is ever stale::

    $XDG_CACHE_HOME/kvserve/native/kernels-<sha256>.so        (or ~/.cache/kvserve/native)
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

__all__ = ["NativeUnavailable", "build", "default_cache_dir", "find_compiler"]

_SOURCES = Path(__file__).parent
_COMPILERS = ("c++", "g++", "clang++")
_TIMEOUT_S = 300
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-fno-math-errno",
    "-ffp-contract=fast",
)
"""Not ``-ffast-math``: a NaN must stay visible, and sums must keep their order."""


class NativeUnavailable(RuntimeError):
    """Say why the native kernels cannot be used here; another executor can serve instead."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def default_cache_dir() -> Path:
    """Return this user's folder for compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "kvserve" / "native"


def find_compiler() -> list[str]:
    """Return the command of a C++ compiler: ``$CXX``, else the usual names."""
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise NativeUnavailable(f"the C++ compiler named by CXX is not there: {command[0]}")
        return command
    for name in _COMPILERS:
        if shutil.which(name):
            return [name]
    raise NativeUnavailable("no C++ compiler (looked for CXX, c++, g++, clang++)")


def build(cache_dir: Path | None = None) -> Path:
    """Return the path of the compiled library, compiling it first if this machine has not yet.

    Blocks for some seconds the first time. Raises :class:`NativeUnavailable` if there is no compiler, if
    it fails, or if the cache could have been written by someone else.
    """
    compiler = find_compiler()
    folder = cache_dir if cache_dir is not None else default_cache_dir()
    target_flag = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*compiler, *_FLAGS, target_flag]
    _prepare_folder(folder)
    library = folder / f"kernels-{_digest(compiler, command)}.so"
    if not library.exists():
        _compile(command, library)
    _refuse_if_foreign(library, os.lstat(library), stat.S_ISREG)
    return library


def _compile(command: list[str], library: Path) -> None:
    """Compile into a temporary file and rename it, so that nobody ever loads half a library."""
    handle, name = tempfile.mkstemp(dir=library.parent, suffix=".tmp")
    os.close(handle)
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler, no shell
            [*command, str(_SOURCES / "kernels.cpp"), "-o", name],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise NativeUnavailable(f"the C++ compiler failed: {_first_error(done.stderr)}")
        Path(name).chmod(0o700)
        Path(name).replace(library)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailable(f"the C++ compiler took more than {_TIMEOUT_S} s") from error
    except OSError as error:
        raise NativeUnavailable(f"the kernels cannot be compiled: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)


def _first_error(text: str) -> str:
    lines = [line for line in text.splitlines() if "error" in line] or text.splitlines() or ["no message"]
    return lines[0].strip()


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in (folder, folder.parent):
            _refuse_if_foreign(part, os.lstat(part), stat.S_ISDIR)
    except OSError as error:
        raise NativeUnavailable(f"no folder for compiled kernels: {error.strerror}") from error


def _refuse_if_foreign(path: Path, info: os.stat_result, is_kind: object) -> None:
    if not callable(is_kind) or not is_kind(info.st_mode):
        raise NativeUnavailable(f"{path.name} in the kernel cache is not what it should be")
    if info.st_uid != os.geteuid():
        raise NativeUnavailable(f"{path.name} in the kernel cache belongs to another user")
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NativeUnavailable(f"{path.name} in the kernel cache is writable by others")


def _digest(compiler: list[str], command: list[str]) -> str:
    digest = hashlib.sha256()
    for part in (*sorted(_SOURCES.glob("*.h")), *sorted(_SOURCES.glob("*.cpp"))):
        digest.update(part.name.encode() + b"\0" + part.read_bytes() + b"\0")
    for text in ("\0".join(command), _compiler_version(compiler), _processor()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _compiler_version(compiler: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the user's own compiler, no shell
            [*compiler, "--version"], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable("the C++ compiler does not run") from error
    if done.returncode != 0:
        raise NativeUnavailable("the C++ compiler does not run")
    return done.stdout


def _processor() -> str:
    """Name the processor and its features: ``native`` code must not travel to another (a shared home)."""
    lines = [platform.machine(), platform.processor()]
    description = Path("/proc/cpuinfo")
    if description.exists():
        telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        first = description.read_text().split("\n\n")[0].splitlines()
        lines.extend(line for line in first if line.startswith(telling))
    return "\n".join(lines)
