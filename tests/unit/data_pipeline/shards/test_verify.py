"""`megaback shards verify`: accepts undamaged shards, and names any damage."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import MegabackError, ShardCorruptError
from data_pipeline.shards import verify
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.data_set import DataSet, LocalFolder
from data_pipeline.shards.manifest import DICTIONARY_NAME, Manifest, ShardEntry
from data_pipeline.shards.recompress import recompress
from data_pipeline.shards.verify import shard_damage
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from tests.helpers.builds import Run


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def swap_with_another(path: Path) -> None:
    path.write_bytes((path.parent / "train-00003-00000.zst").read_bytes())


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, swap_with_another, Path.unlink])
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


@pytest.fixture(scope="module")
def with_dictionary(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished folder, recompressed with a dictionary."""
    out = tmp_path_factory.mktemp("recompressed") / "shards"
    recompress(finished, out, Compression(level=9), dictionary_bytes=1024)
    return out


def frame_offsets(folder: Path, entry: ShardEntry) -> list[int]:
    """Offset of each frame of a shard, and of the end of the last one."""
    with DataSet.open(folder).open_shard(entry) as reader:
        return reader.frame_offsets.tolist()


def test_verify_names_every_broken_frame_of_a_shard(copy: Path, run_megaback: Run) -> None:
    path = copy / "train-00002-00000.zst"
    (entry,) = (entry for entry in Manifest.load(copy).shards if entry.file == path.name)
    offsets = frame_offsets(copy, entry)
    data = bytearray(path.read_bytes())
    broken = (0, 2, 3)
    for frame in broken:
        data[offsets[frame + 1] - 1] ^= 1  # in the frame's checksum
    path.write_bytes(data)
    lines = run_megaback("shards", "verify", copy).stderr.splitlines()
    named = [
        frame
        for frame in range(len(offsets) - 1)
        if any(f"{path} is damaged: frame {frame} at byte {offsets[frame]} " in x for x in lines)
    ]
    assert (tuple(named), len(lines)) == (broken, len(broken))


def test_verify_finds_a_flipped_bit_that_no_reader_detects(copy: Path) -> None:
    """A frame's header has a bit that decoders ignore."""
    path = copy / "train-00002-00000.zst"
    data = bytearray(path.read_bytes())
    data[4] ^= 1 << 4
    path.write_bytes(data)
    result = CliRunner().invoke(verify.main, [str(copy)])
    assert result.exit_code == 31
    assert f"{path} is intact but not the one in the manifest" in result.stderr


@pytest.mark.parametrize("name", ["finished", "with_dictionary"])
def test_verify_reports_any_damaged_byte_with_an_error_of_ours(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder: Path = request.getfixturevalue(name)
    manifest = Manifest.load(folder)
    data_set = DataSet(LocalFolder(tmp_path), manifest)
    entry = min(manifest.shards, key=lambda shard: shard.file_bytes)
    if manifest.dictionary_sha256:
        shutil.copy(folder / DICTIONARY_NAME, tmp_path)
    intact = (folder / entry.file).read_bytes()
    offsets = frame_offsets(folder, entry)
    # The headers, the index and the tables are few bytes, so they are drawn more often.
    everywhere = st.integers(0, len(intact) - 1)
    delicate = st.one_of(
        st.sampled_from(offsets[:-1]).flatmap(lambda start: st.integers(start, start + 12)),
        st.integers(offsets[-1], len(intact) - 1),
    )

    @settings(max_examples=400)
    @given(place=st.one_of(everywhere, delicate), flips=st.integers(1, 255))
    def damage_a_byte(place: int, flips: int) -> None:
        data = bytearray(intact)
        data[place] ^= flips
        (tmp_path / entry.file).write_bytes(data)
        damage = shard_damage(tmp_path, entry, data_set)
        assert damage
        assert all(entry.file in str(error) for error in damage)

    (tmp_path / entry.file).write_bytes(intact)
    assert shard_damage(tmp_path, entry, data_set) == []
    damage_a_byte()


@pytest.mark.parametrize("name", ["finished", "with_dictionary"])
def test_the_number_of_threads_does_not_change_the_output_of_verify(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "shards"))
    for file in sorted(copied.glob("train-*.zst"))[::2]:
        flip_a_byte(file)
    runs = [
        CliRunner().invoke(verify.main, [str(copied), "--workers", str(workers)])
        for workers in (1, 3)
    ]
    assert runs[0].stderr == runs[1].stderr
    assert [run.exit_code for run in runs] == [31, 31]


def test_verify_accepts_shards_that_need_a_dictionary(with_dictionary: Path) -> None:
    assert CliRunner().invoke(verify.main, [str(with_dictionary)]).exit_code == 0


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, Path.unlink])
def test_a_damaged_dictionary_is_one_error(
    with_dictionary: Path, tmp_path: Path, run_megaback: Run, damage: Callable[[Path], None]
) -> None:
    copied = Path(shutil.copytree(with_dictionary, tmp_path / "shards"))
    damage(copied / DICTIONARY_NAME)
    result = run_megaback("shards", "verify", copied)
    (line,) = result.stderr.splitlines()
    assert (result.returncode, str(copied / DICTIONARY_NAME) in line) == (31, True)


def test_a_shard_of_the_same_ids_compressed_otherwise_is_not_the_one_in_the_manifest(
    finished: Path, with_dictionary: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(with_dictionary, tmp_path / "shards"))
    shutil.copy(finished / "train-00000-00000.zst", copied)
    result = CliRunner().invoke(verify.main, [str(copied)])
    assert result.exit_code == 31
    assert "belongs to another data set" in result.stderr


def test_a_shard_that_cannot_be_opened_does_not_hide_the_others(copy: Path) -> None:
    (copy / "train-00001-00000.zst").unlink()
    (copy / "train-00001-00000.zst").mkdir()
    flip_a_byte(copy / "train-00003-00000.zst")
    stderr = CliRunner().invoke(verify.main, [str(copy)]).stderr
    assert "train-00001-00000.zst" in stderr
    assert "train-00003-00000.zst" in stderr


def test_an_unexpected_error_is_not_reported_as_damage(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_folder: Path, _entry: ShardEntry, _data_set: DataSet) -> list[ShardCorruptError]:
        raise ZeroDivisionError

    monkeypatch.setattr(verify, "shard_damage", fail)
    with pytest.raises(ZeroDivisionError) as caught:
        verify.verify_data_set(finished)
    assert not isinstance(caught.value, MegabackError)


def test_verify_accepts_the_output_of_build(finished: Path, run_megaback: Run) -> None:
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
def test_verify_detects_a_wrong_number_in_the_manifest(
    copy: Path, path: tuple[str | int, ...]
) -> None:
    fields = json.loads((copy / "manifest.json").read_text())
    place = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] += 1
    (copy / "manifest.json").write_text(json.dumps(fields))
    assert CliRunner().invoke(verify.main, [str(copy)]).exit_code == 31


def test_another_tokenizer_beside_the_shards_is_detected(
    copy: Path, tiny_text_folder: Path, tmp_path: Path
) -> None:
    train_tokenizer(str(tiny_text_folder), tmp_path / "other", 400)
    shutil.copy(tmp_path / "other" / "tokenizer.model", copy)
    assert CliRunner().invoke(verify.main, [str(copy)]).exit_code == 32
