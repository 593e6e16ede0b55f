"""`megaback shards recompress`: other files of the same contents, also after kills and failures."""

import json
import resource
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipeline.errors import ConfigError, OutputExistsError, ShardCorruptError
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.shards import recompress as module
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import DICTIONARY_NAME, SPLITS, Manifest, ShardEntry
from data_pipeline.shards.recompress import WORK_FOLDER, recompress, train_dictionary
from data_pipeline.shards.traversal import on_threads
from data_pipeline.shards.verify import verify_data_set
from tests.helpers.builds import Run, hashes
from tests.helpers.stored import document_ids

DICTIONARY_BYTES = 1024
WITH_DICTIONARY = Compression(level=5)


@pytest.fixture(scope="module")
def recompressed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished folder with a dictionary; read-only."""
    out = tmp_path_factory.mktemp("recompressed") / "shards"
    recompress(finished, out, WITH_DICTIONARY, DICTIONARY_BYTES, workers=1)
    return out


@pytest.fixture
def begun(recompressed: Path, tmp_path: Path) -> Path:
    """A copy of the recompressed folder, for tests that damage it."""
    return Path(shutil.copytree(recompressed, tmp_path / "begun"))


def documents(folder: Path) -> dict[str, list[list[int]]]:
    return {
        split: [ids.tolist() for ids in document_ids(DataSet.open(folder), split)]
        for split in SPLITS
    }


@pytest.mark.parametrize(
    ("compression", "dictionary_bytes"),
    [
        (Compression(level=1), None),
        (Compression(level=19), None),
        (Compression(level=3, long_distance=True), None),
        (Compression(level=9), DICTIONARY_BYTES),
    ],
    ids=["fast", "small", "long distance", "dictionary"],
)
def test_recompressing_keeps_the_contents(
    finished: Path, tmp_path: Path, compression: Compression, dictionary_bytes: int | None
) -> None:
    out = tmp_path / "shards"
    manifest, num_found = recompress(finished, out, compression, dictionary_bytes)
    before = Manifest.load(finished)
    assert num_found == 0
    assert Manifest.load(out) == manifest
    assert verify_data_set(out) == manifest
    assert documents(out) == documents(finished)
    assert manifest.fingerprint == before.fingerprint
    as_before = replace(manifest, shards=before.shards, dictionary_sha256=None)
    assert as_before == before
    assert [
        (entry.file, entry.tokens, entry.documents, entry.text_bytes, entry.content_sha256)
        for entry in manifest.shards
    ] == [
        (entry.file, entry.tokens, entry.documents, entry.text_bytes, entry.content_sha256)
        for entry in before.shards
    ]


def test_the_level_of_the_build_gives_the_files_of_the_build(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "shards"
    recompress(finished, out, Compression())
    names = ["tokenizer.model", "manifest.json", *(path.name for path in finished.glob("*.zst"))]
    made, built = hashes(out), hashes(finished)
    assert [name for name in names if made[name] != built[name]] == []


def test_nothing_but_the_data_set_is_copied(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "source")
    (tmp_path / "source" / "notes.txt").write_text("mine")
    recompress(tmp_path / "source", tmp_path / "out", Compression(level=1))
    shards = {entry.file for entry in Manifest.load(finished).shards}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *shards,
        "manifest.json",
        "tokenizer.model",
        WORK_FOLDER,
    }


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_threads_changes_no_byte(
    finished: Path, recompressed: Path, tmp_path: Path, workers: int
) -> None:
    out = tmp_path / "shards"
    recompress(finished, out, WITH_DICTIONARY, DICTIONARY_BYTES, workers)
    assert hashes(out) == hashes(recompressed)


def test_shards_with_a_dictionary_can_be_recompressed_without_one(
    finished: Path, recompressed: Path, tmp_path: Path
) -> None:
    recompress(recompressed, tmp_path / "back", Compression())
    again, built = hashes(tmp_path / "back"), hashes(finished)
    assert DICTIONARY_NAME not in again
    assert {name for name in again if name in built and again[name] != built[name]} == set()


@pytest.mark.skipif(shutil.which("zstd") is None, reason="the zstd command is not installed")
def test_the_zstd_command_reads_a_shard_with_its_dictionary(recompressed: Path) -> None:
    entry = Manifest.load(recompressed).shards[0]
    command = ["zstd", "-dc", "-D", DICTIONARY_NAME, entry.file]
    raw = subprocess.run(command, cwd=recompressed, capture_output=True, check=True).stdout
    with DataSet.open(recompressed).open_shard(entry) as reader:
        assert raw == reader.tokens(0, entry.tokens).tobytes()


def test_training_reads_shards_with_a_dictionary(finished: Path, recompressed: Path) -> None:
    stores = [FrameStore(DataSet.open(folder), "train") for folder in (finished, recompressed)]
    for frame in range(stores[0].num_frames):
        assert stores[0].frame(frame).tolist() == stores[1].frame(frame).tolist()


@pytest.mark.parametrize(
    "lost",
    [
        [],
        ["train-00002-00000.zst"],
        [f"{WORK_FOLDER}/train-00002-00000.zst.json", "val-00001-00000.zst"],
        ["tokenizer.model", *(f"{WORK_FOLDER}/train-0000{n}-00000.zst.json" for n in range(6))],
        [DICTIONARY_NAME],
    ],
    ids=["the manifest alone", "a shard", "a record and a shard", "records", "the dictionary"],
)
def test_an_unfinished_folder_resumes_to_the_same_bytes(
    finished: Path, recompressed: Path, begun: Path, lost: list[str]
) -> None:
    for name in ("manifest.json", *lost):
        (begun / name).unlink()
    (begun / ".train-00002-00000.zst.0123456789ab.partial").write_bytes(b"half")
    stranger = begun / ".scores.jsonl.0123456789ab.partial"
    stranger.write_bytes(b"mine")
    recompress(finished, begun, WITH_DICTIONARY, DICTIONARY_BYTES)
    assert stranger.read_bytes() == b"mine"
    stranger.unlink()
    assert hashes(begun) == hashes(recompressed)


def test_finished_shards_are_not_rewritten(
    finished: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (begun / "manifest.json").unlink()
    lost = sorted(path.name for path in begun.glob("train-00003-*.zst"))
    for name in lost:
        (begun / name).unlink()
    written = []
    do = module._Work.do

    def noting(work: module._Work, entry: ShardEntry) -> ShardEntry:
        written.append(entry.file)
        return do(work, entry)

    monkeypatch.setattr(module._Work, "do", noting)
    monkeypatch.setattr(module, "train_dictionary", None)
    manifest, num_found = recompress(finished, begun, WITH_DICTIONARY, DICTIONARY_BYTES)
    assert sorted(written) == lost
    assert num_found == len(manifest.shards) - len(lost)


def test_another_dictionary_in_an_unfinished_folder_rewrites_all_shards(
    finished: Path, begun: Path
) -> None:
    (begun / "manifest.json").unlink()
    manifest = Manifest.load(finished)
    with DataSet.open(finished).open_shard(manifest.shards[0]) as reader:
        frames = [reader.frame(frame).tobytes() for frame in range(reader.num_frames)]
    (begun / DICTIONARY_NAME).write_bytes(train_dictionary(frames * 8, 512))
    _, num_found = recompress(finished, begun, WITH_DICTIONARY, DICTIONARY_BYTES)
    assert num_found == 0
    verify_data_set(begun)


def test_the_same_command_on_a_finished_folder_changes_nothing(finished: Path, begun: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in begun.glob("*.zst")}
    manifest, num_found = recompress(finished, begun, WITH_DICTIONARY, DICTIONARY_BYTES)
    assert num_found == len(manifest.shards)
    assert {path: path.stat().st_mtime_ns for path in begun.glob("*.zst")} == before


@pytest.mark.parametrize(
    ("compression", "dictionary_bytes"),
    [
        (Compression(level=6), DICTIONARY_BYTES),
        (Compression(level=5, long_distance=True), DICTIONARY_BYTES),
        (WITH_DICTIONARY, 2 * DICTIONARY_BYTES),
        (WITH_DICTIONARY, None),
    ],
    ids=["level", "long distance", "size", "no dictionary"],
)
def test_a_folder_started_with_other_settings_is_not_changed(
    finished: Path, begun: Path, compression: Compression, dictionary_bytes: int | None
) -> None:
    before = hashes(begun)
    with pytest.raises(OutputExistsError, match="other settings"):
        recompress(finished, begun, compression, dictionary_bytes)
    assert hashes(begun) == before


def test_a_folder_with_other_files_is_not_changed(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match="already holds other files"):
        recompress(finished, tmp_path, Compression())
    assert hashes(tmp_path).keys() == {"mine.txt"}


def test_a_data_set_is_not_rewritten_in_place(copy: Path) -> None:
    before = hashes(copy)
    with pytest.raises(OutputExistsError):
        recompress(copy, copy / "." / "", Compression(level=9))
    assert hashes(copy) == before


def test_a_damaged_source_is_named_and_no_partial_file_stays(copy: Path, tmp_path: Path) -> None:
    path = copy / "train-00002-00000.zst"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    out = tmp_path / "out"
    with pytest.raises(ShardCorruptError, match=r"train-00002-00000.zst is damaged: frame \d+ at"):
        recompress(copy, out, Compression(level=9))
    assert not (out / "train-00002-00000.zst").exists()
    assert not (out / "manifest.json").exists()
    assert list(out.glob(".*.partial")) == []


def test_a_source_shard_of_other_contents_is_named(copy: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(copy)
    shards = list(manifest.shards)
    shards[0] = replace(shards[0], content_sha256="0" * 64)
    replace(manifest, shards=tuple(shards)).save(copy)
    with pytest.raises(ShardCorruptError, match=f"{shards[0].file} is intact but not the one"):
        recompress(copy, tmp_path / "out", Compression(level=9))
    assert not (tmp_path / "out" / shards[0].file).exists()


@pytest.mark.parametrize("was_there", [True, False])
def test_too_little_data_for_a_dictionary_is_refused_and_leaves_no_files(
    finished: Path, tmp_path: Path, was_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SAMPLE_FRAMES", 1)
    out = tmp_path / "out"
    if was_there:
        out.mkdir()
    with pytest.raises(ConfigError, match="`dictionary_bytes` is 2048"):
        recompress(finished, out, Compression(), 2048)
    assert (out.exists(), hashes(tmp_path)) == (was_there, {})


def test_a_full_disk_is_one_error_and_the_next_run_resumes(
    finished: Path, tmp_path: Path, run_megaback: Run
) -> None:
    out = tmp_path / "out"
    largest = max(entry.file_bytes for entry in Manifest.load(finished).shards)
    arguments = (
        "shards",
        "recompress",
        finished,
        "--out",
        out,
        "--compression-level",
        "1",
        "--workers",
        "1",
    )
    result = run_megaback(
        *arguments,
        preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (largest * 3 // 4, largest * 3 // 4)
        ),
    )
    (line,) = result.stderr.splitlines()
    assert (result.returncode, line.startswith("megaback: error: cannot read or write")) == (
        74,
        True,
    )
    assert list(tmp_path.rglob("*.partial")) == []
    assert run_megaback(*arguments).returncode == 0
    verify_data_set(out)


def test_the_command_prints_the_ratio(finished: Path, tmp_path: Path, run_megaback: Run) -> None:
    result = run_megaback("shards", "recompress", finished, "--out", tmp_path / "out")
    assert (result.returncode, result.stderr) == (0, "")
    assert Manifest.load(finished).fingerprint in result.stdout
    assert "of the raw ids, before at" in result.stdout


def test_a_dictionary_is_the_same_for_the_same_frames(finished: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        recompress(finished, tmp_path / name, Compression(level=1), DICTIONARY_BYTES)
    dictionaries = [(tmp_path / name / DICTIONARY_NAME).read_bytes() for name in ("one", "two")]
    assert dictionaries[0] == dictionaries[1]
    assert len(dictionaries[0]) <= DICTIONARY_BYTES


def test_an_error_on_one_thread_ends_the_others() -> None:
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.002)
        if number == 3:
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        list(on_threads(work, range(2000), 2, "numbers"))
    assert len(begun) < 2000


def test_a_manifest_without_a_dictionary_field_needs_no_dictionary(copy: Path) -> None:
    fields = json.loads((copy / "manifest.json").read_text())
    del fields["dictionary_sha256"]
    (copy / "manifest.json").write_text(json.dumps(fields))
    verify_data_set(copy)


def test_the_command_refuses_a_level_that_zstd_does_not_have(finished: Path) -> None:
    arguments = [str(finished), "--out", "nowhere", "--compression-level", "23"]
    assert CliRunner().invoke(module.main, arguments).exit_code == 2
