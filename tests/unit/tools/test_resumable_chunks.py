"""Parts of a work folder, whose contents are untrusted."""

from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from tools import resumable_chunks
from tools.resumable_chunks import ResumableChunks


def test_chunks_are_read_in_order_and_a_partial_line_is_truncated(tmp_path: Path) -> None:
    parts = ResumableChunks(tmp_path, 2)
    for task in (0, 1):
        assert parts.resume(task) == 0
        parts.append(task, [task])
    parts.append(0, [2])
    unfinished = tmp_path / "part-00000.unfinished"
    whole = unfinished.read_bytes()
    unfinished.write_bytes(whole + b'["half')
    assert parts.resume(0) == 2
    assert unfinished.read_bytes() == whole
    for task in (0, 1):
        parts.finish(task)
    assert list(parts.read_all()) == [[0], [1], [2]]


@pytest.mark.parametrize("block_bytes", [1, 2, 7, 100])
def test_chunks_are_counted_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(resumable_chunks, "_BLOCK_BYTES", block_bytes)
    unfinished = tmp_path / "part-00000.unfinished"
    unfinished.write_bytes(b"[1]\n[22]\n[333]")
    assert ResumableChunks(tmp_path, 1).resume(0) == 2
    assert unfinished.read_bytes() == b"[1]\n[22]\n"


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    private = tmp_path / "private.jsonl"
    private.write_text('["secret"]\n')
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("part-00000.jsonl", "part-00000.unfinished"):
        (folder / name).symlink_to(private)
    parts = ResumableChunks(folder, 1)
    assert not parts.is_done(0)
    for use in (lambda: parts.resume(0), lambda: parts.append(0, []), lambda: [*parts.read_all()]):
        with pytest.raises(OSError, match="symbolic links"):
            use()
    assert private.read_text() == '["secret"]\n'


@pytest.mark.parametrize("line", ["{}", "7", "[" * 100_000, "[1", '{"a": [1]}', "[1]" * 9])
def test_a_corrupted_line_is_an_error_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.setattr(resumable_chunks, "_MAX_LINE_BYTES", 30)
    (tmp_path / "part-00000.jsonl").write_bytes(resumable_chunks._line(line.encode(), 0))
    with pytest.raises(StorageError, match=r"part-00000\.jsonl:1 is corrupted"):
        list(ResumableChunks(tmp_path, 1).read_all())


def finished(folder: Path) -> list[Path]:
    """The parts of two tasks, with a chunk each."""
    parts = ResumableChunks(folder, 2)
    for task in (0, 1):
        parts.resume(task)
        parts.append(task, [1.25])
        parts.finish(task)
    return [folder / f"part-{task:05d}.jsonl" for task in (0, 1)]


def test_an_altered_digit_and_the_part_of_another_task_are_found(tmp_path: Path) -> None:
    first, second = finished(tmp_path)
    own = first.read_bytes()

    for other in (second.read_bytes(), own.replace(b"1.25", b"1.35")):
        first.write_bytes(other)
        with pytest.raises(StorageError, match=r"part-00000\.jsonl:1 is corrupted \(its checksum"):
            list(ResumableChunks(tmp_path, 2).read_all())
    first.write_bytes(own)
    assert list(ResumableChunks(tmp_path, 2).read_all()) == [[1.25], [1.25]]
