"""`megaback inspect` identifies every output of megaback, and incomplete ones."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    MegabackError,
    ShardCorruptError,
    SourceMissingError,
    TokenizerError,
)
from tools.artifacts import inspect
from tools.convert import convert
from tools.export.gguf import write_gguf_folder
from tools.export.hf import write_hf_folder

RunOf = Callable[..., Path]
ModelOf = Callable[[Path], Path]


@pytest.fixture
def run(run_of: RunOf) -> Path:
    return run_of("zero.stage=1")


@pytest.fixture(scope="session")
def exports(run_of: RunOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`exports(kind)`: the run's model as `full`, `hf` or `gguf`."""
    import torch

    from megaback.weights.source import open_source

    folder = tmp_path_factory.mktemp("exports")
    convert(run_of("zero.stage=1"), folder / "full", "full", "float32")
    source = open_source(run_of("zero.stage=1"))
    for kind in ("hf", "gguf"):
        (folder / kind).mkdir()
    write_hf_folder(folder / "hf", "tiny", source, torch.float32, 10**9)
    write_gguf_folder(folder / "gguf", "tiny", source, "float32")
    return lambda kind: folder / kind


@pytest.mark.parametrize("verify", [False, True], ids=["by size", "by hash"])
def test_a_data_set_and_its_parts_are_identified(tiny_shards: Path, verify: bool) -> None:
    found = inspect(tiny_shards, verify=verify)
    shard = inspect(next(tiny_shards.glob("*.zst")), verify=verify)
    tokenizer = inspect(tiny_shards / "tokenizer.model", verify=verify)

    assert (found.kind, shard.kind, tokenizer.kind) == ("data set", "shard", "tokenizer")
    sha256 = found.facts["tokenizer_sha256"]
    assert shard.facts["tokenizer_sha256"] == tokenizer.facts["tokenizer_sha256"] == sha256
    assert found.facts["direction"] == "backward"
    assert any(line.startswith("megaback train") for line in found.next_lines)


@pytest.mark.parametrize("verify", [False, True], ids=["by size", "by hash"])
def test_a_run_and_its_checkpoints_are_identified(run: Path, verify: bool) -> None:
    found = inspect(run, verify=verify)
    newest = inspect(run / "checkpoints", verify=verify)
    named = inspect(run / "checkpoints" / "latest", verify=verify)

    assert (found.kind, newest.kind) == ("run", "checkpoint")
    assert found.facts["newest"] == newest.facts == named.facts
    assert newest.facts["saved_by"] == "2 ranks at ZeRO 1, fp32"
    assert "torch" in newest.facts["versions"]
    assert found.facts["ended"] == "trained to the end"


@pytest.mark.parametrize("verify", [False, True], ids=["by size", "by hash"])
@pytest.mark.parametrize(
    ("kind", "said"), [("full", "--to full"), ("hf", "--to hf"), ("gguf", "--to gguf")]
)
def test_exports_are_identified_with_their_direction(
    kind: str, said: str, verify: bool, exports: Callable[[str], Path]
) -> None:
    found = inspect(exports(kind), verify=verify)

    assert said in found.kind
    assert found.facts["direction"] == "backward"
    assert len(found.facts["tokenizer_sha256"]) == 64


def test_an_unfinished_data_set_is_incomplete(
    tiny_text_folder: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    run_megaback: Callable[..., object],
) -> None:
    out = tmp_path / "shards"
    given = ("--source", tiny_text_folder, "--tokenizer", tokenizer_path, "--out", out)
    run_megaback("shards", "plan", *given)

    found = inspect(out, verify=False)

    assert (found.kind, found.is_whole) == ("data set that is not finished", False)
    assert f"megaback shards build --out {out}" in found.next_lines


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("manifest.json", ShardCorruptError),
        ("train-00000-00000.zst", ShardCorruptError),
        ("tokenizer.model", TokenizerError),
    ],
)
def test_a_data_set_with_a_truncated_file_is_incomplete(
    name: str, error: type[MegabackError], tiny_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    shutil.copytree(tiny_shards, folder)
    cut(folder / name)

    with pytest.raises(error):
        inspect(folder, verify=False)


def test_a_checkpoint_with_a_truncated_file_is_incomplete(run: Path, tmp_path: Path) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    shutil.copytree(newest, tmp_path / newest.name)
    cut(tmp_path / newest.name / "weights-00001.safetensors")

    with pytest.raises(CheckpointCorruptError, match=r"weights-00001\.safetensors has .* bytes"):
        inspect(tmp_path / newest.name, verify=False)


def test_one_changed_byte_is_found_with_verify_only(run: Path, tmp_path: Path) -> None:
    newest = max((run / "checkpoints").glob("step-*"))
    shutil.copytree(newest, tmp_path / newest.name)
    path = tmp_path / newest.name / "weights-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    assert inspect(tmp_path / newest.name, verify=False).kind == "checkpoint"
    with pytest.raises(CheckpointCorruptError, match="is not the file that was saved"):
        inspect(tmp_path / newest.name, verify=True)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("full", "config.json"),
        ("full", "model.safetensors"),
        ("hf", "config.json"),
        ("gguf", "model.gguf"),
    ],
)
def test_an_export_with_a_truncated_file_is_incomplete(
    kind: str, name: str, exports: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exports(kind), folder)
    cut(folder / name)

    with pytest.raises(CheckpointCorruptError):
        inspect(folder, verify=False)


def test_a_checkpoint_without_its_last_file_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)

    with pytest.raises(CheckpointMissingError, match="no complete checkpoint"):
        inspect(tmp_path, verify=False)


def test_another_version_is_reported(exports: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exports("full"), folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 1'))

    with pytest.raises(CheckpointCorruptError, match="another format or version"):
        inspect(folder, verify=False)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.mkdir(), "empty folder"),
        (lambda path: (path.mkdir(), (path / "a.txt").touch()), "nothing that megaback wrote"),
        (lambda path: path.touch(), "not a file of megaback's"),
        (lambda path: path.with_name("another").touch(), "does not exist"),
        (os.mkfifo, "a device, a pipe or a socket"),
        (lambda path: path.symlink_to("/dev/null"), "a device, a pipe or a socket"),
    ],
    ids=["empty", "foreign", "file", "absent", "pipe", "device"],
)
def test_an_unknown_file_is_one_error_message(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "it")

    with pytest.raises(SourceMissingError, match=said):
        inspect(tmp_path / "it", verify=False)


def test_the_command_prints_the_next_command(
    tiny_shards: Path, run_megaback: Callable[..., object]
) -> None:
    done = run_megaback("inspect", tiny_shards)

    assert done.returncode == 0  # type: ignore[attr-defined]
    lines = done.stdout.splitlines()  # type: ignore[attr-defined]
    assert lines[0].split() == ["what", "data", "set,", str(tiny_shards)]
    assert any(line.startswith("next") for line in lines)
