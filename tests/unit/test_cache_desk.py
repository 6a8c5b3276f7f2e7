"""The desk: every operation by message, as the front end sends it."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kvcore.index import digest_of
from kvcore.keys import NamespaceKey, PrefixDigest
from kvcore.pins import PinKind
from server.engine.admin_messages import (
    AdminCall,
    AdminErrorKind,
    AdminProgress,
    AdminRefusal,
    AdminReply,
    CacheEventKind,
    CacheEvents,
    ClearCache,
    DescribePolicy,
    Evicted,
    EvictPrefixes,
    ListPrefixes,
    LookUpPrefix,
    Pinned,
    PinPrefix,
    PinType,
    PrefetchReport,
    PrefixRef,
    ReadStats,
    ReleasePrefix,
    RestoreSnapshot,
    SaveSnapshot,
    SetLifetime,
    SetPolicy,
    SnapshotDone,
    Touched,
    TrialReport,
    UnpinPrefix,
)
from server.engine.cache_desk import CacheDesk
from server.engine.cache_ops import watch
from server.engine.cache_ops.interface import SnapshotStep
from tests.cache_kit import CacheKit

A, B, C, D = [1] * 4, [2] * 4, [3] * 4, [4] * 4
OTHER = NamespaceKey("model", salt="other")


@dataclass
class Shelf:
    """A tier that has a few objects, in a dictionary."""

    has: dict[bytes, str] = field(default_factory=dict)
    renewed: list[int] = field(default_factory=list)

    def blocks_of(self, digests):
        found: dict[str, int] = {}
        for digest in digests:
            if digest in self.has:
                found[self.has[digest]] = found.get(self.has[digest], 0) + 1
        return found

    def lookup_beyond(self, namespace, tokens, from_block):
        return {"disk": len(tokens) // 4 - from_block} if self.has else {}

    def remove(self, *, digests=None, namespace=None):
        doomed = list(self.has) if digests is None else [d for d in digests if d in self.has]
        for digest in doomed:
            del self.has[digest]
        return len(doomed)

    def renew(self, nodes):
        self.renewed.append(len(nodes))

    def reports(self):
        return []

    def prefetch(self):
        return PrefetchReport(waiting_fetched=3)

    def save(self, name, *, namespace, replace):
        for number in range(3):
            yield SnapshotStep(number, 3, 100 * number, 0)
        return SnapshotDone(3, 300, 0)

    def restore(self, name):
        yield SnapshotStep(0, 1, 0, 0)
        return SnapshotDone(1, 100, 0)


class Shadow:
    """A trial that only remembers what it was told."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def policies(self):
        return self.names

    def choose(self, policies):
        self.names = list(policies)

    def reports(self):
        return [
            TrialReport(
                policy=name,
                token_hit_rate=0.5,
                request_hit_rate=0.5,
                requests=1,
                tokens=2,
                sampled_share=1.0,
                cost_share=0.0,
            )
            for name in self.names
        ]


class Office(CacheKit):
    """A cache with a desk before it."""

    def __init__(self, num_blocks: int = 64, *, tiers=None, trial=None, epoch=77, **more) -> None:
        super().__init__(num_blocks, **more)
        self.need = 0
        self.desk = CacheDesk(
            self.cache,
            clock=self.clock,
            fingerprint="model",
            epoch=epoch,
            largest_need=lambda: self.need,
            tiers=tiers,
            trial=trial,
        )
        self.progress: list[AdminProgress] = []
        self.keys = 0

    def ask(self, op):
        """Send an operation and return its answer."""
        self.keys += 1
        self.desk.handle(AdminCall(self.keys, op))
        replies = []
        while True:
            for message in self.desk.drain():
                if isinstance(message, AdminReply):
                    replies.append(message)
                elif isinstance(message, AdminProgress):
                    self.progress.append(message)
            if not self.desk.is_busy:
                break
            self.desk.advance()
        (reply,) = replies
        assert reply.key == self.keys
        self.cache.check_integrity()
        return reply.result

    def refused(self, op) -> AdminRefusal:
        """Send an operation that is refused, and see that nothing has changed."""
        before = sorted(n.serial for n in self.cache.tree.iterate()), len(self.cache.pins)
        answer = self.ask(op)
        assert isinstance(answer, AdminRefusal)
        assert before == (sorted(n.serial for n in self.cache.tree.iterate()), len(self.cache.pins))
        return answer

    def events(self) -> list[tuple[int, CacheEventKind, int, int, str]]:
        """Return what the watch has said since the last call."""
        (message,) = [m for m in self.desk.drain() if isinstance(m, CacheEvents)] or [CacheEvents(77, [])]
        return [(e.sequence, e.kind, e.num_tokens, e.num_blocks, e.cause) for e in message.events]

    def id_of(self, tokens: list[int]) -> str:
        return digest_of(self.node(tokens)).hex()


