"""What every test stands on: no network, no settings from outside, a fixed seed, few threads."""

from __future__ import annotations

import os
import signal

# Whoever starts pytest in the background of a shell has it ignore Ctrl-C, and all that it starts too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before anything imports torch or transformers.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Beside a second worker (pytest-xdist) one thread each; and none spins for the core that another one needs.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
for _name in [name for name in os.environ if name.startswith(("KVSERVE_", "OTEL_"))]:
    del os.environ[_name]

from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from kvcore.manager import CacheManager  # noqa: E402

# Same examples every time; no per-example deadline, since the machine is shared.
settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
# HYPOTHESIS_PROFILE=search looks for new examples, and goes through campaigns in full (tests/campaigns.py).
settings.register_profile(
    "search", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _why_no_gpu() -> str | None:
    """Say why tests marked ``gpu`` cannot run here; None if they can."""
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device; torch finds none"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu``, with the reason, where there is no device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _why_no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def caches_are_sound_afterwards(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Check the invariants of every cache that a test made, when it is over.

    ``breaks_cache`` marks a test that damages one on purpose.
    """
    made: list[CacheManager] = []
    initialise = CacheManager.__init__

    def remember(self: CacheManager, **arguments: Any) -> None:
        initialise(self, **arguments)
        made.append(self)

    monkeypatch.setattr(CacheManager, "__init__", remember)
    yield
    if request.node.get_closest_marker("breaks_cache") is None:
        for cache in made:
            cache.check_integrity()
