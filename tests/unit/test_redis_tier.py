"""Redis as a tier: shared by servers, and whatever happens to it costs a recompute and a counter."""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvcore.codec import make_codec
from kvcore.tiers.errors import TierStartError
from kvcore.tiers.interface import FetchFailure, ObjectKind, Presence
from kvcore.tiers.redis import RedisOptions, RedisTier
from tests.redis_server import FaultyProxy, RedisServer, redis_server  # noqa: F401 - a fixture
from tests.tier_kit import (
    FORMAT,
    NAMESPACE,
    SOON_S,
    TierContract,
    assert_same,
    bring,
    make_chain,
    make_object,
    offer,
    poll_until,
    store,
    until,
)

PATIENT = RedisOptions(connect_timeout_s=SOON_S, command_timeout_s=SOON_S, lookup_patience_s=SOON_S)
"""For a Redis that works: how busy the machine is makes no difference."""
QUICK = RedisOptions(command_timeout_s=0.5)
"""For one that hangs."""
REQUEST_PATIENCE_S = 0.05
"""What a Redis that fails may cost one request."""


@pytest.fixture
def server(redis_server):  # noqa: F811
    with redis_server.connect() as connection:
        connection.command("FLUSHALL")
    return redis_server


@pytest.fixture
def own_server(redis_server):  # noqa: F811 - skips without a Redis
    """A Redis that a test may end and start again."""
    with tempfile.TemporaryDirectory(prefix="kvr") as folder:
        own = RedisServer(Path(folder))
        own.start()
        yield own
        own.stop()


@pytest.fixture
def proxy(server):
    proxy = FaultyProxy(server.socket_path)
    yield proxy
    proxy.close()


@pytest.fixture
def make_tier(server):
    tiers = []

    def make(url=None, object_format=FORMAT, codec=None, options=PATIENT, **more):
        tier = RedisTier(url or server.url, object_format, codec, options=options, **more)
        tiers.append(tier)
        return tier

    yield make
    for tier in tiers:
        tier.close()


def is_there(tier, key) -> bool:
    return until(lambda: tier.lookup(key) is not Presence.COMING) and tier.lookup(key) is Presence.YES


def value_name(server):
    with server.connect() as connection:
        (name,) = connection.keys("kvserve:*")
    return name


class TestRedisTierKeepsTheContract(TierContract):
    can_evict = False

    @pytest.fixture(autouse=True)
    def with_server(self, server):
        self.server = server

    def make_tier(self, *, max_bytes=0, clock=None, on_ready=None):
        return RedisTier(self.server.url, FORMAT, options=PATIENT, clock=clock, on_ready=on_ready)


# ------------------------------------------------------------------------------------- several servers


def test_a_second_server_finds_what_the_first_one_stored(make_tier):
    first, second = make_tier(), make_tier()
    chain = make_chain(20)
    for stored in chain:
        store(first, stored)
    for stored in chain:
        second.lookup(stored.key)
    until(lambda: all(second.lookup(stored.key) is Presence.YES for stored in chain))
    for stored in chain:
        assert second.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
    found = {outcome.key: outcome.found for outcome in poll_until(second, len(chain))}
    for stored in chain:
        assert_same(found[stored.key], stored)


def test_a_no_is_asked_again_soon_because_another_server_may_have_stored_it(make_tier):
    first = make_tier()
    second = make_tier(options=replace(PATIENT, absent_s=0.05))
    stored = make_object()
    assert not is_there(second, stored.key)
    store(first, stored)
    until(lambda: second.lookup(stored.key) is Presence.YES, "hearing of it")


def test_models_that_differ_in_anything_do_not_share_keys(make_tier, server):
    store(make_tier(), make_object())
    for other in (
        replace(FORMAT, fingerprint="model-b"),
        replace(FORMAT, vocab_size=51),
        replace(FORMAT, dtype="float16", block_shape=(2, 2, 4, 2, 8)),
    ):
        assert not is_there(make_tier(object_format=other), make_object().key)


def test_every_key_has_a_time_to_live_and_the_entrys_own_if_it_is_shorter(make_tier, server):
    tier = make_tier(options=replace(PATIENT, default_ttl_s=500.0))
    store(tier, make_object([1, 1, 1, 1]))
    with server.connect() as connection:
        assert 490_000 < int(connection.command("PTTL", value_name(server))[1:]) <= 500_000
    tier.remove([make_object([1, 1, 1, 1]).key])
    store(tier, make_object([2, 2, 2, 2], expires_in_s=100.0))
    with server.connect() as connection:
        assert 90_000 < int(connection.command("PTTL", value_name(server))[1:]) <= 100_000