def ref(*tokens: list[int], salt: str = "") -> PrefixRef:
    return PrefixRef(token_ids=[t for block in tokens for t in block], salt=salt)


# -- looking ----------------------------------------------------------------------------------------


def test_statistics_add_up_by_namespace():
    office = Office()
    office.request([*A, *B, 9])
    office.request([*A, *B, 8])
    office.request([*A, 9], namespace=OTHER)
    report = office.ask(ReadStats())
    by_name = {n.salt: n for n in report.namespaces}
    assert (report.totals.requests, report.totals.hits, report.totals.prompt_tokens) == (3, 1, 23)
    assert report.totals.computed_tokens == 15
    assert (by_name[""].totals.requests, by_name["other"].totals.requests) == (2, 1)
    assert sum(n.totals.blocks for n in report.namespaces) == report.totals.blocks == 6
    assert sum(n.totals.entries for n in report.namespaces) == report.totals.entries == 5
    assert report.num_blocks == report.num_blocks_in_use + report.num_blocks_cached + report.num_blocks_free
    assert report.policy == by_name["other"].policy == "lru"
    only = office.ask(ReadStats(namespace=by_name["other"].namespace))
    assert (only.totals.requests, [n.salt for n in only.namespaces]) == (1, ["other"])


def test_statistics_of_an_unknown_namespace_are_refused():
    assert Office().refused(ReadStats(namespace="0" * 16)).kind is AdminErrorKind.NOT_FOUND


def test_the_most_valuable_prefixes_come_first_with_all_there_is_to_know():
    office = Office()
    office.compute([*A, *B], lifetime_s=100.0)
    office.clock.advance(10.0)
    office.compute([*A, *B, *C])
    office.compute([*A, *B, *D])
    running = office.start([*A, *B, *D, 5])
    page = office.ask(ListPrefixes())
    assert sorted(e.num_tokens for e in page.entries) == [8, 12, 12, 13]
    assert page.entries[0].value > page.entries[1].value
    top = page.entries[0]
    assert (top.prefix_id, top.parent_id) == (office.id_of([*A, *B]), "")
    assert (top.own_tokens, top.own_blocks, top.hits, top.num_children) == (8, 2, 3, 2)
    assert (top.age_s, top.idle_s, top.expires_in_s) == (10.0, 0.0, 90.0)
    assert (top.in_use, top.has_last_logits, top.pin) == (True, True, None)
    leaf = next(e for e in page.entries if e.prefix_id == office.id_of([*A, *B, *C]))
    assert (leaf.parent_id, leaf.own_tokens, leaf.expires_in_s) == (top.prefix_id, 4, 90.0)
    assert (leaf.in_use, leaf.preview) == (False, C)
    office.cache.release(running)


def test_only_the_viewer_sees_tokens_of_its_namespace():
    office = Office()
    office.compute(A)
    office.compute(B, namespace=OTHER)
    shown = {e.salt: e.preview for e in office.ask(ListPrefixes(viewer_salt="other")).entries}
    assert shown == {"": [], "other": B}


def test_pages_follow_each_other_while_the_cache_changes():
    office = Office(256, num_logits_slots=0)
    for number in range(40):
        office.compute([number] * 4)
        if number % 3 == 0:
            office.compute([*[number] * 4, 99])
    whole = [e.prefix_id for e in office.ask(ListPrefixes(page_size=1000)).entries]
    seen, token = [], ""
    while True:
        page = office.ask(ListPrefixes(page_size=7, page_token=token))
        seen += [e.prefix_id for e in page.entries]
        office.compute([1000 + len(seen)] * 4)
        office.clock.advance(20.0)  # now and then a catalogue is too old
        token = page.next_page_token
        if not token:
            break
    assert [p for p in seen if p in set(whole)] == whole
    assert len(seen) == len(set(seen))


