"""Builds that are killed, fail, or are run again give the same bytes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.build import plan, plan_command
from data_pipeline.build.command import build_planned, build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.errors import BadRecordError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from tests.helpers.builds import Codecs, hashes, make_settings, write_source

pytestmark = pytest.mark.usefixtures("a_task_a_file")


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(
    source: Path, codec: Codecs, finished: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "shards"
    build_shards(make_settings(source, codec()), codec(), out, workers)
    assert hashes(out) == hashes(finished)


def test_the_same_command_on_a_finished_folder_changes_nothing(
    source: Path, codec: Codecs, copy: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir() if path.is_file()}
    build_shards(make_settings(source, codec()), codec(), copy, workers=1)
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir() if path.is_file()} == before


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize(
    "lost",
    [
        [".build/task-00001.json", ".build/task-00004.json"],
        ["train-00002-00000.zst"],
        [".build/task-00000.json", "train-00000-00001.zst", "val-00005-00000.zst"],
        ["tokenizer.model"],
        [],
    ],
    ids=["records", "a shard", "both", "the tokenizer", "the manifest alone"],
)
def test_an_unfinished_folder_resumes_to_the_same_bytes(
    source: Path, codec: Codecs, finished: Path, copy: Path, lost: list[str]
) -> None:
    for name in ("manifest.json", *lost):
        (copy / name).unlink()
    build_shards(make_settings(source, codec()), codec(), copy, workers=2)
    assert hashes(copy) == hashes(finished)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"task_sha256": 1}'])
def test_a_task_with_a_damaged_record_is_run_again(
    source: Path, codec: Codecs, finished: Path, copy: Path, content: str
) -> None:
    (copy / "manifest.json").unlink()
    (copy / ".build" / "task-00001.json").write_text(content)
    build_shards(make_settings(source, codec()), codec(), copy, workers=1)
    assert hashes(copy) == hashes(finished)


@pytest.mark.usefixtures("in_threads")
def test_files_of_a_killed_process_are_removed(
    source: Path, codec: Codecs, finished: Path, copy: Path
) -> None:
    (copy / "manifest.json").unlink()
    (copy / ".train-00000-00000.zst.1234.partial").write_bytes(b"half a shard")
    (copy / "train-00000-00077.zst").write_bytes(b"a shard of a larger source")
    build_shards(make_settings(source, codec()), codec(), copy, workers=1)
    assert hashes(copy) == hashes(finished)


@pytest.mark.usefixtures("in_threads")
def test_other_files_in_the_folder_of_a_build_are_kept(
    source: Path, codec: Codecs, copy: Path
) -> None:
    mine = copy.parent / "mine"
    mine.write_bytes(b"mine")
    strangers = [copy / name for name in (".scores.jsonl.0123456789ab.partial", ".notes.partial")]
    for path in strangers:
        path.write_bytes(b"mine")
    left = copy / ".build" / ".task-00000.json.0123456789ab.partial"
    left.write_bytes(b"half")
    (copy / ".manifest.json.0123456789ab.partial").symlink_to(mine)
    for _ in range(2):  # on finishing, and on the next run
        build_shards(make_settings(source, codec()), codec(), copy, workers=1)
        (copy / "manifest.json").unlink(missing_ok=True)
    build_shards(make_settings(source, codec()), codec(), copy, workers=1)
    assert all(path.read_bytes() == b"mine" for path in (*strangers, mine))
    assert not left.exists()


@pytest.mark.usefixtures("in_threads")
def test_a_failed_build_keeps_files_that_others_added_meanwhile(
    source: Path, codec: Codecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "shards"

    def fail(*_: object, **__: object) -> None:
        (out / "notes.txt").write_bytes(b"mine")
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.build.command.build_planned", fail)
    with pytest.raises(KeyboardInterrupt):
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("in_threads")
def test_a_source_that_changes_before_the_end_is_read_again(
    source_texts: list[str], codec: Codecs, tmp_path: Path
) -> None:
    source, out = write_source(tmp_path / "source", source_texts), tmp_path / "shards"
    build_shards(make_settings(source, codec()), codec(), out, workers=1)
    (out / "manifest.json").unlink()
    write_source(source, ["something else", *source_texts[1:]])
    build_shards(make_settings(source, codec()), codec(), out, workers=1)
    fresh = tmp_path / "fresh"
    build_shards(make_settings(source, codec()), codec(), fresh, workers=1)
    assert hashes(out) == hashes(fresh)


BUILD_SCRIPT = """
from data_pipeline.build import plan
from data_pipeline.build.command import main