def test_a_lossless_codec_gives_back_the_same_bytes_and_int8_says_that_it_does_not(make_tier):
    stored = make_object()
    zstd = make_tier(codec=make_codec("zstd"))
    store(zstd, stored)
    outcome = bring(zstd, stored.key)
    assert_same(outcome.found, stored)
    assert not outcome.is_lossy
    lossy = make_tier(codec=make_codec("int8"))
    other = make_object([7, 7, 7, 7])
    store(lossy, other)
    assert bring(lossy, other.key).is_lossy
    ((key, divergence),) = lossy.take_divergences()
    assert key == other.key
    assert 0 < divergence.relative_l2 < 0.05
    # A server whose codec is lossless does not take it.
    assert bring(make_tier(), other.key).failure is FetchFailure.MISMATCH


# ------------------------------------------------------------------------------- values nobody may trust


def poison(server, value: bytes) -> None:
    with server.connect() as connection:
        assert connection.command("SET", value_name(server), value) == b"+OK"


def value_of(server):
    with server.connect() as connection:
        return connection.command("GET", value_name(server))


PICKLE = b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."


@pytest.mark.parametrize(
    ("spoil", "failure"),
    [
        (lambda value: value[:-100], FetchFailure.CORRUPT),
        (lambda value: value[:40], FetchFailure.CORRUPT),
        (lambda value: value + b"x", FetchFailure.CORRUPT),
        (lambda value: PICKLE, FetchFailure.CORRUPT),
        (lambda value: bytes([*value[:600], value[600] ^ 1, *value[601:]]), FetchFailure.CORRUPT),
    ],
    ids=["truncated", "cut in the header", "longer", "pickle", "a bit flipped"],
)
def test_a_value_that_is_no_object_is_a_counted_failure_and_deleted(make_tier, server, spoil, failure):
    tier = make_tier()
    stored = make_object()
    store(tier, stored)
    poison(server, spoil(value_of(server)))
    assert bring(tier, stored.key).failure is failure
    assert tier.stats().failures == {failure: 1}
    until(lambda: tier.stats().quarantined == 1)
    with server.connect() as connection:
        until(lambda: connection.keys("kvserve:*") == [], "the deletion")
    assert tier.stats().is_available
    store(tier, stored)
    assert_same(bring(tier, stored.key).found, stored)


def test_an_object_of_another_tenant_or_model_under_this_key_is_refused(make_tier, server):
    mine, theirs = make_object(), make_object([9, 9, 9, 9])
    other_format = replace(FORMAT, fingerprint="model-b")
    writer = make_tier(object_format=other_format)
    store(writer, make_object(object_format=other_format))
    of_other_model = value_of(server)
    writer.remove([make_object().key])
    tier = make_tier()
    store(tier, theirs)
    of_other_prefix = value_of(server)
    tier.remove([theirs.key])
    store(tier, mine)
    for value in (of_other_model, of_other_prefix):
        poison(server, value)
        assert bring(tier, mine.key).failure is FetchFailure.MISMATCH
        store(tier, mine)  # it may be written again at once
    assert_same(bring(tier, mine.key).found, mine)


def test_a_value_of_half_a_gigabyte_is_neither_believed_nor_read(make_tier, server):
    tier, other = make_tier(), make_tier()
    stored = make_object()
    store(tier, stored)
    with server.connect() as connection:
        connection.command("SETRANGE", value_name(server), (512 << 20) - 1, b"x")
    assert not is_there(other, stored.key)  # by its length
    store(tier, make_object([5, 5, 5, 5]))


def test_a_value_that_grew_after_it_was_seen_is_read_no_further_than_an_object_goes(make_tier, server):
    tier = make_tier()
    stored = make_object()
    store(tier, stored)
    with server.connect() as connection:
        connection.command("SETRANGE", value_name(server), (64 << 20) - 1, b"x")
    outcome = bring(tier, stored.key)
    assert outcome.failure is FetchFailure.CORRUPT
    assert outcome.num_bytes < 8192


