"""What is remembered of operators' changes for the next predict process."""

from __future__ import annotations

from server.predict import changes as changes_module
from server.predict.changes import Changes
from server.predict.messages import (
    DescribeModel,
    LoadModel,
    ModelList,
    ModelPhase,
    ModelStatus,
    OneModel,
    SetAlias,
    UnloadModel,
)


def status(name: str, version: str) -> ModelStatus:
    return ModelStatus(name=name, version=version, phase=ModelPhase.READY, source_kind="folder")


def loaded(changes: Changes, op: LoadModel, version: str) -> None:
    changes.note(op, OneModel(status(op.model, version)))


NOTHING = ModelList(())


def test_a_load_with_a_source_is_entered_again_under_the_version_that_it_got():
    changes = Changes()
    loaded(changes, LoadModel("m", source="m/new", task="embed"), "3")
    assert changes.to_repeat() == [LoadModel("m", "3", "m/new", "embed", lazy=True)]


def test_loads_of_what_is_in_the_catalogue_and_questions_are_not_remembered():
    changes = Changes()
    loaded(changes, LoadModel("m", "1"), "1")
    changes.note(DescribeModel("m"), OneModel(status("m", "1")))
    assert changes.to_repeat() == []


def test_the_last_word_on_an_alias_counts_also_that_it_is_gone():
    changes = Changes()
    changes.note(SetAlias("m", "best", "1"), NOTHING)
    changes.note(SetAlias("n", "best", "1"), NOTHING)
    changes.note(SetAlias("m", "best", "2"), NOTHING)
    changes.note(SetAlias("n", "best", ""), NOTHING)
    assert [(op.model, op.version) for op in changes.to_repeat() if isinstance(op, SetAlias)] == [
        ("m", "2"),
        ("n", ""),
    ]


def test_an_alias_that_is_moved_takes_its_share_along():
    changes = Changes()
    changes.note(SetAlias("m", "canary", "1", 0.25), NOTHING)
    changes.note(SetAlias("m", "canary", "2"), NOTHING)
    assert changes.to_repeat() == [SetAlias("m", "canary", "2", 0.25)]
    changes.note(SetAlias("m", "canary", ""), NOTHING)
    changes.note(SetAlias("m", "canary", "2"), NOTHING)
    assert changes.to_repeat() == [SetAlias("m", "canary", "2", 0.0)]


def test_latest_never_gets_a_share():
    changes = Changes()
    changes.note(SetAlias("m", "latest", ""), NOTHING)
    changes.note(SetAlias("m", "latest", "2"), NOTHING)
    assert changes.to_repeat() == [SetAlias("m", "latest", "2")]


def test_an_unloaded_version_stays_so_until_it_is_loaded():
    changes = Changes()
    changes.note(UnloadModel("m", drain_s=5.0), ModelList((status("m", "1"), status("m", "2"))))
    assert changes.to_repeat() == [UnloadModel("m", "1"), UnloadModel("m", "2")]
    loaded(changes, LoadModel("m", "canary"), "2")
    assert changes.to_repeat() == [UnloadModel("m", "1")]


def test_a_change_that_was_made_again_is_not_forgotten_with_the_old_one():
    changes = Changes()
    changes.note(SetAlias("m", "best", "1"), NOTHING)
    [old] = changes.to_repeat()
    changes.note(SetAlias("m", "best", "2"), NOTHING)
    changes.forget(old)
    [new] = changes.to_repeat()
    changes.forget(new)
    assert len(changes) == 0


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(changes_module, "MAX_CHANGES", 10)
    changes = Changes()
    for number in range(25):
        changes.note(SetAlias("m", f"alias-{number}", "1"), NOTHING)
    assert [op.alias for op in changes.to_repeat() if isinstance(op, SetAlias)] == [
        f"alias-{number}" for number in range(15, 25)
    ]


def test_a_change_that_is_made_again_is_the_latest_of_all(monkeypatch):
    """Repeated in the order of their last making; and when there are too many, it is not the one to go."""
    monkeypatch.setattr(changes_module, "MAX_CHANGES", 2)
    changes = Changes()
    for alias, version in (("a", "1"), ("b", "1"), ("a", "2"), ("c", "1")):
        changes.note(SetAlias("m", alias, version), NOTHING)
    assert [(op.alias, op.version) for op in changes.to_repeat() if isinstance(op, SetAlias)] == [
        ("a", "2"),
        ("c", "1"),
    ]