def test_a_page_token_of_elsewhere_is_refused():
    office = Office()
    office.compute(A)
    office.compute(B)
    token = office.ask(ListPrefixes(page_size=1)).next_page_token
    assert token
    for bad, op in (
        ("not a token", ListPrefixes(page_token="not a token")),
        ("é", ListPrefixes(page_token="é")),
        ("cut", ListPrefixes(page_token=token[:-3])),
        ("other conditions", ListPrefixes(page_token=token, min_hits=1)),
    ):
        refusal = office.refused(op)
        assert (refusal.kind, refusal.field) == (AdminErrorKind.INVALID, "page_token"), bad
    stranger = Office(epoch=78)
    stranger.compute(A)
    assert stranger.refused(ListPrefixes(page_token=token)).field == "page_token"


def test_lists_are_filtered():
    office = Office(num_logits_slots=0)
    office.compute(A)
    office.clock.advance(50.0)
    office.compute(B)
    office.compute([*B, 9])
    office.compute(C, namespace=OTHER)
    office.cache.control.pin(office.node(A), PinKind.SOFT)

    def listed(**conditions) -> list[int]:
        page = office.ask(ListPrefixes(viewer_salt="", **conditions))
        assert page.total == len(page.entries)
        return sorted(e.num_tokens for e in page.entries)

    assert listed() == [4, 4, 4, 5]
    assert listed(namespace=OTHER.seed().hex()[:16]) == [4]
    assert listed(min_age_s=50.0) == [4]
    assert listed(max_age_s=49.0) == [4, 4, 5]
    assert listed(min_hits=1) == [4]
    assert listed(is_pinned=True) == [4]
    assert listed(is_pinned=False) == [4, 4, 5]
    assert listed(tier="device") == [4, 4, 4, 5]
    assert listed(tier="disk") == []


def test_what_tiers_have_is_shown_and_filtered_by():
    shelf = Shelf()
    office = Office(tiers=shelf, num_logits_slots=0)
    office.compute([*A, *B])
    office.compute(C)
    shelf.has[digest_of(office.node(A))] = "disk"
    (entry,) = office.ask(ListPrefixes(tier="disk")).entries
    assert (entry.prefix_id, entry.tiers) == (office.id_of([*A, *B]), {"disk": 1})
    found = office.ask(LookUpPrefix(ref(A, B, D)))
    assert (found.cached_block_tokens, found.tiers) == (8, {"disk": 1})
    assert office.ask(ReadStats()).prefetch.waiting_fetched == 3


def test_looking_a_prompt_up_touches_nothing():
    office = Office()
    office.compute([*A, *B, 5, 6])
    before = [(n, n.last_used, n.hits, n.heat) for n in office.cache.tree.iterate()]
    found = office.ask(LookUpPrefix(ref(A, B, [5, 6])))
    assert (found.cached_block_tokens, found.cached_partial_tokens, found.is_exact) == (8, 2, True)
    beginning = office.ask(LookUpPrefix(ref(A, B, [5, 7])))  # a part of the last block agrees
    assert (beginning.cached_partial_tokens, beginning.prefix_id) == (1, office.id_of([*A, *B]))
    by_id = office.ask(LookUpPrefix(PrefixRef(prefix_id=beginning.prefix_id)))
    assert (by_id.prompt_tokens, by_id.cached_block_tokens) == (8, 4)  # no logits end here
    assert by_id.prefix_id == beginning.prefix_id
    nothing = office.ask(LookUpPrefix(ref(D, salt="new")))
    assert (nothing.cached_block_tokens, nothing.prefix_id) == (0, "")
    assert [(n, n.last_used, n.hits, n.heat) for n in office.cache.tree.iterate()] == before
    assert office.cache.tree.spaces.get(NamespaceKey("model", salt="new")) is None


def test_what_looks_a_prompt_up_names_it_as_a_pin_does():
    office = Office()
    office.compute([*A, *B, 5, 6])
    for prompt in ((A, B, [5, 6]), (A, B, [5]), (A, B), (A, B, [5, 7]), (A, D)):
        found = office.ask(LookUpPrefix(ref(*prompt)))
        pinned = office.ask(PinPrefix(ref(*prompt), PinType.SOFT))
        assert found.prefix_id == pinned.prefix_id, prompt


# -- naming -----------------------------------------------------------------------------------------


