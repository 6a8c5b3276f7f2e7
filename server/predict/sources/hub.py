"""The Hugging Face hub: one repository at one commit, fetched into the hub's own cache or found there.

Configurations, tokenizers and safetensors weights are fetched; pickles and code never are, so that nothing
can run them. What the hub lists is bounded before anything is fetched. ``HF_HUB_OFFLINE``, ``HF_HOME``,
``HF_ENDPOINT`` and ``HF_TOKEN`` count as everywhere else.
"""

from __future__ import annotations

import itertools
import logging
import shutil
import threading
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from server.predict.errors import ModelRefusedError
from server.predict.model import LoadProgress
from server.predict.sources.folder import MAX_DEPTH, MAX_ENTRIES
from server.predict.sources.names import HubName, check_relative_path

__all__ = ["FETCHED_PATTERNS", "fetch_from_hub"]

FETCHED_PATTERNS = ("*.json", "*.jinja", "*.model", "*.txt", "*.safetensors")

log = logging.getLogger(__name__)


def fetch_from_hub(name: HubName, *, on_progress: LoadProgress) -> tuple[Path, Path]:
    """Return the snapshot's folder, and the folder that links in it must stay below. Blocks.

    Raises ``ModelRefusedError``.
    """
    # Slow to import, and only needed here.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    shown = f"{name.repository!r}"
    try:
        _check_listing(name)
        folder = snapshot_download(
            name.repository,
            revision=name.commit,
            allow_patterns=list(FETCHED_PATTERNS),
            tqdm_class=_progress_class(on_progress),
        )
    except GatedRepoError:
        raise ModelRefusedError(f"{shown} asks for a licence to be accepted on the hub first") from None
    except RevisionNotFoundError:
        raise ModelRefusedError(f"{shown} has no such commit") from None
    except RepositoryNotFoundError:
        raise ModelRefusedError(f"{shown} is not on the hub (or its access token is missing)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        log.info("fetching %s failed", name.repository, exc_info=error)
        raise ModelRefusedError(
            f"this commit of {shown} is not, or not whole, in the hub's cache, and the hub can not be reached"
        ) from None
    except ModelRefusedError:
        raise
    except Exception as error:
        # What the hub says is not under our control: files whose names the library itself refuses, no JSON.
        log.warning("fetching %s failed", name.repository, exc_info=error)
        raise ModelRefusedError(f"the hub's answer about {shown} can not be used") from None
    snapshot = Path(folder)
    if snapshot.name != name.commit:
        raise ModelRefusedError(f"the hub gave another commit of {shown}")
    # Snapshots are links into a sibling folder of blobs: <repository>/{snapshots/<commit>, blobs}.
    return snapshot, snapshot.parent.parent


def _check_listing(name: HubName) -> None:
    """Refuse a repository of too many, too large or strangely named files; the listing may be cached.

    When the hub cannot be asked, nothing is decided here: the fetch finds that out again, and says it.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.hf_api import RepoFile

    if isinstance(try_to_load_from_cache(name.repository, "config.json", revision=name.commit), str):
        return  # It was checked before it was fetched, and a commit does not change.
    try:
        listing = HfApi().list_repo_tree(name.repository, recursive=True, revision=name.commit)
        entries = list(itertools.islice(listing, MAX_ENTRIES + 1))
    except Exception as error:
        log.info("listing %s failed", name.repository, exc_info=error)
        return
    if len(entries) > MAX_ENTRIES:
        raise ModelRefusedError(f"the repository lists more than {MAX_ENTRIES} files")
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    wanted = [path for path in sizes if any(fnmatch(path, pattern) for pattern in FETCHED_PATTERNS)]
    for path in wanted:
        check_relative_path(path, what="a file name in the repository", max_parts=MAX_DEPTH)
    num_bytes = sum(sizes[path] for path in wanted)
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    if num_bytes > shutil.disk_usage(cache).free:
        raise ModelRefusedError(f"the files take {num_bytes >> 20} MiB, and the disk has less")


def _progress_class(on_progress: LoadProgress) -> type[Any]:
    """Return a class that the hub's library takes for a progress bar; its bytes go to ``on_progress``."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]
        """Draws nothing. Updated by the threads that fetch."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Of three bars (bytes received, bytes written, files) the second is told.
            self._counts = str(kwargs.get("desc", "")).startswith("Reconstructing")
            self._num_done = 0
            super().__init__(*args, **{**kwargs, "disable": True})
            self.total = kwargs.get("total")

        def update(self, n: float | None = 1) -> None:
            with lock:
                self._num_done += int(n or 0)
                if self._counts:
                    on_progress("fetching", self._num_done, int(self.total or 0))

    return Bar
