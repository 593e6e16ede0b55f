"""Removal of what killed writers left; what other processes are writing is kept."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common.abandoned import remove_abandoned
from data_pipeline.common.output_folder import whole_folder
from data_pipeline.common.output_paths import writing_output
from data_pipeline.errors import OutputExistsError


def write_half(folder: Path) -> None:
    """Write half a folder `model` and half a file `rows`, and wait."""
    with (
        whole_folder(folder / "model", overwrite=True) as model,
        writing_output(folder / "rows", overwrite=False) as rows,
    ):
        (model / "weights").write_text("half")
        rows.write(b"half")
        rows.flush()
        (folder / "ready").touch()
        signal.pause()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[int]:
    """Process ID of a writer that has written half, beside files of others."""
    (tmp_path / ".model.notes.partial").mkdir()
    (tmp_path / ".other.0123456789ab.partial").touch()
    process = os.fork()
    if not process:
        write_half(tmp_path)
        os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.001)
    yield process
    kill(process)


def kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def write_whole(folder: Path) -> None:
    with whole_folder(folder / "model") as model:
        (model / "weights").write_text("whole")
    with writing_output(folder / "rows", overwrite=False) as rows:
        rows.write(b"whole")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OF_OTHERS = [".model.notes.partial", ".other.0123456789ab.partial", "ready"]


def test_halves_of_a_killed_writer_are_removed(writer: int, tmp_path: Path) -> None:
    kill(writer)
    assert len(names_in(tmp_path)) == len(OF_OTHERS) + 2

    write_whole(tmp_path)

    assert names_in(tmp_path) == [*OF_OTHERS[:2], "model", "ready", "rows"]
    assert (tmp_path / "model" / "weights").read_text() == "whole"


def test_what_another_process_writes_is_kept(writer: int, tmp_path: Path) -> None:
    before = names_in(tmp_path)

    with pytest.raises(OutputExistsError, match="another process is writing `out`"):
        write_whole(tmp_path)
    assert remove_abandoned(tmp_path / "rows")
    (tmp_path / ".model.00000000000a.partial").mkdir()  # of a process that has not locked it yet
    assert remove_abandoned(tmp_path / "model")

    assert set(names_in(tmp_path)) == {*before, ".model.00000000000a.partial"}
    os.kill(writer, 0)


@pytest.mark.parametrize("has_new", [False, True])
def test_an_earlier_folder_is_restored_if_its_replacement_was_killed(
    has_new: bool, tmp_path: Path
) -> None:
    write_whole(tmp_path)
    os.replace(tmp_path / "model", tmp_path / ".model.0123456789ab.replaced")
    if has_new:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text("new")

    assert not remove_abandoned(tmp_path / "model")

    assert names_in(tmp_path) == ["model", "rows"]
    assert (tmp_path / "model" / "weights").read_text() == ("new" if has_new else "whole")
