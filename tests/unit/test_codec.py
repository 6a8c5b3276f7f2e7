"""Codecs: the same bits back, or a measured distance from them; nothing larger than was asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import zstandard

from kvcore import codec as codecs
from kvcore.codec import (
    CodecError,
    CodecName,
    Int8Codec,
    NoCodec,
    ZstdCodec,
    codec_of,
    divergence_of,
    make_codec,
)
from kvcore.tiers.interface import ObjectKind
from tests.tier_kit import FORMAT, floats

DTYPES = ["float32", "bfloat16", "float16"]
LOSSLESS = [NoCodec(), ZstdCodec()]


def format_of(dtype):
    return replace(FORMAT, dtype=dtype)


def block(dtype, seed=1):
    return floats(format_of(dtype).bytes_per_block, seed, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codec", LOSSLESS, ids=lambda codec: codec.name)
def test_a_lossless_codec_gives_back_the_same_bits(codec, dtype):
    object_format = format_of(dtype)
    random_bits = np.random.default_rng(3).bytes(object_format.bytes_per_block)  # NaN and infinities too
    for payload in (block(dtype), bytes(object_format.bytes_per_block), random_bits):
        encoded = codec.encode(payload, object_format)
        assert encoded.divergence is None
        assert len(encoded.data) <= codec.max_encoded_bytes(object_format, ObjectKind.BLOCK)
        assert bytes(codec.decode(encoded.data, object_format)) == payload
    logits = floats(object_format.bytes_per_logits, 4)
    encoded = codec.encode(logits, object_format, kind=ObjectKind.LOGITS)
    assert bytes(codec.decode(encoded.data, object_format, kind=ObjectKind.LOGITS)) == logits


def test_no_codec_copies_nothing():
    payload = block("float32")
    encoded = NoCodec().encode(payload, FORMAT)
    assert encoded.data is payload
    assert NoCodec().decode(encoded.data, FORMAT) is payload


def test_zstd_makes_floats_smaller_because_it_sorts_their_bytes():
    large = replace(FORMAT, block_shape=(4, 2, 16, 4, 32))
    payload = floats(large.bytes_per_block, 1)
    packed = len(ZstdCodec().encode(payload, large).data)
    plain = len(zstandard.ZstdCompressor(level=1).compress(payload))
    assert packed < 0.92 * len(payload)
    assert packed < 0.98 * plain


def bomb(claimed):
    """A small frame of many zeros; ``claimed``: whether it says so."""
    return zstandard.ZstdCompressor(level=19, write_content_size=claimed).compress(bytes(64 << 20))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not zstd at all",
        bomb(claimed=True),
        bomb(claimed=False),
        ZstdCodec().encode(block("float32"), FORMAT).data[:-3],
        ZstdCodec().encode(block("float32"), FORMAT).data + b"more",
        zstandard.ZstdCompressor().compress(bytes(FORMAT.bytes_per_block - 1)),
        zstandard.ZstdCompressor().compress(bytes(FORMAT.bytes_per_block + 1)),
    ],
    ids=["empty", "text", "bomb", "silent bomb", "cut", "longer", "too small", "too large"],
)
def test_zstd_decodes_only_frames_of_the_payloads_size(data):
    with pytest.raises(CodecError):
        ZstdCodec().decode(data, FORMAT)


@pytest.mark.parametrize("codec", [*LOSSLESS, Int8Codec()], ids=lambda codec: codec.name)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_size_is_refused(codec, change):
    payload = bytes(FORMAT.bytes_per_block + change)
    with pytest.raises(CodecError, match="bytes where"):
        codec.encode(payload, FORMAT)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.01), ("bfloat16", 0.012), ("float16", 0.01)])
def test_int8_is_near_and_says_how_near(dtype, bound):
    object_format = format_of(dtype)
    payload = block(dtype)
    encoded = Int8Codec().encode(payload, object_format)
    decoded = Int8Codec().decode(encoded.data, object_format)
    assert len(encoded.data) == Int8Codec().max_encoded_bytes(object_format, ObjectKind.BLOCK)
    assert 0 < encoded.divergence.relative_l2 < bound
    assert 0 < encoded.divergence.cosine_distance < bound**2
    measured = divergence_of(payload, decoded, dtype)
    assert measured.relative_l2 == pytest.approx(encoded.divergence.relative_l2)


def test_int8_errs_by_half_a_step_of_its_own_head_at_most():
    values = np.frombuffer(block("float32"), "<f4").reshape(FORMAT.block_shape).copy()
    values[:, :, :, 1] *= 1000  # one loud head does not drown the others
    data = Int8Codec().encode(values.tobytes(), FORMAT).data
    decoded = np.frombuffer(Int8Codec().decode(data, FORMAT), "<f4").reshape(FORMAT.block_shape)
    steps = np.abs(values).max(axis=(2, 4), keepdims=True) / 127
    assert (np.abs(decoded - values) <= 0.5001 * steps).all()


def test_int8_of_zeros_is_zeros():
    encoded = Int8Codec().encode(bytes(FORMAT.bytes_per_block), FORMAT)
    assert bytes(Int8Codec().decode(encoded.data, FORMAT)) == bytes(FORMAT.bytes_per_block)
    assert encoded.divergence.relative_l2 == encoded.divergence.cosine_distance == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_int8_refuses_what_has_no_scale(dtype, value):
    payload = bytearray(block(dtype))
    size = 4 if dtype == "float32" else 2
    if dtype == "bfloat16":
        payload[4:6] = np.float32(value).tobytes()[2:]
    else:
        payload[size : 2 * size] = np.array([value], "<f4" if size == 4 else "<f2").tobytes()
    with pytest.raises(CodecError, match="NaN or infinity"):
        Int8Codec().encode(payload, format_of(dtype))


def test_what_lies_behind_the_end_of_a_partial_block_does_not_count():
    values = np.frombuffer(block("float32"), "<f4").reshape(FORMAT.block_shape).copy()
    clean = values.copy()
    clean[:, :, 2:] = 0
    values[:, :, 2:] = np.nan
    encoded = Int8Codec().encode(values.tobytes(), FORMAT, kind=ObjectKind.PARTIAL, num_slots=2)
    assert encoded.data == Int8Codec().encode(clean.tobytes(), FORMAT).data


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_int8_refuses_scales_that_no_block_has(scale):
    data = bytearray(Int8Codec().encode(block("float32"), FORMAT).data)
    data[:4] = np.float32(scale).tobytes()
    with pytest.raises(CodecError, match="scale"):
        Int8Codec().decode(data, FORMAT)


def test_float16_at_its_largest_stays_finite():
    object_format = format_of("float16")
    payload = np.full(object_format.bytes_per_block // 2, np.finfo(np.float16).max, "<f2").tobytes()
    decoded = Int8Codec().decode(Int8Codec().encode(payload, object_format).data, object_format)
    assert np.isfinite(np.frombuffer(decoded, "<f2")).all()


def test_logits_are_never_lossy():
    assert codec_of(Int8Codec(), ObjectKind.LOGITS).name is CodecName.NONE
    assert codec_of(Int8Codec(), ObjectKind.PARTIAL).name is CodecName.INT8
    assert codec_of(ZstdCodec(), ObjectKind.LOGITS).name is CodecName.ZSTD
    with pytest.raises(CodecError):
        Int8Codec().encode(bytes(FORMAT.bytes_per_logits), FORMAT, kind=ObjectKind.LOGITS)


def test_divergence_is_what_it_says():
    one = np.array([1, 0], "<f4").tobytes()
    other = np.array([0, 1], "<f4").tobytes()
    nothing = bytes(8)
    assert divergence_of(one, one, "float32").relative_l2 == 0.0
    assert divergence_of(one, other, "float32").cosine_distance == pytest.approx(1.0)
    assert divergence_of(one, other, "float32").relative_l2 == pytest.approx(2**0.5)
    assert divergence_of(nothing, nothing, "float32").relative_l2 == 0.0
    assert divergence_of(nothing, one, "float32").relative_l2 == 1.0


def test_codecs_are_made_by_name():
    assert [make_codec(name).name for name in CodecName] == list(CodecName)
    assert [make_codec(name).is_lossy for name in CodecName] == [False, False, True]
    with pytest.raises(CodecError, match="unknown codec 'gzip'"):
        make_codec("gzip")


def test_zstd_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(codecs, "zstandard", None)
    with pytest.raises(CodecError, match="extra `zstd`"):
        make_codec("zstd")
