"""Untrusted data sets and builds: no file outside their folder is read or written.

Manifests and records of builds name shards; any file or work folder may be a link.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from data_pipeline.build import finalize
from data_pipeline.build.command import build_shards
from data_pipeline.build.task import TaskRecord
from data_pipeline.build.train_command import train_commands
from data_pipeline.errors import OutputExistsError, ShardCorruptError
from data_pipeline.shards import inspection, recompress, verify
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import DICTIONARY_NAME, MANIFEST_NAME, Manifest
from data_pipeline.shards.recompress import WORK_FOLDER
from data_pipeline.storage.remote_folder import RemoteFolder
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.train_tokenizer import REPORT_NAME
from tests.helpers.builds import Codecs, Run, hashes, make_settings
from tools.artifacts import inspect

SHARD = "train-00002-00000.zst"
VICTIM = "# a file of the user's\n"
HOSTILE_NAMES = [
    "../../.bashrc",
    "/tmp/.bashrc",
    "sub/train-00002-00000.zst",
    "..",
    "",
    ".build/task-00000.json",
    "manifest.json",
    "train-00002-00000.zst\n",
    "train-00002-00000.zst/.",
    "train-\u0660\u0660\u0660\u0660\u0660-00000.zst",
    f"train-{'0' * 300}-00000.zst",
    "train-00002-00000.zst?x=1",
    "val-00002-00000.zst",
    7,
    None,
    ["train-00002-00000.zst"],
]


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    change(fields)
    (folder / MANIFEST_NAME).write_text(json.dumps(fields))


def entry_of(fields: dict[str, Any], file: str = SHARD) -> dict[str, Any]:
    (entry,) = (entry for entry in fields["shards"] if entry["file"] == file)
    return entry


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "home" / ".bashrc"
    path.parent.mkdir()
    path.write_text(VICTIM)
    return path


def test_recompress_writes_nothing_outside_its_folder(
    copy: Path, tmp_path: Path, victim: Path, run_megaback: Run
) -> None:
    theirs = tmp_path / "theirs" / "deep" / "shards"
    shutil.copytree(copy, theirs)
    (theirs / SHARD).rename(tmp_path / "theirs" / victim.name)
    change_manifest(theirs, lambda fields: entry_of(fields).update(file=f"../../{victim.name}"))
    out = victim.parent / "data" / "recompressed"

    result = run_megaback("shards", "recompress", theirs, "--out", out)

    assert victim.read_text() == VICTIM
    assert (result.returncode, result.stderr.count("\n")) == (31, 1), result.stderr
    assert "'../../.bashrc' is not a plain file name" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_manifest_with_a_bad_shard_name_is_refused(copy: Path, name: object) -> None:
    change_manifest(copy, lambda fields: entry_of(fields).update(file=name))
    for command, arguments in (
        (inspection.main, []),
        (verify.main, []),
        (finalize.main, []),
        (recompress.main, ["--out", str(copy.parent / "out")]),
    ):
        result = CliRunner().invoke(command, [str(copy), *arguments])
        assert result.exit_code == 31, result.output
        assert len(result.stderr) < 500
    with pytest.raises(ShardCorruptError):
        DataSet.open(f"file://{copy}")


@pytest.mark.parametrize("split", ["val", "test", "", None, ["train"]])
def test_a_shard_of_another_split_than_in_its_name_is_refused(copy: Path, split: object) -> None:
    change_manifest(copy, lambda fields: entry_of(fields).update(split=split))
    with pytest.raises(ShardCorruptError):
        Manifest.load(copy)


def test_a_shard_that_is_listed_twice_is_refused(copy: Path) -> None:
    change_manifest(copy, lambda fields: fields["shards"].append(entry_of(fields)))
    with pytest.raises(ShardCorruptError, match=f"it lists {SHARD} 2 times"):
        Manifest.load(copy)


def test_a_url_folder_reads_no_file_outside_it() -> None:
    folder = RemoteFolder("http://127.0.0.1:9/shards")
    assert folder.url(SHARD) == f"http://127.0.0.1:9/shards/{SHARD}"
    for name in ("../private", "a/b", ".."):
        with pytest.raises(ValueError, match="not a plain file name"):
            folder.url(name)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / SHARD).rename(tmp_path / "elsewhere.zst")
    (copy / SHARD).symlink_to(tmp_path / "elsewhere.zst")
    for command, arguments in (
        (inspection.main, []),
        (verify.main, []),
        (recompress.main, ["--out", str(tmp_path / "out")]),
    ):
        result = CliRunner().invoke(command, [str(copy), *arguments])
        assert result.exit_code == 31
        assert "is a symbolic link out of its folder; replace it with a copy" in result.stderr
    data_set = DataSet.open(copy)
    (entry,) = (entry for entry in data_set.manifest.shards if entry.file == SHARD)
    with pytest.raises(ShardCorruptError, match="is a symbolic link out of its folder"):
        data_set.open_shard(entry)


def test_a_link_within_the_folder_is_followed(copy: Path) -> None:
    (copy / SHARD).rename(copy / "kept.zst")
    (copy / SHARD).symlink_to("kept.zst")
    assert CliRunner().invoke(verify.main, [str(copy)]).exit_code == 0


@pytest.mark.parametrize("name", [MANIFEST_NAME, SHARD, TOKENIZER_NAME])
def test_a_pipe_in_place_of_a_file_does_not_block(copy: Path, name: str) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    result = CliRunner().invoke(verify.main, [str(copy)])
    assert result.exit_code in (24, 31)
    assert "not a regular file" in result.stderr


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name",
    [
        SHARD,
        MANIFEST_NAME,
        TOKENIZER_NAME,
        f"{WORK_FOLDER}/{SHARD}.json",
        f"{WORK_FOLDER}/settings.json",
        DICTIONARY_NAME,
    ],
)
def test_recompress_writes_through_no_link(
    finished: Path, tmp_path: Path, victim: Path, name: str
) -> None:
    out = tmp_path / "out"
    arguments = [str(finished), "--out", str(out), "--dictionary-bytes", "1024"]
    assert CliRunner().invoke(recompress.main, arguments).exit_code == 0
    before = hashes(out)
    link(out / name, victim)

    again = CliRunner().invoke(recompress.main, arguments)

    assert victim.read_text() == VICTIM
    if name in (DICTIONARY_NAME, f"{WORK_FOLDER}/settings.json"):
        assert again.exit_code == OutputExistsError.exit_code, again.output
    else:
        assert again.exit_code == 0, again.output
        assert hashes(out) == before
        assert not (out / name).is_symlink()


def test_a_shard_of_the_right_size_behind_a_link_is_written_again(
    finished: Path, tmp_path: Path
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere.zst"
    arguments = [str(finished), "--out", str(out)]
    assert CliRunner().invoke(recompress.main, arguments).exit_code == 0
    before = hashes(out)
    elsewhere.write_bytes(b"x" * (out / SHARD).stat().st_size)
    link(out / SHARD, elsewhere)

    assert CliRunner().invoke(recompress.main, arguments).exit_code == 0

    assert hashes(out) == before
    assert set(elsewhere.read_bytes()) == {ord("x")}


def test_a_linked_work_folder_of_recompress_is_refused(finished: Path, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / WORK_FOLDER).symlink_to(elsewhere)
    result = CliRunner().invoke(recompress.main, [str(finished), "--out", str(out)])
    assert result.exit_code == OutputExistsError.exit_code
    assert not any(elsewhere.iterdir())


def build_again(source: Path, codec: Codecs, out: Path, **changed: object) -> None:
    build_shards(make_settings(source, codec(), **changed), codec(), out, workers=1)


@pytest.mark.usefixtures("a_task_a_file", "in_threads")
@pytest.mark.parametrize(
    "name",
    [SHARD, TOKENIZER_NAME, ".build/task-00002.json", ".build/builders.lock"],
)
def test_a_build_writes_through_no_link(
    source: Path, codec: Codecs, finished: Path, copy: Path, victim: Path, name: str
) -> None:
    (copy / MANIFEST_NAME).unlink()
    link(copy / name, victim)
    if name.endswith(".lock"):
        with pytest.raises(OSError, match="symbolic link"):
            build_again(source, codec, copy)
    else:
        build_again(source, codec, copy)
        assert hashes(copy) == hashes(finished)
        assert not (copy / name).is_symlink()
    assert victim.read_text() == VICTIM


@pytest.mark.usefixtures("a_task_a_file", "in_threads")
@pytest.mark.parametrize("name", [".build", ".build/staged"])
@pytest.mark.parametrize("is_begun", [False, True])
def test_a_linked_work_folder_of_a_build_is_refused(
    source: Path, codec: Codecs, copy: Path, tmp_path: Path, name: str, is_begun: bool
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "task-00000.json").write_text(VICTIM)
    (copy / MANIFEST_NAME).unlink()
    if not is_begun:
        (copy / "plan.json").unlink()
    shutil.rmtree(copy / name, ignore_errors=True)
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(OutputExistsError, match="remove the link"):
        build_again(source, codec, copy, deduplicate=True)
    assert [path.name for path in elsewhere.iterdir()] == ["task-00000.json"]


HOSTILE_RECORDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name elsewhere": lambda record: record["shards"][0].update(file="../../.bashrc"),
    "a shard of another task": lambda record: record["shards"][0].update(
        file="train-00003-00000.zst"
    ),
    "a shard twice": lambda record: record["shards"].append(record["shards"][0]),
    "a type": lambda record: record["shards"][0].update(tokens="7"),
    "a negative number": lambda record: record["shards"][0].update(tokens=-7),
    "too few hashes": lambda record: record.update(lowest_hashes=[[1]]),
    "a huge hash": lambda record: record.update(lowest_hashes=[[10**400, 1]]),
    "a list": lambda record: record.update(excluded=[]),
    "causes": lambda record: record.update(skipped={"records": {"a": {"count": "1"}}}),
    "no shards": lambda record: record.pop("shards"),
}


@pytest.mark.usefixtures("a_task_a_file", "in_threads")
@pytest.mark.parametrize("hostile", HOSTILE_RECORDS)
def test_a_task_with_a_hostile_record_is_run_again(
    source: Path, codec: Codecs, finished: Path, copy: Path, hostile: str
) -> None:
    (copy / MANIFEST_NAME).unlink()
    path = copy / ".build" / "task-00002.json"
    record = json.loads(path.read_text())
    assert TaskRecord.load(path, record["task_sha256"], copy)
    HOSTILE_RECORDS[hostile](record)
    path.write_text(json.dumps(record))
    assert TaskRecord.load(path, record["task_sha256"], copy) is None
    build_again(source, codec, copy)
    assert hashes(copy) == hashes(finished)


@pytest.mark.usefixtures("a_task_a_file", "in_threads")
@pytest.mark.parametrize(
    "damage",
    [
        lambda notes: notes[:-1],
        lambda notes: notes[:0],
        lambda notes: b"\7" + notes[1:],
        lambda notes: bytes([1 - notes[0]]) + notes[1:],
    ],
    ids=["cut", "empty", "no split", "another split"],
)
def test_notes_that_do_not_match_their_record_are_written_again(
    source: Path, codec: Codecs, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    wanted, out = tmp_path / "wanted", tmp_path / "out"
    build_again(source, codec, wanted, deduplicate=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finalize.shutil, "rmtree", lambda *_arguments, **_options: None)
        build_again(source, codec, out, deduplicate=True)
    (out / MANIFEST_NAME).unlink()
    notes = out / ".build" / "staged" / "task-00002.documents"
    notes.write_bytes(damage(notes.read_bytes()))
    build_again(source, codec, out, deduplicate=True)
    assert hashes(out) == hashes(wanted)


def test_inspecting_a_data_set_follows_no_link_out_of_it(copy: Path, tmp_path: Path) -> None:
    (copy / SHARD).rename(tmp_path / "elsewhere.zst")
    (copy / SHARD).symlink_to(tmp_path / "elsewhere.zst")
    with pytest.raises(ShardCorruptError, match="is a symbolic link out of its folder"):
        inspect(copy, verify=False)


@pytest.mark.parametrize("report", [b"[" * 100_000, b"[]", b'{"source": 7}', b"\xff", None])
def test_a_malformed_report_beside_a_tokenizer_is_ignored(
    tokenizer_path: Path, tmp_path: Path, report: bytes | None
) -> None:
    shutil.copy(tokenizer_path, tmp_path / TOKENIZER_NAME)
    if report is None:
        os.mkfifo(tmp_path / REPORT_NAME)
    else:
        (tmp_path / REPORT_NAME).write_bytes(report)
    (command,) = inspect(tmp_path, verify=False).next_lines
    assert "--source novels" in command


@pytest.mark.parametrize(
    "config", [[], 7, {"model": 7}, {"training": "fp32"}, {"model": {"width": 8}}, None]
)
def test_a_malformed_run_beside_a_data_set_is_ignored(copy: Path, config: object) -> None:
    manifest = replace(Manifest.load(copy), row_tokens=64)
    meta = copy.parent / "run" / "checkpoints" / "step-00000001" / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text(json.dumps({"text_format": manifest.text_format.to_dict(), "config": config}))
    (command,) = train_commands(copy, manifest)
    assert ("init_from=BASE" in command) == (config != {"model": {"width": 8}})
    meta.write_text("[" * 100_000)
    (command,) = train_commands(copy, manifest)
    assert "init_from=BASE" in command


@pytest.mark.usefixtures("a_task_a_file", "in_threads")
def test_inconsistent_records_are_reported_before_the_manifest_is_written(
    source: Path, codec: Codecs, copy: Path
) -> None:
    (copy / MANIFEST_NAME).unlink()
    path = copy / ".build" / "task-00002.json"
    record = json.loads(path.read_text())
    record["shards"][0]["tokens"] = 1 << 32  # more frames of 256 tokens than a shard may have
    path.write_text(json.dumps(record))
    with pytest.raises(ShardCorruptError, match=r"the records of the shards in .* are damaged"):
        build_again(source, codec, copy)
    assert not (copy / MANIFEST_NAME).exists()
