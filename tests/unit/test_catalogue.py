"""Which models there are, and which version a call goes to."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcore.clock import ManualClock
from server.predict.catalogue import Catalogue, version_order
from server.predict.errors import InputError, ModelExistsError, ModelRefusedError, UnknownModelError
from server.predict.messages import LoadModel, ModelPhase, ModelStatus, SetAlias
from server.predict.options import FeatureSpec, ModelSpec, PredictOptions


def catalogue(*specs: ModelSpec, root: Path | None = None, clock: ManualClock | None = None) -> Catalogue:
    options = PredictOptions(models=specs, model_root=None if root is None else str(root))
    return Catalogue(options, clock=clock or ManualClock())


def spec(name: str, version: str = "1", canary: float | None = None) -> ModelSpec:
    return ModelSpec(name=name, version=version, source=f"{name}/{version}", canary=canary)


def folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")


def test_versions_are_ordered_as_people_count() -> None:
    versions = ["10", "2", "1.10", "1.9", "1.0", "1.0-rc", "beta", "3"]
    assert sorted(versions, key=version_order) == ["beta", "1.0-rc", "1.0", "1.9", "1.10", "2", "3", "10"]


def test_call_without_a_version_goes_to_the_highest() -> None:
    models = catalogue(spec("a", "2"), spec("a", "10"), spec("b"))
    assert models.route("a").key.version == "10"
    assert models.route("a", "2").key.version == "2"
    assert models.route("a", "latest").key.version == "10"
    with pytest.raises(UnknownModelError, match="no such model"):
        models.route("c")
    with pytest.raises(UnknownModelError, match="no such version"):
        models.route("a", "3")


def test_canary_gets_its_share_and_is_not_the_latest() -> None:
    models = catalogue(spec("a", "1"), spec("a", "2", canary=0.25))
    rolls = [index / 1000 for index in range(1000)]
    versions = [models.route("a", roll=roll).key.version for roll in rolls]
    assert versions.count("2") == 250
    assert models.route("a").key.version == "1"
    assert models.route("a", "canary").key.version == "2"
    shares = {e.key.version: models.named(status(e.key.version)) for e in models.entries("a")}
    assert (shares["1"].aliases, shares["1"].traffic_share) == (("latest",), 0.75)
    assert (shares["2"].aliases, shares["2"].traffic_share) == (("canary",), 0.25)


def test_promoted_canary_becomes_the_latest() -> None:
    models = catalogue(spec("a", "1"), spec("a", "2", canary=0.25))
    models.set_alias(SetAlias("a", "canary"))
    assert models.route("a", roll=0.0).key.version == "2"
    models.set_alias(SetAlias("a", "latest", "1"))  # rolled back
    assert models.route("a", roll=0.0).key.version == "1"
    models.set_alias(SetAlias("a", "latest"))
    assert models.route("a", roll=0.0).key.version == "2"


def test_two_aliases_with_shares_and_their_sum() -> None:
    models = catalogue(spec("a", "1"), spec("a", "2"), spec("a", "3"))
    models.set_alias(SetAlias("a", "canary", "2", 0.3))
    models.set_alias(SetAlias("a", "shadow", "3", 0.7))
    assert [models.route("a", roll=roll).key.version for roll in (0.0, 0.29, 0.31, 0.99)] == list("2233")
    with pytest.raises(InputError, match="leave") as refused:
        models.set_alias(SetAlias("a", "third", "1", 0.1))
    assert refused.value.part == "traffic_share"
    models.set_alias(SetAlias("a", "canary", "1"))  # moved, with its share
    assert models.route("a", roll=0.29).key.version == "1"


@pytest.mark.parametrize(
    ("op", "part"),
    [
        (SetAlias("a", "../x", "1"), "alias"),
        (SetAlias("a", "1", "1"), "alias"),
        (SetAlias("a", "latest", "1", 0.5), "traffic_share"),
        (SetAlias("a", "canary", "1", 1.5), "traffic_share"),
        (SetAlias("a", "canary", "1", float("nan")), "traffic_share"),
    ],
)
def test_bad_alias_is_refused_by_its_field(op: SetAlias, part: str) -> None:
    with pytest.raises(InputError) as refused:
        catalogue(spec("a")).set_alias(op)
    assert refused.value.part == part


def test_second_canary_of_a_model_is_refused() -> None:
    """The first one used to lose its share without a word."""
    with pytest.raises(ModelRefusedError, match="two versions"):
        catalogue(spec("a"), spec("a", "2", canary=0.1), spec("a", "3", canary=0.2))


def test_alias_of_an_unknown_version_changes_nothing() -> None:
    models = catalogue(spec("a"))
    with pytest.raises(UnknownModelError):
        models.set_alias(SetAlias("a", "canary", "9", 1.0))
    assert models.route("a", roll=0.0).key.version == "1"


def test_folders_below_the_root_are_found_also_later(tmp_path: Path) -> None:
    folder(tmp_path / "single")
    folder(tmp_path / "several" / "1")
    folder(tmp_path / "several" / "12")
    (tmp_path / "nothing").mkdir()
    clock = ManualClock()
    models = catalogue(spec("configured"), root=tmp_path, clock=clock)
    assert [(e.key.name, e.key.version, e.spec.source) for e in models.entries()] == [
        ("configured", "1", "configured/1"),
        ("several", "1", "several/1"),
        ("several", "12", "several/12"),
        ("single", "1", "single"),
    ]
    folder(tmp_path / "late")
    with pytest.raises(UnknownModelError):
        models.route("late")  # looked just now
    clock.advance(1.0)
    assert models.route("late").source_kind == "folder"
    folder(tmp_path / "several" / "13")
    clock.advance(1.0)
    assert models.route("several", "12").spec.source == "several/12"  # known: nothing is read
    assert models.route("several").key.version == "12"
    assert models.route("several", "13").spec.source == "several/13"


def test_configured_model_hides_the_folder_of_its_name(tmp_path: Path) -> None:
    folder(tmp_path / "a")
    models = catalogue(ModelSpec(name="a", source="elsewhere"), root=tmp_path)
    assert models.route("a").spec.source == "elsewhere"


def test_hidden_and_odd_folders_are_not_models(tmp_path: Path) -> None:
    for name in (".git", "a b", "-x", "x" * 129):
        folder(tmp_path / name)
    assert catalogue(root=tmp_path).entries() == []


def test_root_must_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelRefusedError, match="not a folder"):
        catalogue(root=tmp_path / "none")


def test_version_is_added_while_serving() -> None:
    models = catalogue(spec("a", "1"))
    added = models.add(LoadModel("a", source="other", task="embed", pooling="cls"))
    assert (added.key.version, added.spec.task, added.spec.pooling) == ("2", "embed", "cls")
    assert models.route("a").key.version == "1"
    assert models.route("a", "2") == added
    models.confirm(added)
    assert models.route("a").key.version == "2"
    assert models.add(LoadModel("new", source="new")).key.version == "1"


@pytest.mark.parametrize(
    ("other", "part", "reason"),
    [
        ({"source": "third"}, "source", "version 2 stands in the catalogue with another source"),
        ({"task": "classify"}, "task", "version 2 stands in the catalogue with embed"),
        ({"task": ""}, "task", "version 2 stands in the catalogue with embed"),
        ({"pooling": "mean"}, "pooling", "version 2 stands in the catalogue with cls"),
    ],
)
def test_version_that_stands_there_as_something_else_is_not_taken_for_what_is_asked(
    other: dict[str, str], part: str, reason: str
) -> None:
    """Another task or pooling used to be passed over in silence."""
    models = catalogue(spec("a", "1"))
    asked = {"source": "other", "task": "embed", "pooling": "cls"}
    added = models.add(LoadModel("a", "2", **asked))
    assert models.add(LoadModel("a", "2", **asked)) == added  # the same again
    with pytest.raises(ModelExistsError) as refused:
        models.add(LoadModel("a", "2", **(asked | other)))
    assert (refused.value.part, refused.value.reason) == (part, reason)
    assert models.route("a", "2") == added


def test_version_of_which_nobody_has_said_what_it_does_is_not_another_one_either(tmp_path: Path) -> None:
    folder(tmp_path / "a")
    models = catalogue(root=tmp_path)
    assert models.add(LoadModel("a", "1", source="a")) == models.route("a")
    with pytest.raises(ModelExistsError, match="the one of the model's configuration") as refused:
        models.add(LoadModel("a", "1", source="a", task="embed"))
    assert refused.value.part == "task"


def test_addition_that_is_repeated_counts_more_than_the_folder_that_was_found(tmp_path: Path) -> None:
    """After a restart the folder is found first: the version would be served with another task."""
    folder(tmp_path / "a" / "1")
    models = catalogue(root=tmp_path)
    folder(tmp_path / "a" / "2")
    added = models.add(LoadModel("a", "2", source="a/2", task="embed"))
    again = catalogue(root=tmp_path)
    assert again.route("a", "2").spec.task is None
    repeated = LoadModel("a", "2", source="a/2", task="embed", lazy=True)
    assert [again.add(repeated), again.add(repeated), again.route("a", "2")] == [added] * 3


def test_version_that_could_not_be_loaded_is_gone_again() -> None:
    models = catalogue(spec("a", "1"))
    models.withdraw(models.add(LoadModel("a", source="bad")))
    assert [entry.key.version for entry in models.entries("a")] == ["1"]
    good = models.add(LoadModel("a", "2", source="good"))
    models.confirm(good)
    models.withdraw(good)  # it failed later: it was loaded once, and stays
    models.withdraw(models.route("a", "1"))
    assert [entry.spec.source for entry in models.entries("a")][1:] == ["good"]
    models.withdraw(models.add(LoadModel("new", source="bad")))
    with pytest.raises(UnknownModelError):
        models.route("new")


def test_version_that_a_second_load_brought_after_all_is_back() -> None:
    """Of two loads the first failed, and the second had begun before the version was withdrawn."""
    models = catalogue(spec("a", "1"))
    added = models.add(LoadModel("a", source="flaky"))
    models.withdraw(added)
    models.confirm(added)
    assert models.route("a", "2") == added
    models.withdraw(added)
    assert models.route("a").key.version == "2"


def test_version_that_an_alias_names_stays_though_it_could_not_be_loaded() -> None:
    models = catalogue(spec("a", "1"))
    added = models.add(LoadModel("a", source="bad"))
    models.set_alias(SetAlias("a", "next", "2"))
    models.withdraw(added)
    assert models.route("a", "next") == added


def test_only_version_is_the_latest_while_it_is_loaded() -> None:
    models = catalogue()
    added = models.add(LoadModel("new", source="new"))
    assert models.route("new") == added


@pytest.mark.parametrize(
    ("op", "part"),
    [
        (LoadModel("../a", source="x"), "model"),
        (LoadModel("a", "v/1", source="x"), "version"),
        (LoadModel("a", "latest", source="x"), "version"),
        (LoadModel("a", source="x", task="dance"), "task"),
        (LoadModel("a", source="x", pooling="max"), "pooling"),
    ],
)
def test_bad_addition_is_refused_by_its_field(op: LoadModel, part: str) -> None:
    with pytest.raises(InputError) as refused:
        catalogue(spec("a")).add(op)
    assert refused.value.part == part


@pytest.mark.parametrize("source", ["/etc", "../up", "a/../../b", "hf:owner/name@main"])
def test_source_from_a_client_must_stay_below_the_root(source: str) -> None:
    with pytest.raises(InputError) as refused:
        catalogue(spec("a")).add(LoadModel("b", source=source))
    assert refused.value.part == "source"


def test_same_version_twice_is_refused() -> None:
    with pytest.raises(ModelRefusedError, match="twice"):
        catalogue(spec("a"), spec("a"))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "../a", "source": "x"}, "names and versions"),
        ({"name": "a", "version": "1/2", "source": "x"}, "names and versions"),
        ({"name": "a"}, "either source or features"),
        ({"name": "a", "source": "x", "features": FeatureSpec()}, "either source or features"),
        ({"name": "a", "source": "x", "task": "dance"}, "task must be"),
        ({"name": "a", "source": "x", "canary": 1.5}, "canary"),
        ({"name": "a", "features": FeatureSpec(), "task": "embed"}, "not for features"),
    ],
)
def test_bad_specification_says_what_is_wrong(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelSpec(**fields)  # type: ignore[arg-type]


def status(version: str) -> ModelStatus:
    return ModelStatus(name="a", version=version, phase=ModelPhase.UNLOADED, source_kind="folder")
