"""The cache of encodings against a slow plain model: a list of what was computed, searched from the end.

The model knows nothing of tables, recency or batches. It remembers every encoding that was kept, when, and
for which key, and which keys were used when; by that it says of every row whether it is a hit, with whose
encoding, and how all counters stand.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcore.clock import ManualClock
from server.predict.messages import Inputs
from server.predict.options import BudgetSpec, FeatureSpec
from server.predict.reuse.build import make_feature_model
from server.predict.reuse.predictor import LipschitzCertificate, Predictor

values = st.sampled_from([0.0, 0.25, 0.5, 1.0])
rows = st.lists(st.tuples(values, values, values), min_size=1, max_size=6)
tenants = st.sampled_from(["", "a"])


class Sum:
    """An encoder that is easily undone, and counts."""

    num_rows = 0

    def encode(self, found):
        self.num_rows += len(found)
        return np.stack([found.sum(axis=1), found[:, 2]], axis=1).astype(np.float32)


class Third:
    """A head of what the encoder saw of the last feature, and of what is there now."""

    def predict(self, encodings, found):
        return (0.5 * encodings[:, 1] + 0.25 * found[:, 2]).astype(np.float32)


@dataclass
class Kept:
    """One encoding that was computed and kept."""

    key: tuple[str, tuple[float, ...]]
    row: tuple[float, ...]
    at: float
    used: int


class ReuseAgainstModel(RuleBasedStateMachine):
    """Batches of rows from two tenants, time passing, clearing; with and without a certificate."""

    @initialize(
        prefix=st.integers(1, 3),
        max_entries=st.integers(1, 6),
        lifetime=st.sampled_from([2.0, None]),
        max_error=st.sampled_from([None, 0.2]),
        bin_width=st.sampled_from([0.0, 0.5]),
    )
    def start(self, prefix, max_entries, lifetime, max_error, bin_width):
        self.clock, self.encoder = ManualClock(), Sum()
        # |prediction| changes by half the change of the third feature.
        certificate = LipschitzCertificate(0.5, 1e-6)
        self.model = make_feature_model(
            "m",
            "1",
            FeatureSpec(
                prefix=prefix,
                max_entries=max_entries,
                lifetime_s=lifetime,
                max_error=max_error,
                bin_width=bin_width,
                sample_share=0.0,
                budget=BudgetSpec(max_changed=None),
            ),
            Predictor(3, 2, self.encoder, Third(), certificate),
            clock=self.clock,
            on_event=lambda event: None,
        )
        self.prefix, self.room, self.lifetime = prefix, max_entries, lifetime
        self.max_error, self.bin_width = max_error, bin_width
        self.kept: list[Kept] = []
        self.tick = 0
        self.counted: dict[str, int] = {}
        """When the number that a tenant holds last changed."""
        self.counts = Counter()

    # -- the model ----------------------------------------------------------------------------------

    def key_of(self, row, tenant):
        part = row[: self.prefix]
        if self.bin_width:
            part = tuple(round(value / self.bin_width) for value in part)  # half to even, as the cache
        return (tenant, part)

    def find(self, key):
        self.tick += 1
        for each in reversed(self.kept):
            if each.key == key:
                each.used = self.tick
                return each
        return None

    def outcome(self, found, row):
        if found is None:
            return "absent"
        if self.lifetime is not None and self.clock.now() - found.at >= self.lifetime:
            return "expired"
        if self.max_error is not None:
            distance = np.sqrt(sum((a - b) ** 2 for a, b in zip(row, found.row, strict=True)))
            if 0.5 * distance + 1e-6 > self.max_error:
                return "uncertified"
        return "hit"

    def keep(self, key, row):
        self.tick += 1
        if all(each.key != key for each in self.kept):
            self.counted[key[0]] = self.tick
        self.kept = [each for each in self.kept if each.key != key]
        self.kept.append(Kept(key, row, self.clock.now(), self.tick))
        if len(self.kept) > self.room:
            held = Counter(each.key[0] for each in self.kept)
            # Who holds the most gives up one; of two that do, the one that has held so many for longer.
            tenant = min(held, key=lambda tenant: (-held[tenant], self.counted[tenant]))
            own = [each for each in self.kept if each.key[0] == tenant]
            self.kept.remove(min(own, key=lambda each: each.used))
            self.tick += 1
            self.counted[tenant] = self.tick
            self.counts["evicted"] += 1

    def expected(self, batch, tenant):
        """Say what a batch is answered: rows whose key an earlier one computes come after all others."""
        answers = {}
        places = list(range(len(batch)))
        waits = True
        while places:
            computing, later, fresh = set(), [], []
            for place in places:
                row = batch[place]
                key = self.key_of(row, tenant)
                if waits and key in computing:
                    later.append(place)
                    continue
                found = self.find(key)
                what = self.outcome(found, row)
                if what in ("absent", "expired"):
                    computing.add(key)
                self.counts[what] += 1
                if what == "hit":
                    answers[place] = (True, found.row[2])
                else:
                    answers[place] = (False, row[2])
                    fresh.append((key, row))
            for key, row in fresh:
                self.keep(key, row)
            places, waits = later, False
        return [answers[place] for place in range(len(batch))]

    # -- what happens -------------------------------------------------------------------------------

    @rule(batch=rows, tenant=tenants)
    def ask(self, batch, tenant):
        found = np.array(batch, np.float32)
        inputs = Inputs(rows=found.tobytes(), num_rows=len(batch))
        outputs = self.model.run(self.model.prepare(inputs, truncate=False, reuse=True, tenant=tenant))
        for output, row, (hit, third) in zip(outputs, batch, self.expected(batch, tenant), strict=True):
            assert output.cache_hit == hit
            assert np.frombuffer(output.values, "<f4")[0] == 0.5 * third + 0.25 * row[2]

    @rule(batch=rows)
    def ask_without_reuse(self, batch):
        found = np.array(batch, np.float32)
        inputs = Inputs(rows=found.tobytes(), num_rows=len(batch))
        outputs = self.model.run(self.model.prepare(inputs, truncate=False, reuse=False, tenant=""))
        assert [np.frombuffer(each.values, "<f4")[0] for each in outputs] == [0.75 * row[2] for row in batch]

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def wait(self, seconds):
        self.clock.advance(seconds)

    @rule()
    def clear(self):
        assert self.model.clear_reuse() == len(self.kept)
        self.kept = []

    @invariant()
    def counters_agree(self):
        if not hasattr(self, "model"):
            return
        self.model.check_integrity()
        (report,) = self.model.reuse_report(max_keys=0).policies
        assert report.num_hits == self.counts["hit"]
        assert report.num_absent == self.counts["absent"]
        assert report.num_expired == self.counts["expired"]
        assert report.num_uncertified == self.counts["uncertified"]
        assert report.num_stopped == 0
        assert report.num_evicted == self.counts["evicted"]
        assert report.num_entries == len(self.kept)
        assert report.num_lookups == sum(self.counts.values()) - self.counts["evicted"]


TestReuseAgainstModel = ReuseAgainstModel.TestCase
TestReuseAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
