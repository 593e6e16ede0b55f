"""What a user can get wrong, as real commands: one sentence, its exit code, nothing left behind.

Each case names what its sentence must hold: the file, the key, the line, the values.
"""

import hashlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import tiny_config, training_environment

from data_pipeline import errors
from data_pipeline.build import build_shards
from data_pipeline.errors import (
    BadRecordError,
    BatchError,
    CheckpointCorruptError,
    CheckpointMissingError,
    ConfigError,
    DirectionMismatchError,
    MegabackError,
    NonFiniteError,
    OutputExistsError,
    PromptError,
    RunMismatchError,
    ShardCorruptError,
    ShardsMissingError,
    SourceEmptyError,
    SourceMissingError,
    SourceUnreadableError,
    StorageError,
    TokenizerError,
    TokenizerMismatchError,
)
from data_pipeline.settings import BuildSettings, WeightedSource
from data_pipeline.text import Direction, TextCodec, Unit
from data_pipeline.tokenizer import MODEL_NAME, train_tokenizer
from tools.convert import convert_full

pytestmark = pytest.mark.slow

_PREFIX = "megaback: error: "
# What a run may leave that ended on its way.
_LEFT_BY_A_RUN = {
    *(".lock", "config.yaml", "metrics.jsonl", "preflight.json", "exit.json", "history.jsonl"),
}

Megaback = Callable[..., "subprocess.CompletedProcess[str]"]


def _build(source: Path, tokenizer: Path, out: Path, **settings: object) -> Path:
    unit = Unit(settings.get("unit", "token"))
    codec = TextCodec.load(tokenizer, Direction.BACKWARD, unit)
    defaults: dict[str, object] = {"val_fraction": 0.1, "frame_tokens": 1024}
    build_shards(
        BuildSettings(
            (WeightedSource(str(source)),),
            codec.format.tokenizer_sha256,
            **{**defaults, **settings},
        ),
        codec,
        out,
        workers=1,
    )
    return out


def _truncated_copy(shards: Path, split: str, out: Path) -> Path:
    shutil.copytree(shards, out)
    (shard,) = out.glob(f"{split}-*.zst")
    shard.write_bytes(shard.read_bytes()[:-700])
    return out


