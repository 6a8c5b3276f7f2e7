"""Names of sources, read letter by letter: what is asked for is what is fetched."""

from __future__ import annotations

import pytest

from server.predict.errors import ModelRefusedError
from server.predict.sources.manifest import parse_sums
from server.predict.sources.names import (
    MAX_PARTS,
    MAX_PATH_CHARS,
    FolderName,
    HubName,
    MlflowName,
    check_relative_path,
    parse_source,
)

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("models:/churn/3", MlflowName("churn", "3", None)),
        ("models:/a b.c-d/12", MlflowName("a b.c-d", "12", None)),
        ("models:/churn@best", MlflowName("churn", None, "best")),
        (f"hf:owner/name@{COMMIT}", HubName("owner/name", COMMIT)),
        ("a/b", FolderName("a/b", is_absolute=False)),
        ("/srv/models/a", FolderName("/srv/models/a", is_absolute=True)),
        ("/srv/models/a/", FolderName("/srv/models/a/", is_absolute=True)),
    ],
)
def test_a_name_is_taken_apart_exactly(source: str, found: object) -> None:
    assert parse_source(source) == found


@pytest.mark.parametrize(
    "source", ["models:churn/3", "models:xchurn/3", "models:churn@best", "models:", "hf:", ""]
)
def test_what_lacks_its_first_slash_is_no_other_name(source: str) -> None:
    with pytest.raises(ModelRefusedError):
        parse_source(source)


def test_a_path_is_so_deep_and_so_long_and_no_more() -> None:
    check_relative_path("/".join(["x"] * MAX_PARTS), what="it")
    check_relative_path("/".join(["x" * 255] * 4)[:MAX_PATH_CHARS], what="it")
    assert (MAX_PARTS, MAX_PATH_CHARS) == (16, 1024)
    for bad in (["x"] * 17, ["x" * 255] * 5, ["x" * 256], ["\N{SNOWMAN}" * 86]):
        with pytest.raises(ModelRefusedError, match="it is too long"):
            check_relative_path("/".join(bad), what="it")


@pytest.mark.parametrize("name", ["../x", "a\x1b[31mb", "a//b", "/etc/passwd"])
def test_a_list_of_digests_that_names_what_is_no_file_of_the_model_is_not_repeated(name: str) -> None:
    with pytest.raises(ModelRefusedError, match="a file name in SHA256SUMS") as refused:
        parse_sums(f"{'0' * 64}  {name}\n".encode())
    assert name not in refused.value.reason


def test_a_list_of_no_digests_is_none() -> None:
    for empty in (b"", b"\n\n"):
        with pytest.raises(ModelRefusedError, match="names no file"):
            parse_sums(empty)
