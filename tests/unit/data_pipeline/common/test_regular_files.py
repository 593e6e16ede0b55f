"""Files that are pipes, devices, links or too large."""

import os
from pathlib import Path

import pytest

from data_pipeline.common.locks import locked
from data_pipeline.common.regular_files import open_in_place, read_file, require_no_link
from data_pipeline.errors import OutputExistsError


def test_a_file_is_read_up_to_its_size_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        read_file(path, 4)


def test_pipes_devices_and_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(OSError, match="not a regular file"):
            read_file(tmp_path / name, 100)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path, 100)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "absent", 100)


def test_nothing_is_created_or_written_through_a_link(tmp_path: Path) -> None:
    outside, link = tmp_path / "outside", tmp_path / "link"
    link.symlink_to(outside)
    for there in (False, True):
        with pytest.raises(OSError, match="symbolic links"), open_in_place(link, "ab") as file:
            file.write(b"written")
        with pytest.raises(OSError, match="symbolic links"), locked(link):
            pass
        assert outside.exists() == there
        outside.write_bytes(b"")
    assert outside.read_bytes() == b""


def test_a_work_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    require_no_link(tmp_path / "absent")
    require_no_link(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputExistsError, match="remove the link"):
        require_no_link(tmp_path / "link")
