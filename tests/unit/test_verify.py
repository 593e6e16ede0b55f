"""`megaback shards verify`: content with what build wrote, and any damage to it is named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from build_helpers import Run
from click.testing import CliRunner

from data_pipeline import verify
from data_pipeline.tokenizer import train_tokenizer


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
