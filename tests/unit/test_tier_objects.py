"""Objects as bytes: the same object back, or a typed refusal; never another one, never much memory."""

from __future__ import annotations

import hashlib
import random
import struct
import tracemalloc
from dataclasses import replace

import pytest

from kvcore.codec import Int8Codec, NoCodec, ZstdCodec
from kvcore.keys import PrefixDigest
from kvcore.tiers.disk_files import FileRefused, Files
from kvcore.tiers.interface import FetchFailure, ObjectFormat, ObjectKey, ObjectKind
from kvcore.tiers.objects import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    ObjectError,
    decode,
    encode,
    max_object_bytes,
    read_header,
)
from tests.campaigns import cases
from tests.tier_kit import FORMAT, NAMESPACE, OTHER_NAMESPACE, assert_same, make_chain, make_object

NOW = 1_000_000.0
CODECS = [NoCodec(), ZstdCodec()]


def to_bytes(stored, *, codec=None, object_format=FORMAT):
    return encode(stored, object_format, codec or NoCodec(), now_unix=NOW).to_bytes()


def back(data, stored, *, object_format=FORMAT, namespace=NAMESPACE, **options):
    return decode(data, object_format, stored.key, namespace, **options).found


def sign(data):
    """Return an object with the checksum of what it is now."""
    body = bytes(data[:-CHECKSUM_BYTES])
    return body + hashlib.sha256(body).digest()[:CHECKSUM_BYTES]


def refused(data, stored, **options):
    with pytest.raises(ObjectError) as caught:
        back(data, stored, **options)
    return caught.value.failure


BLOCK = make_object()
PARTIAL = make_object([5, 6], parent=BLOCK, kind=ObjectKind.PARTIAL)
LOGITS = make_object([5, 6], parent=BLOCK, kind=ObjectKind.LOGITS)
BARE_LOGITS = make_object([], parent=BLOCK, kind=ObjectKind.LOGITS)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("stored", [BLOCK, PARTIAL, LOGITS, BARE_LOGITS], ids=repr)
def test_an_object_comes_back_as_it_was(stored, codec):
    encoded = encode(stored, FORMAT, codec, now_unix=NOW)
    data = encoded.to_bytes()
    assert len(data) == encoded.num_bytes <= max_object_bytes(FORMAT, stored.key.kind)
    assert_same(back(data, stored), stored)
    header = read_header(data[:HEADER_BYTES])
    assert (header.key, header.codec, header.object_bytes) == (stored.key, codec.name, len(data))


def test_the_payload_is_not_copied_on_either_way():
    encoded = encode(BLOCK, FORMAT, NoCodec(), now_unix=NOW)
    assert any(memoryview(buffer).obj is BLOCK.payload for buffer in encoded.buffers)
    data = bytearray(encoded.to_bytes())
    assert back(data, BLOCK).payload.obj is data


def test_bytes_are_the_same_every_time():
    """Whoever changes the format must raise OBJECT_VERSION: files of before are still lying around."""
    digest = hashlib.sha256(to_bytes(replace(BLOCK, payload=bytes(1024), expires_in_s=60.0))).hexdigest()
    assert digest == "aa13fe803046822f918c7f38e882befad803d93fb450677ae808ed82b4633721"


@pytest.mark.parametrize(
    "stored",
    [
        replace(BLOCK, tokens=BLOCK.tokens[:-4]),
        replace(BLOCK, tokens=BLOCK.tokens[:-1]),
        replace(BLOCK, tokens=BLOCK.tokens + b"\0\0\0\0"),
        replace(PARTIAL, tokens=b""),
    ],
    ids=["fewer", "not whole", "more", "none"],
)
def test_an_object_with_a_wrong_number_of_tokens_is_not_written(stored):
    with pytest.raises(ObjectError, match="tokens"):
        to_bytes(stored)


