"""Both ends of a link that says anything: what is written together, and hanging up."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest

from server.process.errors import FrameTooLargeError, LinkClosedError, LinkError
from server.process.frames import FrameDecoder, append_frame, encode_frame
from server.process.link import ChildLink, ParentLink, open_socket_pair
from server.process.messages import Fault, Heartbeat


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    number: int
    filling: bytes = b""


SAID = Ping | Heartbeat | Fault


class Parent:
    """The front end's end, and what it has heard."""

    def __init__(self) -> None:
        self.messages: list[Ping | Heartbeat | Fault] = []
        self.errors: list[LinkError] = []
        self.heard = asyncio.Event()

    async def open(self, ours: socket.socket) -> ParentLink[Ping | Heartbeat | Fault]:
        return await ParentLink.over(ours, SAID, self.on_message, self.on_closed)

    def on_message(self, message: Ping | Heartbeat | Fault) -> None:
        self.messages.append(message)
        self.heard.set()

    def on_closed(self, error: LinkError) -> None:
        self.errors.append(error)
        self.heard.set()

    async def until(self, num_messages: int, num_errors: int = 0) -> None:
        async with asyncio.timeout(60):
            while (len(self.messages), len(self.errors)) != (num_messages, num_errors):
                self.heard.clear()
                await self.heard.wait()


def test_frames_appended_one_by_one_are_those_encoded_alone():
    pings = [Ping(k, bytes(k)) for k in range(50)]
    buffer = bytearray()
    for ping in pings:
        append_frame(ping, buffer)
    assert buffer == b"".join(map(encode_frame, pings))
    decoder: FrameDecoder[Ping] = FrameDecoder(Ping)
    assert decoder.feed(bytes(buffer)) == pings


def test_a_frame_too_large_leaves_the_buffer_as_it_was():
    buffer = bytearray()
    append_frame(Ping(1), buffer, max_bytes=100)
    before = bytes(buffer)
    with pytest.raises(FrameTooLargeError):
        append_frame(Ping(2, bytes(100)), buffer, max_bytes=100)
    assert buffer == before
    append_frame(Ping(3), buffer, max_bytes=100)
    decoder: FrameDecoder[Ping] = FrameDecoder(Ping)
    assert decoder.feed(bytes(buffer)) == [Ping(1), Ping(3)]


def test_several_messages_leave_the_process_at_once():
    ours, theirs = open_socket_pair()
    child: ChildLink[Ping] = ChildLink(theirs.detach(), Ping)
    pings = [Ping(k) for k in range(20)]
    child.send_all(pings)
    child.send_all([])
    with ours:
        assert ours.recv(1 << 20) == b"".join(map(encode_frame, pings))
        child.close()


def test_of_several_messages_none_is_sent_if_one_is_too_large(monkeypatch: pytest.MonkeyPatch):
    ours, theirs = open_socket_pair()
    child: ChildLink[Ping] = ChildLink(theirs.detach(), Ping)
    with pytest.raises(FrameTooLargeError):
        child.send_all([Ping(1), Ping(2, bytes(65 << 20))])
    child.send(Ping(3))
    with ours:
        assert ours.recv(1 << 20) == encode_frame(Ping(3))
        child.close()


async def test_what_is_sent_in_one_turn_of_the_loop_is_written_together():
    ours, theirs = open_socket_pair()
    link = await Parent().open(ours)
    pings = [Ping(k) for k in range(20)]
    for ping in pings:
        link.send(ping)
    assert link.num_unsent_bytes == len(b"".join(map(encode_frame, pings)))
    theirs.setblocking(False)
    with theirs:
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        await asyncio.sleep(0)
        assert theirs.recv(1 << 20) == b"".join(map(encode_frame, pings))
        await link.close()


async def test_much_in_one_turn_is_written_on_the_way():
    ours, theirs = open_socket_pair()
    link = await Parent().open(ours)
    for number in range(4):
        link.send(Ping(number, bytes(100_000)))
    with theirs:
        assert theirs.recv(10) == encode_frame(Ping(0, bytes(100_000)))[:10]
        await link.close()


async def test_hanging_up_ends_what_the_process_hears_and_not_what_it_says():
    ours, theirs = open_socket_pair()
    parent = Parent()
    link = await parent.open(ours)
    child: ChildLink[Ping] = ChildLink(theirs.detach(), Ping)
    link.send(Ping(1))
    link.hang_up()
    link.hang_up()
    assert await asyncio.to_thread(child.receive) == [Ping(1)]
    with pytest.raises(LinkClosedError):
        await asyncio.to_thread(child.receive)
    child.send(Heartbeat(0.5, 2))
    await parent.until(1)
    assert parent.messages == [Heartbeat(0.5, 2)]
    child.close()
    await parent.until(1, 1)
    link.send(Ping(2))
    link.hang_up()
    await link.close()
