"""Cutting a byte stream into messages."""

from __future__ import annotations

import random

import msgspec
import pytest

from server.engine.control import FromChild, Start
from server.engine.fake import fake_ready
from server.engine.messages import (
    Admitted,
    Cancel,
    Drain,
    EngineReady,
    Failed,
    FailureKind,
    Finish,
    Finished,
    Outputs,
    Refused,
    RequestTimings,
    RequestUsage,
    Submit,
    ToEngine,
    Tokens,
)
from server.engine.options import EngineOptions
from server.process.errors import FrameTooLargeError, MalformedFrameError
from server.process.frames import FrameDecoder, encode_frame
from server.process.messages import Heartbeat
from tests.fakes import spec_of

FROM_CHILD = [
    fake_ready(),
    Heartbeat(0.25, 3),
    Outputs(
        [
            Admitted(1, 16),
            Tokens(1, 0, [5, 6], [-0.5, -1.5], [[(5, -0.5)], [(6, -1.5)]], Finish.STOP_TOKEN),
            Finished(1, RequestUsage(3, 0, 0, 0, 3, 2), RequestTimings(0.1, 0.2, 0.3, 0.4, 1)),
            Refused(2, FailureKind.QUEUE_FULL, "full", 1.5),
            Failed(3, FailureKind.NUMERICAL, "not finite"),
        ]
    ),
]
TO_CHILD = [
    Start(EngineOptions(model="builtin")),
    Submit(1, spec_of([1, 2, 3], logit_bias=((4, -1.0),), salt="tenant"), 2.5),
    Cancel(1),
    Cancel(1, 2),
    Drain(),
]


def test_every_message_survives_the_way_in_pieces_of_any_size():
    draw = random.Random(7)
    for messages, kind in ((FROM_CHILD, FromChild), (TO_CHILD, Start | ToEngine)):
        wire = b"".join(map(encode_frame, messages * 20))
        for largest in (1, 3, 50, 5000):
            decoder: FrameDecoder[object] = FrameDecoder(kind)
            arrived: list[object] = []
            start = 0
            while start < len(wire):
                stop = start + draw.randint(1, largest)
                arrived += decoder.feed(wire[start:stop])
                start = stop
            assert arrived == messages * 20
            assert decoder.num_waiting_bytes == 0


def test_a_large_frame_in_many_pieces_is_collected():
    message = Submit(1, spec_of(list(range(200_000))))
    wire = encode_frame(message)
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    arrived = []
    for start in range(0, len(wire), 4096):
        arrived += decoder.feed(wire[start : start + 4096])
    assert arrived == [message]


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_arrive():
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    with pytest.raises(FrameTooLargeError):
        decoder.feed(b"\xff\xff\xff\xff")
    assert decoder.num_waiting_bytes == 0


def test_a_message_beyond_the_limit_is_not_sent():
    with pytest.raises(FrameTooLargeError):
        encode_frame(Submit(1, spec_of(list(range(1000)))), max_bytes=100)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"\xc1",
        b"no message",
        msgspec.msgpack.encode({"type": "unheard of"}),
        msgspec.msgpack.encode({"type": "cancel"}),
        msgspec.msgpack.encode({"type": "cancel", "key": "one"}),
        msgspec.msgpack.encode({"type": "cancel", "key": 1 << 40, "sample_index": 1.5}),
        msgspec.msgpack.encode(Cancel(1)) + b"\x00",
        b"\x91" * 100_000,
        b"\x82\xa4type\xa6cancel\xa3key\xa2\xff\xfe",
    ],
)
def test_what_is_no_message_is_an_error(payload: bytes):
    decoder: FrameDecoder[ToEngine] = FrameDecoder(ToEngine)
    with pytest.raises(MalformedFrameError):
        decoder.feed(len(payload).to_bytes(4, "big") + payload)


def test_random_bytes_are_an_error_or_wait_for_more_and_nothing_else():
    draw = random.Random(11)
    for _ in range(2000):
        decoder: FrameDecoder[FromChild] = FrameDecoder(FromChild, max_bytes=1 << 16)
        data = draw.randbytes(draw.randint(1, 64))
        try:
            assert decoder.feed(b"\x00\x00\x00" + data) == []
        except (MalformedFrameError, FrameTooLargeError):
            continue


def test_a_ready_message_is_typed():
    decoder: FrameDecoder[FromChild] = FrameDecoder(FromChild)
    [ready] = decoder.feed(encode_frame(fake_ready(vocab_size=12)))
    assert isinstance(ready, EngineReady)
    assert ready.vocab_size == 12