def test_a_key_of_another_type_is_corrupt_not_a_fault_of_redis(make_tier, server):
    tier = make_tier()
    stored = make_object()
    store(tier, stored)
    with server.connect() as connection:
        name = value_name(server)
        connection.command("DEL", name)
        connection.command("LPUSH", name, "x")
    assert bring(tier, stored.key).failure is FetchFailure.CORRUPT
    assert tier.stats().is_available


# --------------------------------------------------------------------------------------------- faults


def assert_costs_nothing(tier, key) -> None:
    """Ask as a request does: the answer is NO, at the latest when the patience is over."""
    started = time.monotonic()
    while tier.lookup(key) is Presence.COMING:
        assert time.monotonic() - started < SOON_S
        time.sleep(0.001)
    # Generous to a loaded machine; what is to be excluded is a wait for a timeout of seconds.
    assert time.monotonic() - started < REQUEST_PATIENCE_S + 0.5
    assert tier.lookup(key) is Presence.NO


def test_a_redis_that_is_not_there_starts_unavailable_and_is_found_when_it_comes(make_tier, own_server):
    own_server.stop()
    tier = make_tier(own_server.url)
    stored = make_object()
    assert not tier.stats().is_available
    assert tier.lookup(stored.key) is Presence.NO
    assert not tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=1.0)
    assert not offer(tier, stored)
    assert tier.stats().refused_stores == 1
    own_server.start()
    until(lambda: tier.stats().is_available, "the retry")
    store(tier, stored)
    assert_same(bring(tier, stored.key).found, stored)


def test_a_redis_that_dies_and_comes_back_empty_loses_nothing_but_time(make_tier, own_server, caplog):
    caplog.set_level(logging.INFO, "kvcore.tiers.outages")
    tier = make_tier(own_server.url)
    stored = make_object()
    store(tier, stored)
    own_server.stop()
    assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
    (outcome,) = poll_until(tier)
    assert outcome.failure is FetchFailure.UNREACHABLE
    assert tier.lookup(stored.key) is Presence.NO
    own_server.start()
    until(lambda: tier.stats().is_available, "the retry")
    assert not is_there(tier, stored.key)
    store(tier, stored)
    tier.close()
    gone, back = [r for r in caplog.records if r.name == "kvcore.tiers.outages"]
    assert (gone.levelname, back.levelname) == ("WARNING", "INFO")
    assert gone.getMessage().startswith("tier redis is left alone for a while: ")
    assert str(own_server.folder) not in gone.getMessage()
    assert back.getMessage() == "tier redis is back"


def test_nothing_is_believed_of_a_redis_from_the_moment_it_is_back(make_tier, own_server):
    """It was available for a moment before the old answers were forgotten, and said YES to what was lost."""
    tier = make_tier(own_server.url)
    stored = make_object()
    store(tier, stored)
    own_server.stop()
    assert tier.fetch(stored.key, namespace=NAMESPACE, timeout_s=SOON_S)
    poll_until(tier)
    health, seen = tier._shared.health, []
    health.on_change = lambda: seen.append((health.is_available, tier.lookup(stored.key)))
    own_server.start()
    until(lambda: seen, "the retry")
    assert seen == [(True, Presence.COMING)]


def test_a_redis_that_hangs_costs_a_request_its_patience_and_no_more(make_tier, proxy):
    tier = make_tier(proxy.url, options=QUICK)
    known = make_object()
    store(tier, known)
    proxy.stall()
    assert_costs_nothing(tier, make_object([1, 1, 1, 1]).key)
    # The next request does not even wait for that.
    assert tier.lookup(make_object([2, 2, 2, 2]).key) is Presence.NO
    until(lambda: not tier.stats().is_available, "the timeout")
    assert tier.lookup(known.key) is Presence.NO
    proxy.resume()
    until(lambda: tier.stats().is_available, "the retry")
    until(lambda: tier.lookup(known.key) is Presence.YES, "asking again")


def test_a_fetch_that_is_late_ends_at_its_deadline_and_its_connection_is_dropped(make_tier, proxy):
    tier = make_tier(proxy.url, options=replace(PATIENT, num_readers=1))
    chain = make_chain(2)
    for stored in chain:
        store(tier, stored)
    num_before = proxy.num_accepted
    proxy.stall()
    assert tier.fetch(chain[0].key, namespace=NAMESPACE, timeout_s=0.02)
    (outcome,) = poll_until(tier)
    assert outcome.failure is FetchFailure.TIMEOUT
    assert outcome.seconds < SOON_S
    proxy.resume()
    # The reply to the first command must not be taken for that to the second.
    assert_same(bring(tier, chain[1].key).found, chain[1])
    assert proxy.num_accepted == num_before + 2  # the reader's first, and the one after the drop


