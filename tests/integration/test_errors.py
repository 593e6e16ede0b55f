"""User errors, as real commands: one error message, its exit code, no file left.

Each case names what its message must contain: the file, the key, the line, the values.
"""

import hashlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline import errors
from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.errors import (
    MegabackError,
    StorageError,
)
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from tests.helpers.error_cases import CASES, Case
from tests.helpers.tiny_run import tiny_config, training_environment
from tools.convert import convert

pytestmark = pytest.mark.slow

_PREFIX = "megaback: error: "
# Files that an interrupted run may leave.
_LEFT_BY_A_RUN = {
    *(
        ".lock",
        ".start",
        "config.yaml",
        "metrics.jsonl",
        "preflight.json",
        "exit.json",
        "history.jsonl",
    ),
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
    """Change one byte of the first frame; sizes and seek table stay."""
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
    """A folder with every wrong input of the cases, and the right ones."""
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
    (place / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n of somebody")
    (place / "lone").mkdir()
    shutil.copy(tokenizer_path, place / "lone" / "tokenizer.model")
    (place / "not_a_tokenizer.model").write_bytes(b"nothing like it")

    train_tokenizer(str(place / "text"), place / "other", 500)
    _build(place / "text", place / "other" / TOKENIZER_NAME, place / "other_shards")
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
        convert(run, model, "full", "float32")
    copies = place / "copies" / "backward_run"
    (step,) = (place / "forward_run" / "checkpoints").glob("step-*")
    shutil.copytree(step, copies / step.name)
    shutil.copytree(place / "backward_run", place / "damaged_run")
    (weights,) = (place / "damaged_run" / "checkpoints").glob("*/weights-00000.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.copytree(place / "backward_run", place / "incomplete_run")
    (meta,) = (place / "incomplete_run" / "checkpoints").glob("*/meta.json")
    meta.unlink()
    return place


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
def test_a_mistake_ends_with_one_message_and_leaves_no_file(
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
def test_a_checkpoint_that_does_not_fit_the_disk_is_one_error_message(
    processes: int, place: Path, tmp_path: Path, run_megaback: Megaback
) -> None:
    """A limit on file sizes takes the place of a full disk."""
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
