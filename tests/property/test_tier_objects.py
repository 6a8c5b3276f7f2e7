"""Objects as bytes, for any format and content: back as they were, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.codec import NoCodec, ZstdCodec
from kvcore.keys import NamespaceKey, chain_digests, pack_tokens
from kvcore.tiers.index import ObjectIndex
from kvcore.tiers.interface import CacheObject, ObjectFormat, ObjectKey, ObjectKind
from kvcore.tiers.objects import ObjectError, decode, encode, max_object_bytes
from tests.tier_kit import make_object

small = st.integers(1, 4)
formats = st.builds(
    ObjectFormat,
    fingerprint=st.text(max_size=20),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    block_shape=st.tuples(small, st.just(2), small, small, small),
    vocab_size=st.integers(1, 30),
)
codecs = st.sampled_from([NoCodec(), ZstdCodec()])


@st.composite
def objects(draw, object_format):
    namespace = NamespaceKey(object_format.fingerprint, salt=draw(st.text(max_size=5))).seed()
    kind = draw(st.sampled_from(list(ObjectKind)))
    size = object_format.block_size
    low = {ObjectKind.BLOCK: size, ObjectKind.PARTIAL: 1, ObjectKind.LOGITS: 0}[kind]
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), min_size=low, max_size=size))
    parent = draw(st.sampled_from([namespace, next(chain_digests(namespace, [[1]]))]))
    digest = next(chain_digests(parent, [tokens])) if tokens else parent
    num_bytes = object_format.payload_bytes(kind)
    return CacheObject(
        key=ObjectKey(digest, kind),
        namespace=namespace,
        parent=parent,
        depth=draw(st.integers(0, 2**32 - 1)),
        tokens=pack_tokens(tokens).tobytes(),
        payload=draw(st.binary(min_size=num_bytes, max_size=num_bytes)),
        expires_in_s=draw(st.none() | st.floats(0.1, 1e6)),
    )


@given(st.data(), formats, codecs)
def test_any_object_comes_back_as_it_was(data, object_format, codec):
    stored = data.draw(objects(object_format))
    encoded = encode(stored, object_format, codec, now_unix=1e9)
    raw = encoded.to_bytes()
    assert len(raw) == encoded.num_bytes <= max_object_bytes(object_format, stored.key.kind)
    found = decode(raw, object_format, stored.key, stored.namespace, now_unix=1e9).found
    assert bytes(found.payload) == stored.payload
    assert (found.tokens, found.depth, found.parent) == (stored.tokens, stored.depth, stored.parent)
    assert found.expires_in_s == (
        None if stored.expires_in_s is None else pytest.approx(stored.expires_in_s, rel=1e-6, abs=1e-6)
    )


@given(st.data(), formats, codecs)
def test_any_flipped_bit_is_refused(data, object_format, codec):
    stored = data.draw(objects(object_format))
    raw = bytearray(encode(stored, object_format, codec, now_unix=1e9).to_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ObjectError):
        decode(raw, object_format, stored.key, stored.namespace)


@given(st.binary(max_size=600), formats)
def test_any_bytes_are_refused_with_an_object_error(data, object_format):
    wanted = make_object()
    with pytest.raises(ObjectError):
        decode(data, object_format, wanted.key, wanted.namespace)


steps = st.lists(
    st.tuples(
        st.sampled_from(["store", "use", "drop", "wait", "abandon"]), st.integers(0, 11), st.integers(1, 40)
    ),
    max_size=60,
)


@given(steps)
def test_an_index_stays_within_its_budget_and_never_orphans_what_it_keeps(todo):
    """Twelve objects of a binary tree, stored, used, dropped and expired at random."""
    namespace = NamespaceKey("m").seed()
    digests = [namespace]
    for number in range(12):
        digests.append(next(chain_digests(digests[number // 2], [[number]])))
    index, now = ObjectIndex(100), 0.0
    for what, number, amount in todo:
        key = ObjectKey(digests[number + 1], ObjectKind.BLOCK)
        entry = index.get(key)
        if what == "store" and entry is None:
            had = set(index)
            reservation = index.reserve(key, amount)
            assert reservation is not None
            _assert_leaves_first(had, reservation.evicted)
            reservation.entry.parent = digests[number // 2]
            reservation.entry.depth = number.bit_length()
            reservation.entry.expires_at = now + amount if amount % 3 == 0 else None
            index.admit(reservation.entry, now)
        elif what == "abandon" and entry is None:
            reservation = index.reserve(key, amount)
            if reservation is not None:
                index.drop(reservation.entry)
        elif what == "use" and entry is not None:
            index.touch(entry, now)
        elif what == "drop" and entry is not None:
            index.drop(entry)
        elif what == "wait":
            now += amount
            assert all(gone.expires_at <= now for gone in index.take_expired(now))
        assert index.num_bytes <= index.max_bytes
        index.check_integrity()


def _assert_leaves_first(had, evicted):
    gone = {entry.key.digest for entry in evicted}
    for entry in had - set(evicted):
        assert entry.parent not in gone