def test_every_shortened_and_lengthened_object_is_refused():
    data = to_bytes(PARTIAL)
    for length in [*range(0, len(data), 7), len(data) - 1]:
        assert refused(data[:length], PARTIAL) is FetchFailure.CORRUPT
    assert refused(data + b"\0", PARTIAL) is FetchFailure.CORRUPT


def test_another_models_object_is_a_mismatch():
    data = to_bytes(BLOCK)
    for other in (
        replace(FORMAT, fingerprint="model-b"),
        replace(FORMAT, vocab_size=51),
        replace(FORMAT, dtype="bfloat16"),
        replace(FORMAT, block_shape=(2, 2, 4, 4, 4)),
        ObjectFormat("model-a", "float16", (2, 2, 4, 2, 16), 50),  # as many bytes
    ):
        assert refused(data, BLOCK, object_format=other) is FetchFailure.MISMATCH


def test_another_tenants_object_of_the_same_tokens_is_a_mismatch():
    theirs = make_object(namespace=OTHER_NAMESPACE)
    data = to_bytes(theirs)
    assert refused(data, BLOCK) is FetchFailure.MISMATCH
    assert refused(data, theirs) is FetchFailure.MISMATCH  # under its own name, but not in its namespace
    assert refused(data, BLOCK, namespace=OTHER_NAMESPACE) is FetchFailure.MISMATCH


def test_an_object_under_another_name_is_a_mismatch():
    first, second = make_chain(2)
    assert refused(to_bytes(second), first) is FetchFailure.MISMATCH
    assert refused(to_bytes(LOGITS), PARTIAL) is FetchFailure.MISMATCH


def test_a_digest_that_is_not_that_of_the_tokens_is_a_mismatch_even_if_the_checksum_is_right():
    forged = replace(BLOCK, key=ObjectKey(PrefixDigest(b"\x11" * 32), ObjectKind.BLOCK))
    assert refused(to_bytes(forged), forged) is FetchFailure.MISMATCH
    other_tokens = replace(BLOCK, tokens=make_object([9, 9, 9, 9]).tokens)
    assert refused(to_bytes(other_tokens), other_tokens) is FetchFailure.MISMATCH
    bare = replace(BARE_LOGITS, parent=NAMESPACE)
    assert refused(to_bytes(bare), bare) is FetchFailure.MISMATCH


@pytest.mark.parametrize("offset", [8, 10], ids=["object version", "layout version"])
def test_another_version_is_a_mismatch(offset):
    data = bytearray(to_bytes(BLOCK))
    struct.pack_into("<H", data, offset, 2)
    assert refused(sign(data), BLOCK) is FetchFailure.MISMATCH


def test_another_byte_order_is_a_mismatch():
    data = bytearray(to_bytes(BLOCK))
    data[15] ^= 2
    assert refused(sign(data), BLOCK) is FetchFailure.MISMATCH


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_lifetime_that_is_no_number_is_corrupt(value):
    data = bytearray(to_bytes(replace(BLOCK, expires_in_s=5.0)))
    struct.pack_into("<d", data, 48, value)
    assert refused(sign(data), BLOCK) is FetchFailure.CORRUPT


def test_a_lifetime_is_judged_by_the_wall_clock_only_where_it_is_given():
    stored = replace(BLOCK, expires_in_s=60.0)
    data = to_bytes(stored)
    assert back(data, stored, now_unix=NOW + 20).expires_in_s == pytest.approx(40.0)
    assert back(data, stored, now_unix=NOW - 9999).expires_in_s == pytest.approx(60.0)
    assert back(data, stored).expires_in_s is None
    assert refused(data, stored, now_unix=NOW + 60) is FetchFailure.EXPIRED
    assert back(to_bytes(BLOCK), BLOCK, now_unix=NOW * 9).expires_in_s is None


def test_a_lossy_object_must_be_accepted():
    data = to_bytes(BLOCK, codec=Int8Codec())
    assert refused(data, BLOCK) is FetchFailure.MISMATCH
    decoded = decode(data, FORMAT, BLOCK.key, NAMESPACE, accept_lossy=True)
    assert decoded.is_lossy
    assert not decode(to_bytes(LOGITS, codec=Int8Codec()), FORMAT, LOGITS.key, NAMESPACE).is_lossy


