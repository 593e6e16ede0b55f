"""Runs and checkpoints in place of a model: converted once, atomically, and cached."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

import megaback
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from data_pipeline.text.codec import TextCodec
from megaback.cli import main
from megaback.run_folder import CONVERTED_FOLDER
from megaback.weights import converted
from megaback.weights.converted import model_folder, shown_name
from tests.helpers.exports import write_checkpoint
from tools.convert import convert

Codecs = Callable[..., TextCodec]


@pytest.fixture
def run(tmp_path: Path, codec: Codecs) -> Path:
    """A run with one checkpoint."""
    write_checkpoint(tmp_path / "my run", codec(), context_tokens=32)
    return tmp_path / "my run"


def conversions(run: Path) -> list[str]:
    """Names in the folder of conversions, except the lock."""
    return sorted(path.name for path in (run / CONVERTED_FOLDER).iterdir() if path.name != ".lock")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_converted_once_with_the_result_of_convert(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "megaback")
    convert(run, tmp_path / "by hand", "full", "float32")
    first = model_folder(run)
    by_hand = contents(tmp_path / "by hand")
    by_hand.pop(".megaback.json", None)  # marks a folder that --overwrite may replace
    assert contents(first) == by_hand
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    checkpoint = next((run / "checkpoints").glob("step-*"))
    assert {model_folder(path) for path in (run, str(run), checkpoint, run / "checkpoints")} == {
        first
    }
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == stamps
    assert conversions(run) == [first.name]
    lines = caplog.messages
    assert len(lines) == 5
    assert lines[0] == f"{run}: {checkpoint.name}, converted to {first}"
    assert lines[1] == f"{run}: {checkpoint.name}, already converted to {first}"


def test_a_newer_checkpoint_is_another_model_and_best_selects_one(run: Path, codec: Codecs) -> None:
    older = model_folder(run)
    write_checkpoint(run, codec(), context_tokens=32, step=40)
    newer = model_folder(run)
    (run / "checkpoints/best").write_text("step-00000030\n")
    assert newer.name.startswith("step-00000040-")
    assert model_folder(run / "checkpoints/best") == older
    write_checkpoint_again = run / "checkpoints/step-00000040/meta.json"
    write_checkpoint_again.write_text(write_checkpoint_again.read_text() + " ")
    assert model_folder(run) not in (newer, older)  # by content, not only by step


def test_unused_conversions_of_deleted_checkpoints_are_removed(run: Path, codec: Codecs) -> None:
    older = model_folder(run)
    write_checkpoint(run, codec(), context_tokens=32, step=40)
    shutil.rmtree(run / "checkpoints/step-00000030")
    kept = model_folder(run)
    assert conversions(run) == sorted([older.name, kept.name])  # it may be in use
    write_checkpoint(run, codec(), context_tokens=32, step=50)
    hour_ago = time.time() - 2 * converted._KEPT_S
    os.utime(older, (hour_ago, hour_ago))
    newest = model_folder(run)
    assert conversions(run) == sorted([kept.name, newest.name])


def test_other_files_and_folders_among_conversions_are_kept(run: Path, codec: Codecs) -> None:
    worked_in = model_folder(run)
    (worked_in / "notes.txt").write_text("mine")
    beside = run / CONVERTED_FOLDER
    elsewhere = run.parent / "elsewhere"
    write_checkpoint(run, codec(), context_tokens=32, step=40)
    shutil.rmtree(run / "checkpoints/step-00000030")
    model = contents(worked_in)
    names = ["thesis.partial", ".mine.partial", "step-00000001-mine", "step-00000001.old"]
    for name in (*names, "step-00000009-0123456789ab"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "config.json").write_text("mine")
    for name in names:
        shutil.copytree(elsewhere / name, beside / name)
    (beside / "step-00000009-0123456789ab").symlink_to(elsewhere / "step-00000009-0123456789ab")
    unfinished = beside / ".step-00000001-0123456789ab.0123456789ab.partial"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("half")
    hour_ago = time.time() - 2 * converted._KEPT_S
    for path in (*beside.iterdir(), *elsewhere.iterdir()):
        os.utime(path, (hour_ago, hour_ago))
    model_folder(run)
    assert not unfinished.exists()
    assert contents(worked_in) == model
    for folder, some in ((beside, names), (elsewhere, [path.name for path in elsewhere.iterdir()])):
        assert all((folder / name / "config.json").read_text() == "mine" for name in some)


def test_nothing_is_written_through_a_link_in_a_run(run: Path) -> None:
    elsewhere = run.parent / "elsewhere"
    elsewhere.mkdir()
    (run / CONVERTED_FOLDER).symlink_to(elsewhere)
    assert (model_folder(run) / "config.json").is_file()
    assert list(elsewhere.iterdir()) == []


def test_concurrent_conversions_return_the_same_folder(run: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(model_folder, [run] * 4))
    assert len(found) == 1
    assert conversions(run) == [found.pop().name]


def test_an_interrupted_conversion_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(converted, "write_model_folder", fail)
        with pytest.raises(KeyboardInterrupt):
            model_folder(run)
    assert conversions(run) == []
    assert model_folder(run).is_dir()


def test_if_a_checkpoint_is_deleted_while_it_is_read_a_newer_one_is_converted(
    run: Path, codec: Codecs, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = converted.open_checkpoint

    def rotate(target: Path) -> object:
        if target.name == "step-00000030":
            write_checkpoint(run, codec(), context_tokens=32, step=40)
            shutil.rmtree(target)
        return read(target)

    monkeypatch.setattr(converted, "open_checkpoint", rotate)
    assert model_folder(run).name.startswith("step-00000040-")


def test_a_damaged_checkpoint_is_an_error(run: Path) -> None:
    weights = next(run.rglob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointCorruptError, match="is not the file that was saved"):
        model_folder(run)
    assert conversions(run) == []


def test_a_read_only_run_is_converted_into_a_temporary_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    caplog.set_level("INFO", "megaback")
    left: list[object] = []
    monkeypatch.setattr(converted, "locked", refuse)
    monkeypatch.setattr(converted.atexit, "register", lambda *words, **_: left.append(words[1]))
    folder = model_folder(run)
    assert not (run / CONVERTED_FOLDER).exists()
    assert (folder / "config.json").is_file()
    assert (shown_name(folder), left) == ("my run", [folder.parent])
    assert "cannot be written" in caplog.text
    shutil.rmtree(folder.parent)


def test_a_path_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissingError, match="does not exist"):
        model_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointMissingError, match=r"neither a model's folder .* nor a run"):
        model_folder(tmp_path)


def test_a_converted_model_has_the_runs_name(run: Path) -> None:
    assert shown_name(model_folder(run)) == "my run"
    assert shown_name(run) == "my run"


def test_the_python_api_and_every_command_accept_a_run(run: Path, tmp_path: Path) -> None:
    assert megaback.load(run).complete_backwards("the end.", max_new_tokens=2).endswith("the end.")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"question": "who?", "answer": "me."}\n')
    with megaback.load_scorer(run, form="plain"):
        pass
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Who?", "output": "Me."}\n')
    for words in (
        ("sample", run, "--ending", "the end.", "--max-new-tokens", "2"),
        ("chat", run, "--ending", "the end.", "--max-new-tokens", "2"),
        ("score", run, "--in", pairs, "--out", tmp_path / "scored.jsonl"),
        ("eval", run, "--suite", "instruction-recall", "--rows", rows, "--max-new-tokens", "2"),
    ):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, (words, result.output)
    assert len(conversions(run)) == 1