def test_a_prefix_is_named_by_enough_digits():
    office = Office()
    office.compute(A)
    name = office.id_of(A)
    assert office.ask(ReleasePrefix(PrefixRef(prefix_id=name[:8].upper()))) == Touched(name, 1)
    for wrong in (name[:7], name + "0", "xyzxyzxyz"):
        refusal = office.refused(ReleasePrefix(PrefixRef(prefix_id=wrong)))
        assert (refusal.kind, refusal.field) == (AdminErrorKind.INVALID, "prefix.prefix_id")
    unknown = "0" * 8 if not name.startswith("0" * 8) else "1" * 8
    assert office.refused(ReleasePrefix(PrefixRef(prefix_id=unknown))).kind is AdminErrorKind.NOT_FOUND
    for op in (ReleasePrefix(PrefixRef()), LookUpPrefix(PrefixRef())):
        assert office.refused(op).kind is AdminErrorKind.INVALID


def test_digits_that_several_prefixes_share_are_refused():
    office = Office()
    office.compute(A)
    office.compute(B)
    shared = office.node(A).digest = digest_of(office.node(A))
    office.node(B).digest = PrefixDigest(shared[:20] + bytes(12))  # as if two digests began alike
    refusal = office.refused(ReleasePrefix(PrefixRef(prefix_id=shared.hex()[:16])))
    assert refusal.kind is AdminErrorKind.AMBIGUOUS


def test_tokens_name_a_prefix_of_one_namespace_alone():
    office = Office()
    office.compute(A, namespace=OTHER)
    assert office.refused(PinPrefix(ref(A), PinType.HARD)).kind is AdminErrorKind.NOT_FOUND
    assert isinstance(office.ask(PinPrefix(ref(A, salt="other"), PinType.HARD)), Pinned)


# -- steering ---------------------------------------------------------------------------------------


def test_pinning_says_what_it_holds():
    office = Office()
    office.compute([*A, *B, 5])
    done = office.ask(PinPrefix(ref(A, B, [5]), PinType.SOFT, 60.0))
    assert (done.num_tokens, done.num_blocks, done.newly_pinned_blocks) == (9, 3, 3)
    partly = office.ask(PinPrefix(ref(A, C), PinType.HARD))
    assert (partly.num_tokens, partly.num_blocks, partly.newly_pinned_blocks) == (4, 1, 0)
    report = office.ask(ReadStats())
    assert (report.pins.soft_blocks, report.pins.hard_blocks, report.totals.pinned_blocks) == (3, 1, 3)
    entry = next(e for e in office.ask(ListPrefixes()).entries if e.prefix_id == done.prefix_id)
    assert (entry.pin, entry.pin_expires_in_s) == (PinType.SOFT, 60.0)
    assert office.ask(UnpinPrefix(PrefixRef(prefix_id=done.prefix_id))).num_blocks == 3
    assert office.ask(UnpinPrefix(PrefixRef(prefix_id=done.prefix_id))).num_blocks == 0


def test_hard_pins_leave_room_for_the_largest_request():
    office = Office(8)
    office.compute([*A, *B, *C])
    office.need = 6
    refusal = office.refused(PinPrefix(ref(A, B, C), PinType.HARD))
    assert refusal.kind is AdminErrorKind.OVER_BUDGET
    assert "3 more blocks" in refusal.reason
    assert "at most 2" in refusal.reason
    office.need = 5
    assert isinstance(office.ask(PinPrefix(ref(A, B, C), PinType.HARD)), Pinned)


def test_a_lifetime_reaches_the_copies_in_tiers():
    shelf = Shelf()
    office = Office(tiers=shelf)
    office.compute([*A, *B], lifetime_s=5.0)
    assert office.ask(SetLifetime(ref(A, B), 50.0)).num_blocks == 2
    assert shelf.renewed == [2]
    refusal = office.refused(SetLifetime(ref(A, B), -1.0))
    assert (refusal.kind, refusal.field) == (AdminErrorKind.INVALID, "lifetime")
    assert office.refused(SetLifetime(ref(A, C), 1.0)).kind is AdminErrorKind.NOT_FOUND


