"""Both ends of the socket pair, in one process."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.engine.control import FromChild, Start
from server.engine.messages import Cancel, Outputs, Submit, ToEngine, Tokens
from server.engine.options import EngineOptions
from server.engine.streams import StreamTable
from server.process.errors import FrameTooLargeError, LinkClosedError, LinkError, MalformedFrameError
from server.process.frames import FrameDecoder, encode_frame
from server.process.link import ChildLink, ParentLink, open_socket_pair
from server.process.messages import Heartbeat
from tests.fakes import spec_of

TO_CHILD = Start | ToEngine


class Parent:
    """The front end's end, and what it has heard."""

    def __init__(self) -> None:
        self.messages: list[FromChild] = []
        self.errors: list[LinkError] = []
        self.heard = asyncio.Event()
        self.link: ParentLink[FromChild]

    async def open(self, ours: socket.socket) -> Parent:
        self.link = await ParentLink.over(ours, FromChild, self.on_message, self.on_closed)
        return self

    def on_message(self, message: FromChild) -> None:
        self.messages.append(message)
        self.heard.set()

    def on_closed(self, error: LinkError) -> None:
        self.errors.append(error)
        self.heard.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self.heard.clear()
                await self.heard.wait()


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_messages_cross_both_ways_in_order_and_nothing_stays_open():
    before = num_fds()
    ours, theirs = open_socket_pair()
    child, parent = ChildLink(theirs.detach(), TO_CHILD), await Parent().open(ours)
    sent: list[Start | Submit] = [
        Start(EngineOptions(model="builtin")),
        *(Submit(k, spec_of([k] * 100)) for k in range(500)),
    ]
    received: list[object] = []

    def echo() -> None:
        while len(received) < len(sent):
            received.extend(child.receive())
        for key in range(500):
            child.send(Outputs([Tokens(key, 0, [key])]))

    thread = threading.Thread(target=echo)
    thread.start()
    for message in sent:
        parent.link.send(message)
    await parent.until(lambda: len(parent.messages) == 500)
    thread.join()
    assert received == sent
    assert parent.messages == [Outputs([Tokens(key, 0, [key])]) for key in range(500)]
    child.close()
    await parent.until(lambda: bool(parent.errors))
    await parent.link.close()
    await parent.link.close()
    assert [type(error) for error in parent.errors] == [LinkClosedError]
    assert num_fds() == before


async def test_sending_never_blocks_the_front_end_while_the_engine_does_not_read():
    ours, theirs = open_socket_pair()
    child, parent = ChildLink(theirs.detach(), TO_CHILD), await Parent().open(ours)
    message = Submit(1, spec_of(list(range(10_000))))
    for _ in range(200):
        parent.link.send(message)
    assert parent.link.num_unsent_bytes > 1_000_000
    received: list[object] = []

    def read() -> None:
        while len(received) < 200:
            received.extend(child.receive())

    await asyncio.to_thread(read)
    assert received == [message] * 200
    assert parent.link.num_unsent_bytes == 0
    child.close()
    await parent.link.close()


async def test_a_message_too_large_is_refused_and_the_link_stays_usable(monkeypatch: pytest.MonkeyPatch):
    ours, theirs = open_socket_pair()
    child, parent = ChildLink(theirs.detach(), TO_CHILD), await Parent().open(ours)
    huge = Submit(1, spec_of([1 << 40] * 8_000_000))
    with pytest.raises(FrameTooLargeError):
        parent.link.send(huge)
    parent.link.send(Cancel(2))
    assert await asyncio.to_thread(child.receive) == [Cancel(2)]
    child.close()
    await parent.link.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\xff\xff\xff\xff", FrameTooLargeError),
        (b"\x00\x00\x00\x02hi", MalformedFrameError),
        (b"\x00\x00\x00\x00", MalformedFrameError),
        (encode_frame(Cancel(1)), MalformedFrameError),
        (b"\x00\x00\x00\x09half", LinkClosedError),
    ],
)
async def test_bad_frames_from_the_engine_close_the_link(data: bytes, error: type[LinkError]):
    ours, theirs = open_socket_pair()
    parent = await Parent().open(ours)
    with theirs:
        theirs.sendall(data)
        if error is LinkClosedError:
            theirs.shutdown(socket.SHUT_RDWR)
        await parent.until(lambda: bool(parent.errors))
    assert [type(e) for e in parent.errors] == [error]
    parent.link.send(Cancel(1))
    await parent.link.close()