def test_sizes_are_refused_before_memory_is_asked_for():
    """Signed headers that claim a terabyte; a zstd frame that unfolds to one."""
    import zstandard

    huge = bytearray(to_bytes(BLOCK))
    struct.pack_into("<QQ", huge, 64, 1 << 40, 1 << 40)
    tokens = bytearray(to_bytes(BLOCK))
    struct.pack_into("<I", tokens, 44, 1 << 30)
    zeros = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))
    bomb = bytearray(to_bytes(BLOCK, codec=ZstdCodec()))
    head = bomb[: HEADER_BYTES + 16]
    struct.pack_into("<Q", head, 72, len(zeros))
    packed = sign(bytes(head) + zeros + bytes(CHECKSUM_BYTES))
    tracemalloc.start()
    try:
        for data in (sign(huge), sign(tokens), packed):
            assert refused(data, BLOCK) is FetchFailure.CORRUPT
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80\x04cos\nsystem\n(S'true'\ntR." * 60, bytes(2000), b"\xff" * 2000],
    ids=["empty", "pickle", "zeros", "ones"],
)
def test_what_is_no_object_is_corrupt(data):
    assert refused(data, BLOCK) is FetchFailure.CORRUPT


def mutate(data, others, rng):
    """Return a damaged copy of an object's bytes, in one of the ways in which files get damaged."""
    damaged = bytearray(data)
    way = rng.randrange(9)
    if way == 0:
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif way == 1:
        for _ in range(rng.randrange(2, 20)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    elif way == 2:
        del damaged[rng.randrange(len(damaged)) :]
    elif way == 3:
        damaged += rng.randbytes(rng.randrange(1, 300))
    elif way == 4:  # a lost page
        at = rng.randrange(len(damaged))
        damaged[at : at + 512] = bytes(len(damaged[at : at + 512]))
    elif way == 5:  # half of another object
        other = rng.choice(others)
        at = rng.randrange(len(damaged))
        damaged[at:] = other[at:]
    elif way == 6:
        return rng.choice(others)
    elif way == 7:  # a header that is wrong, with a checksum that is right
        damaged[rng.randrange(HEADER_BYTES)] = rng.randrange(256)
        return sign(damaged)
    else:  # bytes moved
        at = rng.randrange(len(damaged))
        damaged.insert(at, damaged.pop(rng.randrange(len(damaged))))
    return bytes(damaged)


def run_campaign(folder, num_files):
    """Write damaged files, read them as the tier does; return how many still were the object asked for."""
    rng = random.Random(20)
    files = Files()
    path = folder / "object"
    stored = [*make_chain(3), PARTIAL, LOGITS, make_object(namespace=OTHER_NAMESPACE)]
    whole = [to_bytes(one, codec=codec) for one in stored for codec in CODECS]
    whole += [to_bytes(BLOCK, codec=Int8Codec()), to_bytes(replace(BLOCK, expires_in_s=9.0))]
    targets = [one for one in stored if one.namespace == NAMESPACE]
    num_whole = 0
    for _ in range(num_files):
        target = rng.choice(targets)
        path.write_bytes(mutate(whole[2 * stored.index(target) + rng.randrange(2)], whole, rng))
        try:
            data = files.read(path, max_bytes=max_object_bytes(FORMAT), min_bytes=HEADER_BYTES)
            found = back(data, target)
        except (ObjectError, FileRefused):
            continue
        assert bytes(found.tokens) == target.tokens
        assert bytes(found.payload) == bytes(target.payload)
        assert (found.parent, found.namespace) == (target.parent, NAMESPACE)
        num_whole += 1
    return num_whole


def test_damaged_files_give_no_wrong_payload(tmp_path):
    num_files = cases(10_000, full=100_000)
    assert run_campaign(tmp_path, num_files) < 0.15 * num_files  # some were not damaged where it matters
