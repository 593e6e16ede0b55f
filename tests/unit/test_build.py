"""Building shards: the same bytes whatever happens on the way, and nothing lost or left behind."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import build, tasks, verify
from data_pipeline.build import build_shards
from data_pipeline.errors import (
    BadRecordError,
    ConfigError,
    DirectionMismatchError,
    MegabackError,
    OutputExistsError,
    SourceEmptyError,
    SourceMissingError,
    TokenizerMismatchError,
)
from data_pipeline.inspection import document_ids
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.tasks import BuildSettings, belongs_to_val
from data_pipeline.text import Direction, TextCodec, Unit
from data_pipeline.tokenizer import train_tokenizer

Codecs = Callable[..., TextCodec]
Run = Callable[..., subprocess.CompletedProcess[str]]

PROSE = Path(__file__).parents[3] / "shared" / "corpora" / "prose" / "train-00003.parquet"
EMPTY_DOCUMENTS = 3
HARD_TEXTS = [
    " ",
    "\n",
    "\x00",
    "\ud800 and \udfff",
    "<|endoftext|><|im_start|>",
    "\u2581 \u2581\u2581",
    "e\u0301\U0001f600\u4e2d\u6587",
    "  double  spaces\r\nand\ttabs ",
]


def write_source(folder: Path, texts: list[str], num_files: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::num_files]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def source_texts(english_documents: list[str]) -> list[str]:
    """Documents of which some are hard, some empty, and 50 come twice."""
    empty = [""] * EMPTY_DOCUMENTS
    return [*english_documents[:250], *HARD_TEXTS, *empty, *english_documents[200:250]]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, source_texts: list[str]) -> Path:
    """A source of six files, not to be written to."""
    return write_source(tmp_path_factory.mktemp("build") / "source", source_texts)


@pytest.fixture(autouse=True)
def a_task_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files would all be one task."""
    monkeypatch.setattr(tasks, "_SMALLEST_TASK_BYTES", 1)


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on processes, which take a second to start."""

    def pool(workers: int, **_options: object) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(build, "ProcessPoolExecutor", pool)


def make_settings(source: Path | str, codec: TextCodec, **changed: object) -> BuildSettings:
    settings = BuildSettings(
        source=str(source),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        direction=codec.format.direction.value,
        unit=codec.format.unit.value,
        val_fraction=0.1,
        frame_tokens=256,
        shard_tokens=1500,
    )
    return replace(settings, **changed)


def hashes(folder: Path) -> dict[str, str]:
    """What a folder holds, file by file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, source: Path, codec: Codecs
) -> Iterator[Path]:
    """The folder of an uninterrupted build, not to be written to."""
    out = tmp_path_factory.mktemp("finished") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_SMALLEST_TASK_BYTES", 1)
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    before = hashes(out)
    yield out
    assert hashes(out) == before


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished folder, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "shards"))


def rendered(folder: Path) -> dict[str, Counter[str]]:
    """The texts of every split, from the shards alone."""
    manifest = Manifest.load(folder)
    codec = manifest.codec(folder)
    return {
        split: Counter(map(codec.render, document_ids(folder, manifest, split))) for split in SPLITS
    }


