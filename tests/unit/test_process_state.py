"""States, and waiting for them."""

from __future__ import annotations

import asyncio
import logging
from enum import Enum

import pytest

from server.process.state import StateCell


class Light(Enum):
    RED = "red"
    GREEN = "green"
    OFF = "off"


def light() -> StateCell[Light]:
    return StateCell(Light.RED, last=Light.OFF, name="light")


async def test_the_state_that_is_is_not_waited_for():
    cell = light()
    await asyncio.wait_for(cell.wait(Light.RED), 60)
    assert cell.value is Light.RED


async def test_whoever_waits_is_woken_even_if_it_changes_again_at_once():
    cell = light()
    waiting = [asyncio.ensure_future(cell.wait(Light.GREEN)) for _ in range(3)]
    await asyncio.sleep(0)
    cell.set(Light.GREEN)
    cell.set(Light.RED)
    await asyncio.wait_for(asyncio.gather(*waiting), 60)


async def test_whoever_leaves_is_forgotten():
    cell = light()
    waiting = asyncio.ensure_future(cell.wait(Light.GREEN))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    cell.set(Light.GREEN)
    assert cell.value is Light.GREEN


def test_the_log_tells_an_end_from_being_stopped(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    first, second = light(), light()
    first.set(Light.RED)
    first.set(Light.OFF)
    first.stop()
    second.stop()
    assert [record.message for record in caplog.records] == ["light is off", "light is stopped"]
    assert second.value is Light.OFF
