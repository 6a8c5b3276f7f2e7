"""Namespaces, packed tokens, and digests that outlive a process."""

from __future__ import annotations

import hashlib

from kvcore.keys import NamespaceKey, chain_digests, pack_tokens


def test_tokens_are_packed_as_they_are():
    assert pack_tokens([0, 7, 2**31 - 1]).tolist() == [0, 7, 2**31 - 1]
    assert pack_tokens([]).tobytes() == b""


def test_digests_are_the_same_in_every_process():
    seed = NamespaceKey("fp", adapter="a", salt="s").seed()
    first, second = chain_digests(seed, [[1, 2], [3, 4]])
    packed = b"".join(n.to_bytes(8, "little") for n in (1, 2))
    assert first == hashlib.blake2b(seed + packed, digest_size=32).digest()
    assert seed.hex() == "c0974e30c73d41d402e469b44533ef1de200c808482df276b18ba8efcba658f6"
    assert second.hex() == "827f397501faeac1659bfc4f82b2b81ea8e74a82a227e06d05248715863532cf"


def test_a_digest_names_the_whole_prefix():
    seed = NamespaceKey("fp").seed()
    [_, after_one] = chain_digests(seed, [[1], [9]])
    [_, after_two] = chain_digests(seed, [[2], [9]])
    assert after_one != after_two


def test_fields_of_a_namespace_cannot_run_into_each_other():
    seeds = {
        NamespaceKey("ab").seed(),
        NamespaceKey("a", adapter="b").seed(),
        NamespaceKey("a", salt="b").seed(),
        NamespaceKey("", adapter="ab").seed(),
    }
    assert len(seeds) == 4