def test_cancelling_a_fetch_under_way_drops_its_connection(make_tier, proxy):
    tier = make_tier(proxy.url, options=replace(PATIENT, num_readers=1))
    chain = make_chain(2)
    for stored in chain:
        store(tier, stored)
    assert_same(bring(tier, chain[0].key).found, chain[0])
    num_before = proxy.num_accepted
    proxy.stall()
    assert tier.fetch(chain[0].key, namespace=NAMESPACE, timeout_s=SOON_S)
    until(lambda: any(worker.fetches for worker in tier._readers), "the command")
    tier.cancel([chain[0].key])
    (outcome,) = poll_until(tier)
    assert outcome.failure is FetchFailure.CANCELLED
    proxy.resume()
    assert_same(bring(tier, chain[1].key).found, chain[1])
    assert proxy.num_accepted == num_before + 1
    assert tier.stats().is_available  # it was not Redis's fault


def test_a_connection_closed_while_idle_is_dialled_again_without_a_failure(make_tier, proxy):
    tier = make_tier(proxy.url, options=replace(PATIENT, num_readers=1))
    stored = make_object()
    store(tier, stored)
    assert_same(bring(tier, stored.key).found, stored)
    proxy.cut()
    assert_same(bring(tier, stored.key).found, stored)
    assert tier.stats().failures == {}
    assert tier.stats().is_available


def set_option(server, name: str, value: str) -> None:
    with server.connect() as connection:
        assert connection.command("CONFIG", "SET", name, value) == b"+OK"


def test_a_redis_out_of_memory_refuses_stores_and_still_serves(make_tier, server):
    tier = make_tier()
    stored = make_object()
    store(tier, stored)
    set_option(server, "maxmemory", "1mb")
    try:
        assert offer(tier, make_object([1, 1, 1, 1]))
        until(lambda: tier.stats().store_failures == 1)
        assert not offer(tier, make_object([2, 2, 2, 2]))
        assert tier.stats().last_fault == "Redis is out of memory"
        assert tier.stats().is_available
        assert_same(bring(tier, stored.key).found, stored)
    finally:
        set_option(server, "maxmemory", "0")
    until(lambda: offer(tier, make_object([3, 3, 3, 3])), "writing again")


def test_a_read_only_replica_refuses_stores_and_still_serves(make_tier, server):
    tier = make_tier()
    stored = make_object()
    store(tier, stored)
    with server.connect() as connection:
        connection.command("CONFIG", "SET", "replica-serve-stale-data", "yes")
        connection.command("REPLICAOF", "127.0.0.1", "1")
        try:
            assert offer(tier, make_object([1, 1, 1, 1]))
            until(lambda: tier.stats().store_failures == 1)
            assert tier.stats().last_fault == "this Redis is read-only"
            assert_same(bring(tier, stored.key).found, stored)
        finally:
            connection.command("REPLICAOF", "NO", "ONE")


def test_wrong_credentials_make_it_unavailable_and_are_nowhere_to_be_read(make_tier, server):
    set_option(server, "requirepass", "right")
    try:
        url = f"unix://:very-secret@{server.socket_path}"
        tier = make_tier(url)
        assert not tier.stats().is_available
        fault = tier.stats().last_fault
        assert fault == "Redis refused the credentials"
        for text in (fault, repr(tier), repr(tier.stats())):
            assert "secret" not in text
            assert str(server.socket_path) not in text
        right = make_tier(f"unix://:right@{server.socket_path}")
        store(right, make_object())
    finally:
        with server.connect() as connection:
            connection.command("AUTH", "right")
            connection.command("CONFIG", "SET", "requirepass", "")