def test_bad_frames_from_the_front_end_are_typed_errors():
    for data, error in (
        (b"\xff\xff\xff\xff", FrameTooLargeError),
        (b"\x00\x00\x00\x02hi", MalformedFrameError),
    ):
        ours, theirs = open_socket_pair()
        child = ChildLink(theirs.detach(), TO_CHILD)
        with ours:
            ours.sendall(data)
            with pytest.raises(error):
                child.receive()
        child.close()


def test_the_engine_gives_up_on_a_front_end_that_does_not_read():
    ours, theirs = open_socket_pair()
    child = ChildLink(theirs.detach(), TO_CHILD, send_timeout_s=0.2)
    started = time.monotonic()

    def send_for_ever() -> None:
        while True:
            child.send(Outputs([Tokens(1, 0, list(range(1000)))]))

    with ours, pytest.raises(LinkClosedError, match="does not read"):
        send_for_ever()
    assert time.monotonic() - started < 60
    with pytest.raises(LinkClosedError):
        child.send(Heartbeat(0.0))
    child.close()


def test_closing_wakes_the_reader():
    ours, theirs = open_socket_pair()
    child = ChildLink(theirs.detach(), TO_CHILD)
    errors: list[LinkError] = []

    def read() -> None:
        try:
            child.receive()
        except LinkError as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    child.close()
    thread.join(60)
    assert not thread.is_alive()
    assert len(errors) == 1
    ours.close()


def test_neither_end_is_inherited():
    ours, theirs = open_socket_pair()
    fd = theirs.detach()
    os.set_inheritable(fd, True)
    child = ChildLink(fd, TO_CHILD)
    assert not os.get_inheritable(fd)
    assert not ours.get_inheritable()
    child.close()
    ours.close()


async def test_throughput_is_printed(capsys: pytest.CaptureFixture[str]):
    """No assertion: figures of a shared machine. 256 sequences, one token each per step."""
    num_steps, batch = 200, 256
    frames = [
        encode_frame(Outputs([Tokens(k, 0, [s]) for k in range(1, batch + 1)])) for s in range(num_steps)
    ]
    decoder: FrameDecoder[FromChild] = FrameDecoder(FromChild)
    table = StreamTable(lambda cancel: None)
    streams = [table.open() for _ in range(batch)]
    started = time.perf_counter()
    for frame in frames:
        for message in decoder.feed(frame):
            assert isinstance(message, Outputs)
    decode_s = time.perf_counter() - started

    num_read = 0

    async def read(stream: Any) -> None:
        nonlocal num_read
        left = num_steps
        async for ready in stream:
            for event in ready:
                left -= len(event.token_ids)
                num_read += len(event.token_ids)
            if not left:
                return

    readers = [asyncio.ensure_future(read(stream)) for stream in streams]
    await asyncio.sleep(0)
    started = time.perf_counter()
    for frame in frames:
        for message in decoder.feed(frame):
            assert isinstance(message, Outputs)
            table.dispatch(message.events)
        await asyncio.sleep(0)
    await asyncio.gather(*readers)
    whole_s = time.perf_counter() - started
    num_tokens = num_steps * batch
    assert num_read == num_tokens
    with capsys.disabled():
        print(
            f"\nlink: decode {num_tokens / decode_s / 1e3:.0f} k tokens/s, with dispatch and wake-ups "
            f"{num_tokens / whole_s / 1e3:.0f} k tokens/s, "
            f"{len(frames[0])} bytes per step of {batch}"
        )
