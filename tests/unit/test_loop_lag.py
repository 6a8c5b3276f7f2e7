"""A blocked event loop shows."""

import asyncio
import logging
import time

import pytest

from server.telemetry.loop_lag import INTERVAL_S, watch_loop_lag


async def test_blocked_event_loop_is_measured_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    lags: list[float] = []
    seen = asyncio.Event()

    def observe(lag_s: float) -> None:
        lags.append(lag_s)
        seen.set()

    watch = asyncio.create_task(watch_loop_lag(observe))
    await asyncio.sleep(0)  # the watcher has set its timer
    time.sleep(INTERVAL_S + 0.6)
    async with asyncio.timeout(60):
        await seen.wait()
    watch.cancel()
    assert lags[0] >= 0.5
    assert "event loop was blocked" in caplog.text
    assert [record.levelno for record in caplog.records if "blocked" in record.message] == [logging.WARNING]
