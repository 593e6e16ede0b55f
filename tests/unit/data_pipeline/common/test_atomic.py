"""Atomic writes of files."""

import os
from pathlib import Path

import pytest

from data_pipeline.common.atomic import claim_name, partial_name, replacing, whole_name


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_half(path: Path, error: type[BaseException]) -> None:
    with replacing(path) as file:
        file.write(b"half of the n")
        raise error


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert (path.read_text(), names_in(tmp_path)) == ("new", ["a.json"])


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_an_error_while_writing_leaves_only_the_old_file(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert (path.read_text(), names_in(tmp_path)) == ("old", ["a.json"])


def test_an_error_while_writing_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        write_half(tmp_path / "a.json", ValueError)
    assert names_in(tmp_path) == []


def test_writing_into_a_missing_folder_raises_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "nowhere" / "a.json"):
        pass


def test_a_name_that_is_taken_is_not_claimed(tmp_path: Path) -> None:
    partial, path = tmp_path / "partial", tmp_path / "a.json"
    partial.write_text("new")
    path.write_text("theirs")
    with pytest.raises(FileExistsError):
        claim_name(partial, path)
    assert (path.read_text(), partial.read_text()) == ("theirs", "new")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_free_name_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def refuse(*_: Path) -> None:
        raise PermissionError

    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "partial").write_text("new")
    claim_name(tmp_path / "partial", tmp_path / "a.json")
    assert names_in(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "new"


def test_the_name_of_a_partial_file_contains_the_final_name() -> None:
    assert whole_name(partial_name("a.json")) == "a.json"
    assert whole_name(partial_name(".a\nb")) == ".a\nb"
    assert whole_name("a.json") is None