def test_a_build_writes_several_shards_of_several_tasks(finished: Path) -> None:
    """What the other tests of this file take for granted."""
    names = [shard.file for shard in Manifest.load(finished).split("train")]
    assert {f"train-{task:05d}-{shard:05d}.zst" for task in range(6) for shard in (0, 1)} <= {
        *names
    }


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(
    source: Path, codec: Codecs, finished: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "shards"
    build_shards(make_settings(source, codec()), codec(), out, workers)
    assert hashes(out) == hashes(finished)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("direction", list(Direction))
def test_every_document_is_rendered_byte_for_byte(
    source: Path,
    source_texts: list[str],
    codec: Codecs,
    tmp_path: Path,
    direction: Direction,
    unit: Unit,
) -> None:
    chosen = codec(direction, unit)
    build_shards(make_settings(source, chosen), chosen, tmp_path / "shards", workers=1)
    found = rendered(tmp_path / "shards")
    assert found["train"] + found["val"] == Counter(text for text in source_texts if text)


@pytest.mark.usefixtures("in_threads")
def test_text_files_are_documents_too(codec: Codecs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = ["one\r\n\r\nfile", "another \u2581 file\n"]
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_bytes(text.encode())
    settings = make_settings(source, codec(), val_fraction=0.0)
    build_shards(settings, codec(), tmp_path / "shards", workers=1)
    assert rendered(tmp_path / "shards")["train"] == Counter(texts)


def test_the_manifests_totals_are_those_of_the_documents(
    finished: Path, source_texts: list[str], codec: Codecs
) -> None:
    manifest = Manifest.load(finished)
    for split in SPLITS:
        of_split = [
            text
            for text in source_texts
            if text
            and belongs_to_val(text.encode("utf-8", "surrogatepass"), 0.1) == (split == "val")
        ]
        total = manifest.total(split)
        assert {name: total[name] for name in ("documents", "tokens", "text_bytes")} == {
            "documents": len(of_split),
            "tokens": sum(len(codec().encode_document(text)) for text in of_split),
            "text_bytes": sum(len(text.encode("utf-8", "surrogatepass")) for text in of_split),
        }


def test_empty_documents_are_left_out_and_counted(finished: Path) -> None:
    assert Manifest.load(finished).empty_documents == EMPTY_DOCUMENTS


def test_the_same_text_is_never_in_both_splits(finished: Path) -> None:
    found = rendered(finished)
    assert found["val"]
    assert not set(found["train"]) & set(found["val"])


@given(text=st.binary(), smaller=st.floats(0, 1), larger=st.floats(0, 1))
def test_a_larger_val_set_holds_the_smaller_one(text: bytes, smaller: float, larger: float) -> None:
    smaller, larger = sorted((smaller, larger))
    assert belongs_to_val(text, larger) >= belongs_to_val(text, smaller)


def test_the_val_set_has_about_its_fraction_of_the_documents() -> None:
    chosen = sum(belongs_to_val(b"%d" % number, 0.1) for number in range(10_000))
    assert 880 < chosen < 1120  # four standard deviations


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("changed", [{"compression_level": 9}, {}], ids=["level", "place"])
def test_neither_compression_nor_the_sources_place_change_the_fingerprint(
    source: Path, codec: Codecs, finished: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    elsewhere = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    settings = make_settings(elsewhere, codec(), **changed)
    manifest, _ = build_shards(settings, codec(), tmp_path / "shards", workers=1)
    assert manifest.fingerprint == Manifest.load(finished).fingerprint


@pytest.mark.usefixtures("in_threads")
def test_a_changed_document_changes_the_fingerprint(
    source_texts: list[str], codec: Codecs, finished: Path, tmp_path: Path
) -> None:
    changed = write_source(tmp_path / "source", ["something else", *source_texts[1:]])
    settings = make_settings(changed, codec())
    manifest, _ = build_shards(settings, codec(), tmp_path / "shards", workers=1)
    assert manifest.fingerprint != Manifest.load(finished).fingerprint


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
def test_an_unfinished_folder_is_finished_to_the_same_bytes(
    source: Path, codec: Codecs, finished: Path, copy: Path, lost: list[str]
) -> None:
    for name in ("manifest.json", *lost):
        (copy / name).unlink()
    build_shards(make_settings(source, codec()), codec(), copy, workers=2)
    assert hashes(copy) == hashes(finished)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"task_sha256": 1}'])
def test_a_broken_task_record_is_done_again(
    source: Path, codec: Codecs, finished: Path, copy: Path, content: str
) -> None:
    (copy / "manifest.json").unlink()
    (copy / ".build" / "task-00001.json").write_text(content)
    build_shards(make_settings(source, codec()), codec(), copy, workers=1)
    assert hashes(copy) == hashes(finished)


@pytest.mark.usefixtures("in_threads")
def test_what_a_killed_process_left_is_cleared_away(
    source: Path, codec: Codecs, finished: Path, copy: Path
) -> None:
    (copy / "manifest.json").unlink()
    (copy / ".train-00000-00000.zst.1234.partial").write_bytes(b"half a shard")
    (copy / "train-00000-00077.zst").write_bytes(b"a shard of a larger source")
    build_shards(make_settings(source, codec()), codec(), copy, workers=1)
    assert hashes(copy) == hashes(finished)


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
from data_pipeline import tasks
from data_pipeline.build import main

if __name__ == "__main__":
    tasks._SMALLEST_TASK_BYTES = 1
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
def test_a_build_killed_half_way_is_finished_to_the_same_bytes(
    building: Building, codec: Codecs, tmp_path: Path
) -> None:
    end(building.stop_half_way(signal.SIGKILL))
    assert not (building.out / "manifest.json").exists()
    building.finish()
    same_settings = BuildSettings(str(building.source), codec().format.tokenizer_sha256)
    build_shards(same_settings, codec(), tmp_path / "uninterrupted", workers=1)
    assert hashes(building.out) == hashes(tmp_path / "uninterrupted")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_leaves_no_process_behind(building: Building, number: int) -> None:
    children = building.stop_half_way(number)
    _, alive = psutil.wait_procs(children, timeout=3)
    end(alive)
    assert [process.pid for process in alive] == []


@pytest.mark.parametrize(
    ("changed", "error", "values"),
    [
        ({"direction": "forward"}, DirectionMismatchError, ["'backward'", "'forward'"]),
        ({"unit": "word"}, DirectionMismatchError, ["'token'", "'word'"]),
        ({"frame_tokens": 512}, OutputExistsError, ["other settings"]),
        ({"val_fraction": 0.2}, OutputExistsError, ["other settings"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_of_other_settings_is_refused_and_left_as_it_was(
    source: Path,
    codec: Codecs,
    copy: Path,
    finished: Path,
    changed: dict[str, object],
    error: type[MegabackError],
    values: list[str],
) -> None:
    chosen = codec(
        Direction(changed.get("direction", "backward")), Unit(changed.get("unit", "token"))
    )
    with pytest.raises(error) as caught:
        build_shards(make_settings(source, chosen, **changed), chosen, copy, workers=1)
    assert [value for value in (str(copy), *values) if value not in str(caught.value)] == []
    assert hashes(copy) == hashes(finished)


def test_a_folder_of_another_tokenizer_is_refused_and_left_as_it_was(
    source: Path, tiny_text_folder: Path, codec: Codecs, copy: Path, finished: Path, tmp_path: Path
) -> None:
    train_tokenizer(str(tiny_text_folder), tmp_path / "other", 400)
    other = TextCodec.load(tmp_path / "other" / "tokenizer.model", Direction.BACKWARD, Unit.TOKEN)
    with pytest.raises(TokenizerMismatchError) as caught:
        build_shards(make_settings(source, other), other, copy, workers=1)
    shas = (codec().format.tokenizer_sha256, other.format.tokenizer_sha256)
    assert [sha for sha in shas if sha[:12] not in str(caught.value)] == []
    assert hashes(copy) == hashes(finished)


def test_a_folder_of_another_source_is_refused_and_left_as_it_was(
    tiny_text_folder: Path, codec: Codecs, copy: Path, finished: Path
) -> None:
    with pytest.raises(OutputExistsError):
        build_shards(make_settings(tiny_text_folder, codec()), codec(), copy, workers=1)
    assert hashes(copy) == hashes(finished)


def test_a_folder_that_holds_something_else_is_refused_and_left_as_it_was(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match="mine"):
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"thesis.txt": "precious"}


def test_a_file_in_the_place_of_the_folder_is_refused_and_left_as_it_was(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.write_text("precious")
    with pytest.raises(OutputExistsError, match="mine"):
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    assert out.read_text() == "precious"


@pytest.mark.usefixtures("in_threads")
def test_a_source_that_changed_after_the_end_is_refused(
    source_texts: list[str], codec: Codecs, tmp_path: Path
) -> None:
    source, out = write_source(tmp_path / "source", source_texts), tmp_path / "shards"
    build_shards(make_settings(source, codec()), codec(), out, workers=1)
    before = hashes(out)
    write_source(source, ["something else", *source_texts[1:]])
    with pytest.raises(OutputExistsError, match="changed"):
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    assert hashes(out) == before


@pytest.mark.usefixtures("in_threads")
def test_a_finished_folder_without_one_of_its_shards_is_refused(
    source: Path, codec: Codecs, copy: Path
) -> None:
    (copy / "train-00001-00000.zst").unlink()
    with pytest.raises(OutputExistsError, match="gone"):
        build_shards(make_settings(source, codec()), codec(), copy, workers=1)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (['{"text": "good"}', '{"text": "cut'], BadRecordError),
        (['{"text": ""}'], SourceEmptyError),
        ([], SourceEmptyError),
        (None, SourceMissingError),
    ],
    ids=["a bad record", "empty documents alone", "an empty file", "no file"],
)
def test_a_build_that_fails_leaves_no_folder(
    codec: Codecs, tmp_path: Path, lines: list[str] | None, error: type[MegabackError]
) -> None:
    source = tmp_path / "bad.jsonl"
    if lines is not None:
        source.write_text("\n".join(lines))
    with pytest.raises(error):
        build_shards(make_settings(source, codec()), codec(), tmp_path / "shards", workers=1)
    assert not (tmp_path / "shards").exists()


def break_and_mend(source: Path, codec: TextCodec, out: Path, texts: list[str], cause: str) -> None:
    """A build that fails on its only file, and the same command once that file is mended."""
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
    break_and_mend(tmp_path / "source", codec(), out, source_texts, '{"text": "cut')
    assert Manifest.load(out).total("train")["documents"] > 0


@pytest.mark.usefixtures("in_threads")
def test_a_build_that_was_killed_and_then_failed_can_be_run_again(
    source_texts: list[str], codec: Codecs, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "shards"
    (out / ".build").mkdir(parents=True)
    settings = make_settings(source, codec())
    (out / ".build" / "settings.json").write_text(json.dumps(vars(settings)))
    (out / ".train-00000-00000.zst.1234.partial").write_bytes(b"half a shard")
    break_and_mend(source, codec(), out, source_texts, '{"text": "cut')
    assert Manifest.load(out).total("train")["documents"] > 0


@pytest.mark.usefixtures("in_threads")
def test_a_build_that_could_not_write_its_settings_can_be_run_again(
    source: Path, codec: Codecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk, or when killed at once."""

    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_text", refuse)
        with pytest.raises(OSError, match="No space"):
            build_shards(make_settings(source, codec()), codec(), tmp_path / "shards", workers=1)
    build_shards(make_settings(source, codec()), codec(), tmp_path / "shards", workers=1)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"source": "x", "color": "red"}'])
def test_settings_that_cannot_be_read_are_an_error_that_names_the_folder(
    source: Path, codec: Codecs, copy: Path, content: str
) -> None:
    (copy / ".build" / "settings.json").write_text(content)
    with pytest.raises(MegabackError, match=str(copy)):
        build_shards(make_settings(source, codec()), codec(), copy, workers=1)


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"frame_tokens": 1000}, "--frame-tokens"),
        ({"frame_tokens": 32}, "--frame-tokens"),
        ({"frame_tokens": 1 << 25}, "--frame-tokens"),
        ({"val_fraction": 1.0}, "--val-fraction"),
        ({"val_fraction": -0.1}, "--val-fraction"),
        ({"val_fraction": float("nan")}, "--val-fraction"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(
    source: Path, codec: Codecs, tmp_path: Path, changed: dict[str, object], option: str
) -> None:
    with pytest.raises(ConfigError, match=option):
        build_shards(
            make_settings(source, codec(), **changed), codec(), tmp_path / "shards", workers=1
        )


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap_with_another(path: Path) -> None:
    path.write_bytes((path.parent / "train-00003-00000.zst").read_bytes())


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, swap_with_another, Path.unlink])
def test_verify_names_a_damaged_shard(
    copy: Path, run_megaback: Run, damage: Callable[[Path], None]
) -> None:
    path = copy / "train-00002-00000.zst"
    damage(path)
    result = run_megaback("shards", "verify", copy)
    (line,) = result.stderr.splitlines()
    assert (result.returncode, line.startswith("megaback: error: "), str(path) in line) == (
        31,
        True,
        True,
    )


def test_verify_names_every_damaged_shard(copy: Path, run_megaback: Run) -> None:
    names = ["train-00001-00000.zst", "train-00002-00000.zst", "val-00005-00000.zst"]
    for name in names:
        flip_a_byte(copy / name)
    stderr = run_megaback("shards", "verify", copy).stderr
    assert [name for name in names if name not in stderr] == []


def test_verify_is_content_with_what_build_wrote(finished: Path, run_megaback: Run) -> None:
    result = run_megaback("shards", "verify", finished)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    "path",
    [
        ("shards", 0, "tokens"),
        ("shards", 0, "documents"),
        ("shards", 0, "text_bytes"),
        ("shards", 0, "file_bytes"),
        ("vocab_size",),
        ("begin_id",),
        ("end_id",),
        ("id_bytes",),
        ("frame_tokens",),
    ],
    ids=lambda path: path[-1],
)
def test_verify_notices_a_wrong_number_in_the_manifest(
    copy: Path, path: tuple[str | int, ...]
) -> None:
    fields = json.loads((copy / "manifest.json").read_text())
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] += 1
    (copy / "manifest.json").write_text(json.dumps(fields))
    assert CliRunner().invoke(verify.main, [str(copy)]).exit_code == 31


def test_another_tokenizer_beside_the_shards_is_noticed(
    copy: Path, tiny_text_folder: Path, tmp_path: Path
) -> None:
    train_tokenizer(str(tiny_text_folder), tmp_path / "other", 400)
    shutil.copy(tmp_path / "other" / "tokenizer.model", copy)
    assert CliRunner().invoke(verify.main, [str(copy)]).exit_code == 32


def test_a_document_is_shown_byte_for_byte(
    finished: Path, run_megaback: Run, codec: Codecs
) -> None:
    manifest = Manifest.load(finished)
    texts = [codec().render(ids) for ids in document_ids(finished, manifest, "val")]
    number = len(texts) - 1  # of the last shard
    result = run_megaback("shards", "inspect", finished, "--split", "val", "--document", number)
    assert result.stdout == texts[number]


@pytest.mark.skipif(not PROSE.exists(), reason="the prose corpus is not beside the repository")
def test_real_prose_is_built_verified_and_rendered_byte_for_byte(
    codec: Codecs, tmp_path: Path, run_megaback: Run
) -> None:
    import pyarrow.parquet

    out = tmp_path / "shards"
    build_shards(make_settings(PROSE, codec(), shard_tokens=1 << 20), codec(), out, workers=2)
    assert run_megaback("shards", "verify", out).returncode == 0
    found = rendered(out)
    texts = pyarrow.parquet.read_table(PROSE, columns=["text"])["text"].to_pylist()
    assert found["train"] + found["val"] == Counter(texts)
