"""``kvctl cache top`` in a real pseudo-terminal."""

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
from pathlib import Path

import pytest_asyncio

import kvserve
from kvserve.v1 import cache_admin_pb2 as pb
from tests.rpc.scripted_server import scripted_server

NOTICED_S = 60.0
SHOW_ALTERNATE_SCREEN, SHOW_MAIN_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest_asyncio.fixture
async def server():
    async with scripted_server() as running:
        running.cache.add("the opening that all share", value=5, hits=12)
        running.cache.add("another tenant's", value=9, hits=3, namespace="ns-two", tenant="globex")
        yield running


class Screen:
    """A terminal of 160 columns with kvctl in it; everything that was written, and what it is set to."""

    def __init__(self, process, master, slave):
        self.process = process
        self._master = master
        self._slave = slave
        self._raw = ""
        self._news = asyncio.Event()

    @property
    def written(self):
        """All that was written, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self._raw)

    def settings(self):
        return termios.tcgetattr(self._slave)

    def on_readable(self):
        with contextlib.suppress(OSError):
            self._raw += os.read(self._master, 65536).decode(errors="replace")
        self._news.set()

    def press(self, keys):
        os.write(self._master, keys.encode())

    async def until(self, text, *, after=0):
        """Wait until ``text`` was written beyond position ``after``; return where it ends."""

        async def seen():
            while (found := self.written.find(text, after)) < 0:
                self._news.clear()
                await self._news.wait()
            return found + len(text)

        return await asyncio.wait_for(seen(), NOTICED_S)

    async def ended(self):
        return await asyncio.wait_for(self.process.wait(), NOTICED_S)


@contextlib.asynccontextmanager
async def top_in_a_terminal(server, *arguments):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment |= {"PYTHONPATH": str(Path(kvserve.__file__).parents[1]), "TERM": "xterm-256color"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvserve._cli", "cache", "top", "--target", server.target, *arguments,
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
    )  # fmt: skip
    screen = Screen(process, master, slave)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, screen.on_readable)
    try:
        yield screen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        loop.remove_reader(master)
        os.close(master)
        os.close(slave)


async def test_it_draws_reacts_to_keys_and_puts_the_terminal_back(server):
    async with top_in_a_terminal(server, "--interval", "10m") as screen:
        before = screen.settings()
        seen = await screen.until("q quit")
        assert SHOW_ALTERNATE_SCREEN in screen.written
        assert screen.settings()[3] & (termios.ECHO | termios.ICANON) == 0
        assert screen.written.index("globex") < screen.written.index("that all share")

        screen.press("sss")
        seen = await screen.until("by hits", after=seen)
        start = screen.written.rindex("cache of", 0, seen)
        assert screen.written.index("acme", start) < screen.written.index("globex", start)

        screen.press("p")
        await screen.until("paused", after=seen)
        screen.press("q")
        assert await screen.ended() == 0
        await screen.until(SHOW_MAIN_SCREEN)
        assert screen.written.rindex(SHOW_MAIN_SCREEN) > screen.written.rindex(SHOW_ALTERNATE_SCREEN)
        assert screen.written.rindex(SHOW_CURSOR) > screen.written.rindex(HIDE_CURSOR)
        assert screen.settings() == before


async def test_a_typed_filter_is_asked_of_the_server_at_once(server):
    async with top_in_a_terminal(server, "--interval", "10m") as screen:
        seen = await screen.until("q quit")
        screen.press("fglobx\x7fex\r")  # A mistyped x is taken back.
        await screen.until("only globex", after=seen)
        while not any(
            request.namespace == "ns-two"
            for request in server.cache.requests
            if isinstance(request, pb.ListPrefixesRequest)
        ):
            await asyncio.sleep(0)
        screen.press("\x1b[A")  # An arrow key means nothing.
        screen.press("q")
        assert await screen.ended() == 0


async def test_new_figures_are_drawn_by_themselves(server):
    async with top_in_a_terminal(server, "--interval", "20ms") as screen:
        await screen.until("tokens 40.0% (now -)")
        server.cache.tokens_asked, server.cache.tokens_reused = 2000, 1200
        await screen.until("tokens 60.0% (now 80.0%)")
        screen.press("q")
        assert await screen.ended() == 0


async def test_a_server_that_fails_is_shown_until_it_is_back(server):
    async with top_in_a_terminal(server, "--interval", "20ms") as screen:
        await screen.until("q quit")
        server.cache.unavailable_calls = 1
        seen = await screen.until("no answer: the engine starts")
        server.cache.tokens_reused = 500
        await screen.until("tokens 50.0%", after=seen)
        screen.press("q")
        assert await screen.ended() == 0


async def test_a_terminated_process_puts_the_terminal_back_too(server):
    async with top_in_a_terminal(server, "--interval", "10m") as screen:
        before = screen.settings()
        await screen.until("q quit")
        screen.process.send_signal(signal.SIGTERM)
        assert await screen.ended() == 128 + signal.SIGTERM
        await screen.until(SHOW_MAIN_SCREEN)
        assert screen.settings() == before


async def test_another_size_is_drawn_at_once(server):
    async with top_in_a_terminal(server, "--interval", "10m") as screen:
        seen = await screen.until("q quit")
        assert "PREVIEW" in screen.written
        fcntl.ioctl(screen._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        screen.process.send_signal(signal.SIGWINCH)  # It leads no foreground group here to get it by itself.
        start = await screen.until("cache of", after=seen)
        end = await screen.until("q quit", after=start)
        assert "PREVIEW" not in screen.written[start:end]
        screen.press("q")
        assert await screen.ended() == 0
