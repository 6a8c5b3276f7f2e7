"""Integers cut to 32 bits are found; everything that fits is left alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.v1 import generate_pb2 as pb
from server.rpc.wire import find_overflow


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@settings(deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=6))
def test_packed_values_overflow_exactly_beyond_32_bits(values: list[int]) -> None:
    body = b"".join(map(varint, values))
    raw = b"\x12" + varint(len(body)) + body  # DetokenizeRequest.token_ids
    found = find_overflow(pb.DetokenizeRequest.FromString(raw), raw)
    assert (found == "token_ids") == any(not -(2**31) <= value < 2**31 for value in values)


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.binary(max_size=20))
def test_single_values(value: int, unknown: bytes) -> None:
    parameters = b"\x08" + varint(value) + b"\x50" + varint(value)  # max_new_tokens, and seed of 64 bits
    raw = b"\x2a" + varint(len(parameters)) + parameters + b"\xfa\x3e" + varint(len(unknown)) + unknown
    found = find_overflow(pb.GenerateRequest.FromString(raw), raw)
    assert found == (None if -(2**31) <= value < 2**31 else "parameters.max_new_tokens")


def test_other_orders_and_written_defaults_are_fine() -> None:
    raw = b"\x2a\x02\x10\x00" + b"\x12\x02hi"
    assert find_overflow(pb.GenerateRequest.FromString(raw), raw) is None