def _damaged_frame_copy(shards: Path, out: Path) -> Path:
    """One byte of the first frame is another: sizes and seek table are as they were."""
    shutil.copytree(shards, out)
    (shard,) = out.glob("train-*.zst")
    data = bytearray(shard.read_bytes())
    data[300] ^= 0xFF
    shard.write_bytes(data)
    return out


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_text_folder: Path,
    tiny_shards: Path,
    tokenizer_path: Path,
    train_one_rank: Megaback,
) -> Path:
    """A folder with everything that the cases get wrong, and what they get right beside it."""
    place = tmp_path_factory.mktemp("place")
    shutil.copy(tokenizer_path, place / "tokenizer.model")
    shutil.copytree(tiny_shards, place / "shards")
    shutil.copytree(tiny_text_folder, place / "text")
    (place / "config.yaml").write_text(yaml.safe_dump(tiny_config(place / "shards")))

    (place / "empty.jsonl").touch()
    (place / "blank.jsonl").write_text('{"text": ""}\n' * 3)
    (place / "bad.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three\n')
    (place / "other_key.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    (place / "cut.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    (place / "unfinished").mkdir()
    (place / "not_a_tokenizer.model").write_bytes(b"nothing like it")

    train_tokenizer(str(place / "text"), place / "other", 500)
    _build(place / "text", place / "other" / MODEL_NAME, place / "other_shards")
    _build(place / "text", place / "tokenizer.model", place / "word_shards", unit="word")
    _build(place / "text", place / "tokenizer.model", place / "more_shards", val_fraction=0.2)
    for split in ("train", "val"):
        _truncated_copy(place / "shards", split, place / f"cut_{split}_shards")
    _damaged_frame_copy(place / "shards", place / "damaged_shards")

    shards = f"data.shards={place / 'shards'}"
    for direction in Direction:
        run, model = place / f"{direction.value}_run", place / f"{direction.value}_model"
        result = train_one_rank(
            run, shards, f"data.direction={direction.value}", "training.steps=2"
        )
        assert result.returncode == 0, result.stderr
        convert_full(run, model, "float32")
    shutil.copytree(place / "backward_run", place / "damaged_run")
    (weights,) = (place / "damaged_run" / "checkpoints").glob("*/weights-00000.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(place / "backward_run", place / "incomplete_run")
    (meta,) = (place / "incomplete_run" / "checkpoints").glob("*/meta.json")
    meta.unlink()
    return place


@dataclass(frozen=True)
class Case:
    """A command in which {place} and {out} stand for folders, and how it is refused.

    `rank` is what a rank runs, by itself: quicker than `train`, which starts two.
    """

    command: str
    kind: type[MegabackError]
    names: tuple[str, ...]


BUILD = "shards build --tokenizer {place}/tokenizer.model --out {out}/shards --source "
TOKENIZER = "tokenizer train --out {out}/tokenizer --source "
TRAIN = "train {place}/config.yaml run={out}/run "
RANK = "rank {place}/config.yaml run={out}/run "
RESUME = "rank {place}/config.yaml run={place}/backward_run training.steps=2 "

CASES = {
    "a source that is not there": Case(
        BUILD + "{place}/none.jsonl", SourceMissingError, ("{place}/none.jsonl",)
    ),
    "a tokenizer's source that is not there": Case(
        TOKENIZER + "{place}/none.jsonl", SourceMissingError, ("{place}/none.jsonl",)
    ),
    "a source without anything": Case(
        BUILD + "{place}/empty.jsonl", SourceEmptyError, ("{place}/empty.jsonl",)
    ),
    "a source of empty documents": Case(
        BUILD + "{place}/blank.jsonl", SourceEmptyError, ("{place}/blank.jsonl", "3")
    ),
    "a tokenizer's source of empty documents": Case(
        TOKENIZER + "{place}/blank.jsonl", SourceEmptyError, ("{place}/blank.jsonl",)
    ),
    "a parquet file that cannot be read": Case(
        BUILD + "{place}/cut.parquet", SourceUnreadableError, ("{place}/cut.parquet",)
    ),
    "bad JSON on a line": Case(
        BUILD + "{place}/bad.jsonl", BadRecordError, ("{place}/bad.jsonl:3:",)
    ),
    "a record without text": Case(
        BUILD + "{place}/other_key.jsonl",
        BadRecordError,
        ("{place}/other_key.jsonl:2:", "'text'"),
    ),
    "a tokenizer that is none": Case(
        "shards build --tokenizer {place}/not_a_tokenizer.model --out {out}/shards "
        "--source {place}/text",
        TokenizerError,
        ("{place}/not_a_tokenizer.model",),
    ),
    "a folder with shards of another tokenizer": Case(
        "shards build --tokenizer {place}/other/tokenizer.model --out {place}/shards "
        "--source {place}/text",
        TokenizerMismatchError,
        ("{place}/shards",),
    ),
    "a folder with shards of the other direction": Case(
        "shards build --tokenizer {place}/tokenizer.model --out {place}/shards "
        "--source {place}/text --direction forward",
        DirectionMismatchError,
        ("{place}/shards", "'backward'", "'forward'"),
    ),
    "a folder that holds something else": Case(
        "shards build --tokenizer {place}/tokenizer.model --out {place}/text --source {place}/text",
        OutputExistsError,
        ("{place}/text",),
    ),
    "shards that are cut short, verified": Case(
        "shards verify {place}/cut_train_shards",
        ShardCorruptError,
        ("{place}/cut_train_shards/train-00000-00000.zst",),
    ),
    "a frame that is damaged, verified": Case(
        "shards verify {place}/damaged_shards",
        ShardCorruptError,
        ("{place}/damaged_shards/train-00000-00000.zst", "frame 0", "byte 0"),
    ),
    "a folder that is not shards, verified": Case(
        "shards verify {place}/unfinished", ShardsMissingError, ("{place}/unfinished",)
    ),
    "a folder that is not shards, inspected": Case(
        "shards inspect {place}/unfinished", ShardsMissingError, ("{place}/unfinished",)
    ),
    "a config that is not there": Case(
        "train {place}/none.yaml", ConfigError, ("{place}/none.yaml",)
    ),
    "a wrong key in the config": Case(
        TRAIN + "optimizer.learning_rat=1",
        ConfigError,
        ("{place}/config.yaml", "optimizer.learning_rat;", "optimizer.learning_rate?"),
    ),
    "a batch that the ranks cannot share": Case(
        TRAIN + "hardware.processes=3", BatchError, ("global_batch_rows 8", "3 ranks")
    ),
    "lanes that do not divide the batch": Case(
        TRAIN + "data.lanes=3", BatchError, ("data.lanes 3", "global_batch_rows 8")
    ),
    "a context that does not divide the frames": Case(
        TRAIN + "batch.context_tokens=96", ConfigError, ("context_tokens is 96", "1024")
    ),
    "training on a folder that is not shards": Case(
        TRAIN + "data.shards={place}/unfinished", ShardsMissingError, ("{place}/unfinished",)
    ),
    "training on shards that are cut short": Case(
        TRAIN + "data.shards={place}/cut_train_shards",
        ShardCorruptError,
        ("{place}/cut_train_shards/train-00000-00000.zst",),
    ),
    "measuring on shards that are cut short": Case(
        TRAIN + "data.shards={place}/cut_val_shards",
        ShardCorruptError,
        ("{place}/cut_val_shards/val-00000-00000.zst",),
    ),
    "training on a frame that is damaged": Case(
        RANK + "data.shards={place}/damaged_shards",
        ShardCorruptError,
        ("{place}/damaged_shards/train-00000-00000.zst", "frame 0", "byte 0"),
    ),
    "a learning rate that breaks the model": Case(
        RANK + "optimizer.learning_rate=1.0e+25 optimizer.warmup_steps=0 guard.max_skipped_steps=0",
        NonFiniteError,
        ("step 2", "optimizer.learning_rate"),
    ),
    "a model that no memory here holds": Case(
        RANK + "model.width=65536 model.num_layers=64 batch.micro_batch_rows=1",
        errors.NotEnoughMemoryError,
        ("GB or more for each of 1 processes", "take a smaller model", "hardware.memory_check=off"),
    ),
    "reading word shards the other way": Case(
        TRAIN + "data.shards={place}/word_shards data.direction=forward",
        DirectionMismatchError,
        ("'forward'", "'backward'", "word"),
    ),
    "going on with shards of another tokenizer": Case(
        RESUME + "data.shards={place}/other_shards",
        TokenizerMismatchError,
        ("{place}/other_shards",),
    ),
    "going on with other shards": Case(
        RESUME + "data.shards={place}/more_shards", RunMismatchError, ("{place}/more_shards",)
    ),
    "going on in the other direction": Case(
        RESUME.replace("rank", "train") + "data.direction=forward",
        DirectionMismatchError,
        ("'backward'", "'forward'"),
    ),
    "going on with another model": Case(
        RESUME + "model.num_layers=3",
        RunMismatchError,
        ("began with model.num_layers = 2, and the config has model.num_layers = 3; use",),
    ),
    "going on with another optimizer": Case(
        RESUME + "optimizer.name=muon",
        RunMismatchError,
        ("began with optimizer.name = adamw, and the config has optimizer.name = muon; use",),
    ),
    "going on from a damaged checkpoint": Case(
        "rank {place}/config.yaml run={place}/damaged_run",
        CheckpointCorruptError,
        ("{place}/damaged_run", "weights-00000.safetensors"),
    ),
    "starting from a model of the other direction": Case(
        RANK + "init_from={place}/forward_model",
        DirectionMismatchError,
        ("{place}/forward_model", "'forward'", "'backward'"),
    ),
    "starting from a model of another shape": Case(
        RANK + "init_from={place}/backward_model model.width=64",
        RunMismatchError,
        ("{place}/backward_model", "width is 32 there and 64 here"),
    ),
    "starting from a folder that is no model": Case(
        RANK + "init_from={place}/unfinished", CheckpointMissingError, ("{place}/unfinished",)
    ),
    "converting a run without a complete checkpoint": Case(
        "convert {place}/incomplete_run --out {out}/model",
        CheckpointMissingError,
        ("{place}/incomplete_run",),
    ),
    "converting a folder that is no run": Case(
        "convert {place}/none --out {out}/model", CheckpointMissingError, ("{place}/none",)
    ),
    "converting a damaged checkpoint": Case(
        "convert {place}/damaged_run --out {out}/model",
        CheckpointCorruptError,
        ("{place}/damaged_run", "weights-00000.safetensors"),
    ),
    "converting into a folder that holds something": Case(
        "convert {place}/backward_run --out {place}/text", OutputExistsError, ("{place}/text",)
    ),
    "sampling from a checkpoint that is not converted": Case(
        "sample {place}/incomplete_run --ending end",
        CheckpointMissingError,
        ("{place}/incomplete_run",),
    ),
    "an ending that is longer than the context": Case(
        "sample {place}/backward_model --ending " + "0123456789" * 10,
        PromptError,
        ("100 tokens", "64"),
    ),
    "a beginning for a backward model": Case(
        "sample {place}/backward_model --beginning once",
        DirectionMismatchError,
        ("{place}/backward_model", "--beginning", "backward", "forward"),
    ),
    "an ending for a forward model": Case(
        "sample {place}/forward_model --ending end",
        DirectionMismatchError,
        ("{place}/forward_model", "--ending", "backward", "forward"),
    ),
    "both an ending and a beginning": Case(
        "sample {place}/forward_model --ending end --beginning once",
        PromptError,
        ("--ending", "--beginning"),
    ),
    "a device that does not exist": Case(
        "sample {place}/backward_model --ending end --device gpu0", errors.BackendError, ("gpu0",)
    ),
}


def run_rank(*words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "megaback.train", *words],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("case", CASES.values(), ids=[name.replace(" ", "_") for name in CASES])
def test_a_mistake_ends_with_one_sentence_and_leaves_nothing(
    case: Case, place: Path, tmp_path: Path, run_megaback: Megaback
) -> None:
    def filled_in(text: str) -> str:
        return text.replace("{place}", str(place)).replace("{out}", str(tmp_path))

    before = _contents(place)

    command, *words = filled_in(case.command).split()
    run = run_rank if command == "rank" else partial(run_megaback, command)
    result = run(*words, env=training_environment())

    output = result.stdout + result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith(_PREFIX)]
    assert len(sentences) == 1, output
    assert "Traceback" not in output
    assert result.returncode == case.kind.exit_code, output
    assert [name for name in case.names if filled_in(name) not in sentences[0]] == [], sentences
    left = {
        path.name
        for path in tmp_path.rglob("*")
        if path.is_file() and path.parent.name != "heartbeats"
    }
    assert left <= (_LEFT_BY_A_RUN if case.command.startswith(("train", "rank")) else set())
    assert _contents(place) == before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_the_disk_refuses_ends_with_one_sentence(
    processes: int, place: Path, tmp_path: Path, run_megaback: Megaback
) -> None:
    """A limit on the size of files stands for a full disk."""
    result = run_megaback(
        *("train", place / "config.yaml", f"run={tmp_path / 'run'}", "training.steps=2"),
        *(f"hardware.processes={processes}", "hardware.preflight=off"),
        env=training_environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )

    output = result.stdout + result.stderr
    assert "Traceback" not in output
    assert result.returncode == StorageError.exit_code, output
    assert len([line for line in output.splitlines() if line.startswith(_PREFIX)]) == 1
    assert not list(tmp_path.rglob("meta.json"))


def test_no_two_kinds_of_error_share_an_exit_code() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, MegabackError)
    ]

    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)


def test_no_exit_code_is_one_that_shells_and_click_use_themselves() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, MegabackError) and kind is not MegabackError
    ]

    kinds.remove(errors.UserInterruptError)  # Ctrl-C has the shell's own code
    assert all(2 < kind.exit_code < 126 for kind in kinds)