if __name__ == "__main__":
    plan._SMALLEST_TASK_BYTES = 1
    main()
"""


class Building:
    """A real build of 20 tasks, stopped by a signal when the first ones are done."""

    def __init__(self, folder: Path, texts: list[str], tokenizer_path: Path) -> None:
        self.out = folder / "shards"
        self.source = write_source(folder / "source", texts * 20, num_files=20)
        script = folder / "build.py"
        script.write_text(BUILD_SCRIPT)
        options = {"source": self.source, "tokenizer": tokenizer_path, "out": self.out}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.command = [sys.executable, str(script), "--workers", "2", *words]

    def stop_half_way(self, number: int) -> list[psutil.Process]:
        """Returns the processes that the build had started."""
        process = subprocess.Popen(
            self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not list(self.out.glob(".build/task-*.json")):
            assert process.poll() is None
            time.sleep(0.005)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.wait(timeout=60)
        return children

    def finish(self) -> None:
        subprocess.run(self.command, check=True, capture_output=True, timeout=120)


@pytest.fixture
def building(tmp_path: Path, english_documents: list[str], tokenizer_path: Path) -> Building:
    return Building(tmp_path, english_documents, tokenizer_path)


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.kill()


@pytest.mark.usefixtures("in_threads")
def test_a_killed_build_resumes_to_the_same_bytes(
    building: Building, codec: Codecs, tmp_path: Path
) -> None:
    end(building.stop_half_way(signal.SIGKILL))
    assert not (building.out / "manifest.json").exists()
    building.finish()
    same_settings = BuildSettings(
        (WeightedSource(str(building.source)),), codec().format.tokenizer_sha256
    )
    build_shards(same_settings, codec(), tmp_path / "uninterrupted", workers=1)
    assert hashes(building.out) == hashes(tmp_path / "uninterrupted")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_leaves_no_process_behind(building: Building, number: int) -> None:
    children = building.stop_half_way(number)
    _, alive = psutil.wait_procs(children, timeout=20)
    end(alive)
    assert [process.pid for process in alive] == []


@pytest.mark.usefixtures("in_threads")
def test_a_plan_that_another_build_removed_is_written_again_before_a_shard(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    """The other build failed after this one had read the plan, and before it held the lock."""
    out = tmp_path / "shards"
    made, _ = plan_command.claim_plan(make_settings(source, codec()), codec(), out, None)
    (out / plan.PLAN_NAME).unlink()
    build_planned(made, codec(), out, workers=1)
    assert plan.Plan.load(out) == made


def break_and_fix(source: Path, codec: TextCodec, out: Path, texts: list[str], cause: str) -> None:
    """A build that fails on its only file, and the same command once that file is fixed."""
    write_source(source, texts, num_files=1)
    with (source / "0.jsonl").open("a") as file:
        file.write(cause)
    with pytest.raises(BadRecordError):
        build_shards(make_settings(source, codec), codec, out, workers=1)
    write_source(source, texts, num_files=1)
    build_shards(make_settings(source, codec), codec, out, workers=1)


@pytest.mark.usefixtures("in_threads")
def test_a_build_that_failed_in_an_empty_folder_can_be_run_again(
    source_texts: list[str], codec: Codecs, tmp_path: Path
) -> None:
    """The task had finished a shard before it failed."""
    out = tmp_path / "shards"
    out.mkdir()
    break_and_fix(tmp_path / "source", codec(), out, source_texts, '{"text": "cut')
    assert Manifest.load(out).total("train")["documents"] > 0


@pytest.mark.usefixtures("in_threads")
def test_a_build_that_was_killed_before_its_plan_and_then_failed_can_be_run_again(
    source_texts: list[str], codec: Codecs, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "shards"
    (out / ".build").mkdir(parents=True)
    (out / ".build" / "plan.json.1234").write_text("{")
    (out / "tokenizer.model").write_bytes(codec().model_bytes)
    break_and_fix(source, codec(), out, source_texts, '{"text": "cut')
    assert Manifest.load(out).total("train")["documents"] > 0


@pytest.mark.usefixtures("in_threads")
def test_a_build_that_could_not_write_its_plan_leaves_nothing(
    source: Path, codec: Codecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk."""

    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(plan_command, "write_text", refuse)
        with pytest.raises(OSError, match="No space"):
            build_shards(make_settings(source, codec()), codec(), tmp_path / "shards", workers=1)
    assert list(tmp_path.iterdir()) == []
