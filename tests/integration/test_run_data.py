"""Runs whose data is mixed, damaged or behind a URL, as real processes."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import ShardReader
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.checkpoint import read_meta
from megaback.run_folder import complete_checkpoints
from megaback.tracking.metrics import read_metrics
from tests.helpers.file_server import serving

Run = subprocess.CompletedProcess[str]
LATE_FRAME = 13
STEPS = 12


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


def rows(run: Path) -> list[dict[str, dict[str, int]]]:
    return [line["by_data_set"] for line in read_metrics(run) if "loss" in line]


@pytest.fixture(scope="module")
def other_shards(
    tmp_path_factory: pytest.TempPathFactory,
    english_documents: list[str],
    codec: Callable[..., TextCodec],
) -> Path:
    """A second data set of the same tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": text.upper()}) + "\n" for text in english_documents[:150])
    )
    settings = BuildSettings(
        (WeightedSource(str(folder / "a.jsonl")),),
        codec().format.tokenizer_sha256,
        val_fraction=0.1,
        frame_tokens=1024,
    )
    build_shards(settings, codec(), folder / "shards", workers=1)
    return folder / "shards"


def damage(folder: Path, frame: int) -> None:
    """Change a bit in a frame of the first shard of the train set."""
    path = folder / Manifest.load(folder).split("train")[0].file
    with ShardReader(path) as reader:
        offset = int(reader.frame_offsets[frame]) + 100
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


@pytest.fixture
def damaged_shards(tiny_shards: Path, tmp_path: Path) -> Path:
    """A copy of the data set with one frame of one shard damaged."""
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "damaged"))
    damage(folder, 0)
    return folder


@pytest.mark.slow
def test_a_changing_mixture_gives_two_ranks_and_a_resumed_one_the_losses_of_one(
    train: Callable[..., Run],
    train_one_rank: Callable[..., Run],
    tiny_shards: Path,
    other_shards: Path,
    tmp_path: Path,
) -> None:
    shards = [
        {"path": str(tiny_shards), "weight": {0: 3, 0.3: 0, 0.7: 1}},
        {"path": str(other_shards), "weight_interpolation": "linear", "weight": {0: 1, 1: 4}},
    ]
    overrides = (
        f"data.shards={json.dumps(shards)}",
        *(f"training.steps={STEPS}", f"checkpoint.every_steps={STEPS // 2}"),
    )

    def run(runner: Callable[..., Run], name: str, *more: str) -> None:
        result = runner(tmp_path / name, *overrides, *more)
        assert result.returncode == 0, result.stderr
        assert f"{tiny_shards}: 27.1% of the rows (at first 74." in result.stdout

    run(train_one_rank, "one")
    expected = losses(tmp_path / "one")
    assert [of_step[str(tiny_shards)]["rows"] for of_step in rows(tmp_path / "one")[4:8]] == [0] * 4
    run(train, "two", "hardware.processes=2")
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)
    shutil.rmtree(complete_checkpoints(tmp_path / "two")[-1])
    run(train_one_rank, "two")
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)
    assert rows(tmp_path / "two") == rows(tmp_path / "one")


@pytest.mark.slow
def test_a_damaged_frame_ends_all_ranks_with_one_message_that_names_it(
    train: Callable[..., Run], damaged_shards: Path, tmp_path: Path
) -> None:
    result = train(
        tmp_path / "run", f"data.shards={damaged_shards}", "hardware.processes=2", "data.threads=2"
    )
    said = [line for line in result.stderr.splitlines() if "error:" in line]
    assert (result.returncode, len(said)) == (31, 1), result.stderr
    assert "frame 0 at byte 0" in said[0]


@pytest.mark.slow
def test_steps_before_a_damaged_frame_are_saved(
    train_one_rank: Callable[..., Run], tiny_shards: Path, tmp_path: Path
) -> None:
    folder, run = Path(shutil.copytree(tiny_shards, tmp_path / "damaged")), tmp_path / "run"
    damage(folder, LATE_FRAME)

    result = train_one_rank(run, f"data.shards={folder}", "checkpoint.every_steps=null")

    assert (result.returncode, f"frame {LATE_FRAME} at byte" in result.stderr) == (31, True)
    done = read_metrics(run)[-1]["step"]
    assert done, "the first step met the frame: nothing was there to save"
    assert [read_meta(target).step for target in complete_checkpoints(run)] == [done]
    assert f"the {done} steps before this are saved" in result.stdout


@pytest.mark.slow
def test_a_damaged_frame_is_skipped_and_counted_on_request(
    train: Callable[..., Run], damaged_shards: Path, tmp_path: Path
) -> None:
    result = train(
        tmp_path / "run",
        *(f"data.shards={damaged_shards}", "data.on_bad_frame=skip", "hardware.processes=2"),
    )
    assert result.returncode == 0, result.stderr
    assert "skipped frame" in result.stderr + result.stdout
    assert sum(line.get("skipped_rows", 0) for line in read_metrics(tmp_path / "run")) > 0


@pytest.mark.slow
def test_shards_behind_a_url_give_the_losses_of_a_folder(
    train_one_rank: Callable[..., Run], tiny_shards: Path, tmp_path: Path
) -> None:
    steps = f"training.steps={STEPS}"
    assert train_one_rank(tmp_path / "local", steps).returncode == 0
    with serving() as server:
        for path in tiny_shards.iterdir():
            if path.is_file():
                server.files[f"shards/{path.name}"] = path.read_bytes()
        cache = f"data.cache={tmp_path / 'cache'}"
        fetched = {}
        for name in ("first", "again"):
            before = len(server.requests)
            result = train_one_rank(
                tmp_path / name, f"data.shards={server.url('shards')}", cache, steps
            )
            assert result.returncode == 0, result.stderr
            assert losses(tmp_path / name) == losses(tmp_path / "local")
            fetched[name] = len(server.requests) - before
    assert fetched["again"] < fetched["first"], "frames were fetched that lie in the cache"


@pytest.mark.slow
def test_a_folder_that_is_not_a_cache_is_refused_before_training(
    train: Callable[..., Run], tiny_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with serving() as server:
        for path in tiny_shards.glob("manifest.json"):
            server.files[f"shards/{path.name}"] = path.read_bytes()
        result = train(
            tmp_path / "run",
            *(f"data.shards={server.url('shards')}", f"data.cache={tmp_path / 'mine'}"),
        )
    assert result.returncode == 44, result.stderr
    assert "was not changed" in result.stderr
    assert not (tmp_path / "run").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