def test_evicting_what_is_in_use_is_refused_or_spares_it():
    office = Office()
    office.compute([*A, *B])
    office.compute([*A, *C])
    running = office.start([*A, *C, 5])
    assert office.refused(EvictPrefixes(subtree=ref(A))).kind is AdminErrorKind.IN_USE
    assert office.refused(ClearCache()).kind is AdminErrorKind.IN_USE
    assert office.ask(EvictPrefixes(subtree=ref(A), skip_in_use=True)) == Evicted(1, 3, 0)
    office.cache.release(running)
    assert office.ask(ClearCache()) == Evicted(3, 0, 0)
    assert not office.cache.tree.roots


def test_evicting_by_namespace_and_by_age():
    office = Office()
    office.compute(A)
    office.clock.advance(100.0)
    office.compute(B)
    office.compute(C, namespace=OTHER)
    assert office.ask(EvictPrefixes(min_idle_s=100.0)) == Evicted(1, 0, 0)
    assert office.ask(EvictPrefixes(namespace=OTHER.seed().hex()[:16])) == Evicted(1, 0, 0)
    assert office.cached(B)[2]
    assert office.refused(EvictPrefixes()).kind is AdminErrorKind.INVALID
    assert office.refused(EvictPrefixes(namespace="f" * 16)).kind is AdminErrorKind.NOT_FOUND


def test_an_evicted_prefix_takes_along_what_leads_nowhere_else():
    office = Office()
    office.compute([*A, *B, *C])
    assert office.ask(EvictPrefixes(subtree=ref(A, B, C))) == Evicted(3, 0, 0)
    office.compute([*A, *B])
    office.compute([*A, *C])
    assert office.ask(EvictPrefixes(subtree=ref(A, B))) == Evicted(1, 0, 0), (
        "the other branch needs the first"
    )


def test_eviction_reaches_tiers_unless_told_otherwise():
    shelf = Shelf()
    office = Office(tiers=shelf)
    office.compute([*A, *B])
    office.compute([*A, *C])
    shelf.has = {digest_of(office.node(A)): "disk", digest_of(office.node([*A, *B])): "disk"}
    assert office.ask(EvictPrefixes(subtree=ref(A, B), tiers=False)) == Evicted(1, 0, 0)
    assert len(shelf.has) == 2
    assert office.ask(EvictPrefixes(subtree=ref(A, B))) == Evicted(0, 0, 1)  # it was on the disk alone
    assert office.refused(EvictPrefixes(subtree=ref(A, B))).kind is AdminErrorKind.NOT_FOUND
    assert office.ask(ClearCache()) == Evicted(2, 0, 1)


# -- policies ---------------------------------------------------------------------------------------


def test_policies_are_described_and_changed_all_or_nothing():
    shadow = Shadow()
    office = Office(trial=shadow)
    assert office.ask(DescribePolicy()).policy == "lru"
    for op, wrong in (
        (SetPolicy(policy="nonsense"), "policy"),
        (SetPolicy(policy="lru", trial=["nonsense"]), "trial"),
        (SetPolicy(trial=["lru"], canary=("nonsense", 0.1)), "canary.policy"),
        (SetPolicy(trial=["lru"], canary=("lru", 0.6)), "canary.share"),
        (SetPolicy(canary=("lru", float("nan"))), "canary.share"),
    ):
        refusal = office.refused(op)
        assert (refusal.kind, refusal.field) == (AdminErrorKind.INVALID, wrong)
    assert shadow.names == []
    report = office.ask(SetPolicy(trial=["lru"], canary=("lru", 0.25)))
    assert ([t.policy for t in report.trial], report.canary.share) == (["lru"], 0.25)
    report = office.ask(SetPolicy(trial=[], canary=("", 0.0)))
    assert (report.trial, report.canary) == ([], None)


def test_without_a_trial_none_can_be_started():
    refusal = Office().refused(SetPolicy(trial=["lru"]))
    assert (refusal.kind, refusal.field) == (AdminErrorKind.UNSUPPORTED, "trial")


# -- long operations --------------------------------------------------------------------------------


def test_a_long_list_lets_the_engine_go_on_in_between():
    office = Office(20_000, num_logits_slots=0)
    for number in range(3000):
        lease = office.start([number, *[7] * 11])
        office.cache.release(lease)
    office.desk.handle(AdminCall(1, ListPrefixes(page_size=1000)))
    office.desk.handle(AdminCall(2, ListPrefixes(page_size=1)))
    pieces, replies = 0, []
    while office.desk.is_busy:
        office.desk.advance()
        office.cache.evict(1)  # requests go on
        pieces += 1
        replies += office.desk.drain()
    assert pieces > 5
    assert sorted(reply.key for reply in replies) == [1, 2]
    assert all(not isinstance(reply.result, AdminRefusal) for reply in replies)


