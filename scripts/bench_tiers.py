"""Measure checksums, codecs and the disk tier on this machine: ``python scripts/bench_tiers.py [FOLDER]``.

Blocks are float32 noise unless a file of real ones is given: ``--kv FILE.npy`` (blocks first).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvcore.codec import Int8Codec, NoCodec, ZstdCodec
from kvcore.keys import NamespaceKey, chain_digests, pack_tokens
from kvcore.tiers.disk import DiskTier
from kvcore.tiers.interface import CacheObject, ObjectFormat, ObjectKey, ObjectKind, Presence

NAMESPACE = NamespaceKey("bench").seed()
SLOTS = 16


def format_of(num_bytes: int) -> ObjectFormat:
    return ObjectFormat("bench", "float32", (num_bytes // (2 * SLOTS * 4 * 64 * 4), 2, SLOTS, 4, 64), 100)


def make_object(number: int, payload: bytes) -> CacheObject:
    tokens = [number] * SLOTS
    (digest,) = chain_digests(NAMESPACE, [tokens])
    key = ObjectKey(digest, ObjectKind.BLOCK)
    return CacheObject(key, NAMESPACE, NAMESPACE, 1, pack_tokens(tokens).tobytes(), payload)


def rate(num_bytes: int, action: Callable[[], object]) -> float:
    """Return MB/s over about a fifth of a second."""
    action()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.2:
        action()
        count += 1
    return count * num_bytes / (time.perf_counter() - started) / 1e6


def bench_checksums() -> dict[str, float]:
    data = os.urandom(1 << 20)
    return {
        name: rate(len(data), lambda name=name: hashlib.new(name, data).digest())  # type: ignore[misc]
        for name in ("sha256", "blake2b", "sha1", "md5")
    }


def wait_for(tier: DiskTier, objects: list[CacheObject]) -> None:
    """Wait without taking the interpreter from the threads that are measured."""
    while tier.stats().stored < len(objects):
        time.sleep(0.005)
    assert all(tier.lookup(stored.key) is Presence.YES for stored in objects)


def fetch_all(tier: DiskTier, objects: list[CacheObject], has_news: threading.Event) -> int:
    for stored in objects:
        assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=60)
    num_done = num_bytes = 0
    while num_done < len(objects):
        for outcome in tier.poll():
            assert outcome.found is not None, outcome.failure
            num_done += 1
            num_bytes += outcome.num_bytes
        if num_done < len(objects):
            has_news.wait(1)
            has_news.clear()
    return num_bytes


def drop_page_cache(folder: Path) -> None:
    """Ask the system to forget the files' pages, so that the medium is read."""
    for path in folder.rglob("*.block"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bench_disk(root: Path, num_bytes: int, total_bytes: int = 128 << 20) -> dict[str, object]:
    folder = root / str(num_bytes)
    payload = np.random.default_rng(0).standard_normal(num_bytes // 4).astype("<f4").tobytes()
    objects = [make_object(number, payload) for number in range(total_bytes // num_bytes)]
    has_news = threading.Event()
    tier = DiskTier(
        folder,
        format_of(num_bytes),
        1 << 40,
        on_ready=has_news.set,
        max_queued_reads=1 << 20,
        max_pending_bytes=1 << 30,
    )
    started = time.perf_counter()
    for stored in objects:
        ticket = tier.prepare(stored.key, num_bytes)
        assert ticket is not None
        tier.complete(ticket, stored)
    wait_for(tier, objects)
    write_s = time.perf_counter() - started
    drop_page_cache(folder)
    figures: dict[str, object] = {"write_mb_s": total_bytes / write_s / 1e6}
    for name in ("read_medium_mb_s", "read_page_cache_mb_s"):
        started = time.perf_counter()
        moved = fetch_all(tier, objects, has_news)
        figures[name] = moved / (time.perf_counter() - started) / 1e6
    one_by_one = []
    for stored in objects[:100]:
        started = time.perf_counter()
        fetch_all(tier, [stored], has_news)
        one_by_one.append(time.perf_counter() - started)
    figures["one_fetch_ms"] = 1e3 * sorted(one_by_one)[len(one_by_one) // 2]
    stats = tier.stats()
    figures["tier_says_latency_ms"] = 1e3 * stats.latency_s
    figures["tier_says_read_mb_s"] = stats.read_bytes_per_s / 1e6
    figures["tier_says_write_mb_s"] = stats.write_bytes_per_s / 1e6
    tier.close()
    shutil.rmtree(folder)
    return figures


def bench_start(root: Path, num_objects: int = 10_000) -> dict[str, float]:
    folder, object_format = root / "start", format_of(32768)
    payload = bytes(object_format.bytes_per_block)
    tier = DiskTier(folder, object_format, 1 << 40, max_pending_bytes=1 << 40)
    objects = [make_object(number, payload) for number in range(num_objects)]
    for stored in objects:
        ticket = tier.prepare(stored.key, len(payload))
        assert ticket is not None
        tier.complete(ticket, stored)
    wait_for(tier, objects)
    figures = {}
    for name in ("index", "scan"):
        tier.close()
        if name == "scan":
            next(folder.rglob("index")).unlink()
        started = time.perf_counter()
        tier = DiskTier(folder, object_format, 1 << 40)
        figures[f"{name}_s"] = time.perf_counter() - started
        assert tier.stats().num_objects == num_objects
    tier.close()
    shutil.rmtree(folder)
    return figures


def bench_codecs(blocks: list[bytes], object_format: ObjectFormat) -> dict[str, dict[str, float]]:
    figures = {}
    for codec in (NoCodec(), ZstdCodec(), Int8Codec()):
        encoded = [codec.encode(block, object_format) for block in blocks]
        of_one = encoded[0].data
        figures[codec.name.value] = {
            "ratio": sum(map(len, blocks)) / sum(len(one.data) for one in encoded),
            "encode_mb_s": rate(len(blocks[0]), lambda c=codec: c.encode(blocks[0], object_format)),  # type: ignore[misc]
            "decode_mb_s": rate(len(blocks[0]), lambda c=codec, d=of_one: c.decode(d, object_format)),  # type: ignore[misc]
        }
        apart = [one.divergence for one in encoded if one.divergence is not None]
        if apart:
            figures[codec.name.value]["mean_cosine_distance"] = float(
                np.mean([d.cosine_distance for d in apart])
            )
            figures[codec.name.value]["max_relative_l2"] = max(d.relative_l2 for d in apart)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--kv", type=Path, help="float32 blocks [block, layer, 2, slot, head, dim]")
    arguments = parser.parse_args()
    if arguments.kv:
        real = np.load(arguments.kv)
        _, layers, two, slots, heads, dim = real.shape
        object_format = ObjectFormat("bench", "float32", (layers, two, slots, heads, dim), 100)
        blocks = [block.tobytes() for block in real]
    else:
        object_format = format_of(256 << 10)
        drawn = np.random.default_rng(0).standard_normal((8, object_format.bytes_per_block // 4))
        blocks = [block.astype("<f4").tobytes() for block in drawn]
    root = Path(tempfile.mkdtemp(dir=arguments.folder, prefix="bench-tiers-"))
    try:
        report = {
            "load": os.getloadavg()[0],
            "checksum_mb_s": bench_checksums(),
            "codecs": bench_codecs(blocks, object_format),
            "disk": {f"{n >> 10} KiB": bench_disk(root, n) for n in (64 << 10, 256 << 10, 1 << 20)},
            "start_10000_objects": bench_start(root),
        }
    finally:
        shutil.rmtree(root)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
