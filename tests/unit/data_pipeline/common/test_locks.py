"""Exclusive and shared file locks."""

from pathlib import Path

import pytest

from data_pipeline.common.locks import locked, take_lock


def test_a_lock_is_held_until_its_file_is_closed(tmp_path: Path) -> None:
    file = take_lock(tmp_path / "lock", wait=False)
    assert file is not None
    assert take_lock(tmp_path / "lock", wait=False) is None
    file.close()
    with locked(tmp_path / "lock", wait=False) as is_held:
        assert is_held
        with locked(tmp_path / "lock", shared=True, wait=False) as is_shared:
            assert not is_shared


def test_a_lock_can_be_shared(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    with locked(path, shared=True) as first, locked(path, shared=True, wait=False) as second:
        assert first
        assert second
        assert take_lock(path, wait=False) is None


def test_the_contents_of_a_lock_file_are_kept(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("words")
    with locked(tmp_path / "lock"):
        pass
    assert (tmp_path / "lock").read_text() == "words"


def test_no_lock_is_created_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        take_lock(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()
