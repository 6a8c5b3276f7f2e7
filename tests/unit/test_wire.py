"""Integers cut to 32 bits are found; everything that fits is left alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.v1 import generate_pb2 as pb
from kvserve.v1 import predict_pb2
from server.rpc.wire import MAX_MESSAGES, find_flood, find_overflow


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


def test_sub_messages_are_counted_at_every_depth() -> None:
    rows = predict_pb2.FeatureRows(rows=[{}] * (MAX_MESSAGES - 1)).SerializeToString()
    most = b"\x22" + varint(len(rows)) + rows  # with `features` itself as many as may be
    descriptor = predict_pb2.PredictRequest.DESCRIPTOR
    assert find_flood(descriptor, most) is None
    assert find_flood(descriptor, most + b"\x2a\x00") == "options"
    assert find_flood(descriptor, most + b"\x22\x02\x0a\x00") == "features"
    more = rows + b"\x0a\x00"
    assert find_flood(descriptor, b"\x22" + varint(len(more)) + more) == "features.rows"


def test_what_is_no_sub_message_is_no_flood() -> None:
    long = predict_pb2.FeatureRow(values=[1.0] * 500_000).SerializeToString()
    assert find_flood(predict_pb2.FeatureRow.DESCRIPTOR, long) is None
    unknown = (b"\xfa\x3e\x00" + b"\xf8\x3e\x01" + b"\xf9\x3e" + bytes(8)) * 50_000
    assert find_flood(pb.GenerateRequest.DESCRIPTOR, unknown) is None
    assert find_flood(pb.GenerateRequest.DESCRIPTOR, b"\xff" * 200_000) is None
    assert find_flood(pb.GenerateRequest.DESCRIPTOR, b"\x2a\xff\xff\xff\x7f" + bytes(200_000)) is None


@settings(deadline=None, max_examples=30)
@given(st.binary(min_size=20, max_size=200))
def test_no_bytes_make_counting_fail(raw: bytes) -> None:
    find_flood(predict_pb2.PredictRequest.DESCRIPTOR, raw * (2 * MAX_MESSAGES // len(raw) + 1))