def test_what_is_taken_up_while_an_eviction_is_prepared_makes_it_fail():
    office = Office(10_000, num_logits_slots=0)
    for number in range(3000):
        office.cache.release(office.start([number] * 4))
    before = office.cache.tree.num_nodes
    office.desk.handle(AdminCall(1, ClearCache()))
    running = office.start([1] * 4)
    replies = []
    while office.desk.is_busy:
        office.desk.advance()
        replies += office.desk.drain()
    (reply,) = replies
    assert reply.result.kind is AdminErrorKind.IN_USE
    assert office.cache.tree.num_nodes == before
    office.cache.release(running)
    assert office.ask(ClearCache()).kept_blocks == 0


def test_a_cancelled_operation_says_nothing_more():
    office = Office(tiers=Shelf())
    office.desk.handle(AdminCall(5, SaveSnapshot("one")))
    assert office.desk.is_busy
    office.desk.cancel(5)
    office.desk.cancel(6)
    assert all(isinstance(m, AdminProgress) for m in office.desk.drain())
    assert not office.desk.is_busy


def test_snapshots_tell_how_far_they_are():
    office = Office(tiers=Shelf())
    assert office.ask(SaveSnapshot("one")) == SnapshotDone(3, 300, 0)
    assert [p.done_objects for p in office.progress] == [0, 1, 2]
    assert office.ask(RestoreSnapshot("one")) == SnapshotDone(1, 100, 0)


def test_without_tiers_there_are_no_snapshots():
    assert Office().refused(SaveSnapshot("one")).kind is AdminErrorKind.UNSUPPORTED
    assert Office().refused(RestoreSnapshot("one")).kind is AdminErrorKind.UNSUPPORTED


# -- watching ---------------------------------------------------------------------------------------


def test_blocks_that_come_and_go_together_are_one_event():
    office = Office()
    office.compute(D)
    office.desk.watch(is_on=True)
    office.compute([*A, *B, 9])
    assert office.events() == [(1, CacheEventKind.STORED, 8, 2, "")]
    office.cache.control.release(office.node([*A, *B]))
    office.cache.evict(4)
    assert office.events() == [
        (2, CacheEventKind.EVICTED, 4, 1, "capacity"),
        (3, CacheEventKind.EVICTED, 8, 2, "released"),
    ]
    office.desk.watch(is_on=False)
    office.compute(A)
    assert office.events() == []


def test_blocks_of_two_prefixes_are_two_events():
    office = Office()
    office.compute(A)
    office.compute([*B, *C])
    office.desk.watch(is_on=True)
    office.cache.evict(3)
    assert office.events() == [
        (1, CacheEventKind.EVICTED, 4, 1, "capacity"),
        (2, CacheEventKind.EVICTED, 8, 2, "capacity"),
    ]


def test_pins_and_their_ends_are_events():
    office = Office()
    office.compute([*A, *B], lifetime_s=10.0)
    office.desk.watch(is_on=True)
    office.desk.handle(AdminCall(1, PinPrefix(ref(A, B), PinType.HARD)))
    assert office.events() == [(1, CacheEventKind.PINNED, 8, 2, "hard")]
    office.clock.advance(10.0)
    office.cache.sweep_expired()
    assert office.events() == [
        (2, CacheEventKind.UNPINNED, 8, 2, "hard"),
        (3, CacheEventKind.EXPIRED, 8, 2, ""),
    ]


def test_too_many_events_in_one_turn_leave_a_gap(monkeypatch):
    monkeypatch.setattr(watch, "MAX_NOTES_PER_TURN", 3)
    office = Office()
    office.desk.watch(is_on=True)
    for number in range(5):
        office.compute([number] * 4)
    assert [e[0] for e in office.events()] == [1, 2, 3]
    office.compute([9] * 4)
    assert [e[0] for e in office.events()] == [6]


@pytest.mark.parametrize("is_on", [True, False])
def test_an_operation_answers_whether_or_not_anybody_watches(is_on):
    office = Office()
    office.desk.watch(is_on=is_on)
    office.compute(A)
    assert office.ask(ClearCache()) == Evicted(1, 0, 0)
