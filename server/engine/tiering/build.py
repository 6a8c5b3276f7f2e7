"""Open the tiers that the options name, and put them together.

Every tier is opened twice: for full blocks, and, under a budget of its own, for the ends of exact prompts
(partial blocks and last logits). Last logits are large beside what they save, and would otherwise push out
blocks that many share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from kvcore.clock import Clock
from kvcore.codec import make_codec
from kvcore.manager import CacheManager
from kvcore.tiers.disk import DiskTier
from kvcore.tiers.disk_folder import make_private_folder
from kvcore.tiers.host import HostTier
from kvcore.tiers.interface import ObjectFormat, Tier
from kvcore.tiers.outages import OutageLog
from kvcore.tiers.stack import TierStack
from kvcore.tiers.worth import Worth
from server.engine.options import TierOptions
from server.engine.tiering.tiering import Tiering

__all__ = ["open_tiers"]

log = logging.getLogger(__name__)

TAIL_SHARE = 8
"""One byte in so many of a tier's budget is for partial blocks and last logits."""

OVERHEAD_S = 0.003
"""Of a restore before any has been seen: the engine looks for what has come every other millisecond."""

SNAPSHOT_BYTES = 1 << 30
"""Host memory for what is restored from snapshots where no tier is configured; taken as it is needed."""


def open_tiers(
    options: TierOptions,
    cache: CacheManager,
    *,
    object_format: ObjectFormat,
    clock: Clock,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tiering | None:
    """Return the tiers that ``options`` ask for, open; None if they ask for none.

    ``on_progress(done, total)`` tells how far reading the disk's index is. Raises ``TierStartError`` for a
    tier that cannot work as configured; nothing stays open then.
    """
    if not options.has_any:
        return None
    if options.disk_path is not None:
        make_private_folder(Path(options.disk_path))
    worth = Worth(overhead_s=OVERHEAD_S)
    opened: list[Tier] = []
    disk_outages, redis_outages = OutageLog("disk"), OutageLog("redis")

    def stack(part: str, *, share: Callable[[int], int]) -> TierStack:
        tiers: list[Tier] = []
        host_bytes = options.host_bytes
        if host_bytes is None and options.disk_path is None and options.redis_url is None:
            host_bytes = SNAPSHOT_BYTES
        if host_bytes is not None:
            codec = make_codec(options.host_codec)
            tiers.append(HostTier(object_format, share(host_bytes), codec=codec, clock=clock))
            opened.append(tiers[-1])
        if options.disk_path is not None:
            tiers.append(
                DiskTier(
                    Path(options.disk_path) / part,
                    object_format,
                    share(options.disk_bytes),
                    codec=make_codec(options.disk_codec),
                    clock=clock,
                    on_progress=on_progress if part == "blocks" else None,
                    outages=disk_outages,
                )
            )
            opened.append(tiers[-1])
        if options.redis_url is not None:
            # Late: the package is an extra.
            from kvcore.tiers.redis import RedisOptions, RedisTier

            tiers.append(
                RedisTier(
                    options.redis_url,
                    object_format,
                    make_codec(options.redis_codec),
                    options=RedisOptions(
                        default_ttl_s=options.redis_lifetime_s,
                        num_readers=2 if part == "blocks" else 1,
                    ),
                    clock=clock,
                    outages=redis_outages,
                )
            )
            opened.append(tiers[-1])
        return TierStack(tiers, object_format, worth=worth, clock=clock)

    try:
        blocks = stack("blocks", share=lambda size: size - size // TAIL_SHARE)
        tails = stack("tails", share=lambda size: size // TAIL_SHARE)
    except BaseException:
        for tier in opened:
            tier.close()
        raise
    return Tiering(
        cache,
        blocks=blocks,
        tails=tails,
        object_format=object_format,
        worth=worth,
        clock=clock,
        mode=options.restore,
        prefetches_sessions=options.prefetches_sessions,
    )