def serve_replies(reply: bytes):
    """Start a server that gives one answer to whatever it gets; return its URL and how to end it."""
    import socket
    import threading

    listener = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def serve(connection):
        try:
            while connection.recv(65536):
                connection.sendall(reply)
        except OSError:
            pass

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            accepted.append(connection)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()

    def end():
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(60)
        for connection in accepted:
            connection.close()

    return f"redis://127.0.0.1:{listener.getsockname()[1]}", end


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "Redis is loading its data"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", None),
        (b"$9999999999\r\nx", None),
        (b"\x00\xff" * 100, None),
    ],
    ids=["loading", "a web server", "a reply without end", "noise"],
)
def test_whatever_answers_instead_of_redis_makes_the_tier_unavailable(make_tier, reply, fault):
    url, end = serve_replies(reply)
    tier = make_tier(url, options=QUICK)
    try:
        assert not tier.stats().is_available
        assert fault in (None, tier.stats().last_fault)
        assert tier.lookup(make_object().key) is Presence.NO
    finally:
        tier.close()
        end()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@somewhere/",
        "redis://user:secret@somewhere:port/",
        "redis://:secret@somewhere?socket_timeout=soon",
        "redis://:secret@somewhere?no_such_option=1",
        "unix://",
        "",
    ],
)
def test_a_url_that_cannot_work_is_refused_at_start_without_repeating_it(make_tier, url):
    with pytest.raises(TierStartError) as refused:
        RedisTier(url, FORMAT)
    assert "secret" not in str(refused.value)
    assert "somewhere" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_an_urls_own_timeouts_do_not_replace_the_tiers(make_tier, proxy):
    tier = make_tier(proxy.url + "?socket_timeout=1000", options=RedisOptions(command_timeout_s=0.1))
    proxy.stall()
    tier.lookup(make_object().key)
    until(lambda: not tier.stats().is_available, "the timeout")
    proxy.resume()


# --------------------------------------------------------------------------------------------- bounds


def test_stores_that_wait_are_bounded_in_bytes(make_tier, proxy):
    room = 3 * FORMAT.bytes_per_block
    tier = make_tier(proxy.url, options=replace(PATIENT, max_queued_bytes=room))
    proxy.stall()
    taken = [offer(tier, stored) for stored in make_chain(6)]
    assert taken == [True, True, True, False, False, False]
    assert tier.stats().refused_stores == 3
    proxy.resume()
    until(lambda: tier.stats().stored == 3)
    assert offer(tier, make_object([4, 4, 4, 4]))


def test_what_is_remembered_of_redis_is_bounded(make_tier):
    tier = make_tier(options=replace(PATIENT, max_known=10))
    chain = make_chain(30)
    for stored in chain:
        store(tier, stored)
    assert len(list(tier.keys())) == 10
    assert tier.stats().num_objects == 10
    assert tier.stats().num_bytes < 10 * 2 * FORMAT.bytes_per_block
    assert_same(bring(tier, chain[0].key).found, chain[0])  # forgotten, but there


def test_a_removal_outlives_a_redis_that_is_down(make_tier, proxy, server):
    tier = make_tier(proxy.url, options=QUICK)
    stored = make_object()
    store(tier, stored)
    proxy.stall()
    tier.lookup(make_object([1, 1, 1, 1]).key)
    until(lambda: not tier.stats().is_available, "the timeout")
    assert tier.clear(NAMESPACE) == 1
    proxy.resume()
    with server.connect() as connection:
        until(lambda: connection.keys("kvserve:*:block:*") == [], "the removal")


def test_stores_handed_over_before_the_end_are_written(make_tier, server):
    tier = make_tier()
    chain = make_chain(50)
    assert all(offer(tier, stored) for stored in chain)
    tier.close()
    second = make_tier()
    for stored in (chain[0], chain[-1]):
        assert is_there(second, stored.key)


def test_closing_while_redis_hangs_takes_a_second_or_two(make_tier, proxy):
    tier = make_tier(proxy.url, options=PATIENT)
    proxy.stall()
    offer(tier, make_object())
    tier.lookup(make_object([1, 1, 1, 1]).key)
    started = time.monotonic()
    tier.close()
    assert time.monotonic() - started < SOON_S
    assert all(not worker.is_alive for worker in tier._workers)


def test_speed_is_measured_at_start(make_tier):
    stats = make_tier().stats()
    assert stats.latency_s > 0
    assert stats.read_bytes_per_s > 0
    assert stats.write_bytes_per_s > 0


def test_a_probe_leaves_nothing_behind(make_tier, server):
    make_tier()
    with server.connect() as connection:
        assert connection.keys() == []


def test_partial_and_logits_have_bounds_of_their_own_size(make_tier):
    tier = make_tier()
    logits = make_object([5], parent=make_object(), kind=ObjectKind.LOGITS)
    store(tier, logits)
    assert bring(tier, logits.key).num_bytes < FORMAT.bytes_per_block
