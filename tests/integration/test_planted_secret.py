"""A secret in URLs, used from text to model, appears in no file and no output."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.file_server import FileServer, serving
from tests.helpers.planted import PLANT, files_with_plant, watched_processes
from tests.helpers.tiny_run import tiny_config, training_environment

pytestmark = pytest.mark.slow

Megaback = Callable[..., str]


class Commands:
    """Commands as a user types them, with their own home folder; their output is kept."""

    def __init__(self, folder: Path) -> None:
        self.home, self.said = folder / "home", ""
        self.typed: set[tuple[str, ...]] = set()
        (self.home / "tmp").mkdir(parents=True)
        self._folder = folder
        self._environment = training_environment() | {
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "WANDB_ERROR_REPORTING": "false",
            "MEGABACK_LOG": "debug",
        }

    def __call__(self, *words: object, code: int = 0, **variables: str) -> str:
        """Output of a command that must exit with the given code."""
        line = (sys.executable, "-m", "megaback", *map(str, words))
        self.typed.add(line)
        done = subprocess.run(
            line,
            cwd=self._folder,
            env=self._environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        self.said += done.stdout
        assert done.returncode == code, done.stdout
        return done.stdout


def with_secret(address: str, login: str = PLANT, signature: str = PLANT) -> str:
    return address.replace("://", f"://user:{login}@") + f"?id=7&sig={signature}"


def publish(server: FileServer, folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            server.files[f"{folder.name}/{path.name}"] = path.read_bytes()


def test_a_planted_secret_appears_in_no_file_and_no_output(
    tiny_text_folder: Path, tmp_path: Path
) -> None:
    user, out = tmp_path / "user", tmp_path / "out"
    user.mkdir()
    out.mkdir()
    megaback = Commands(tmp_path / "home of")
    with serving() as server, watched_processes() as seen:
        server.key = PLANT
        server.files["a.jsonl"] = (tiny_text_folder / "a.jsonl").read_bytes()
        server.redirects["circle.jsonl"] = f"/circle.jsonl?sig={PLANT}"
        source = with_secret(server.url("a.jsonl"))
        tokenizer = out / "tokenizer"
        _build(megaback, server, source, tokenizer, out / "shards")
        publish(server, out / "shards")
        shards = with_secret(server.url("shards"))
        config = user / "config.yaml"
        fields = tiny_config(Path(shards)) | {
            "run": str(out / "run"),
            "data": {"shards": shards, "cache": str(out / "cache")},
            "logging": {"wandb": "offline", "tensorboard": "on"},
        }
        config.write_text(yaml.safe_dump(fields))
        _train(megaback, config, shards, out)
    assert seen - megaback.typed == set()
    assert seen  # the command line itself cannot be hidden
    assert PLANT not in megaback.said
    assert files_with_plant([out, megaback.home]) == []
    wandb = b"".join(path.read_bytes() for path in out.rglob("*.wandb"))
    assert server.url("shards").encode() in wandb  # the shown address is there


def _build(
    megaback: Commands, server: FileServer, source: str, tokenizer: Path, shards: Path
) -> None:
    megaback("tokenizer", "train", "--source", source, "--vocab-size", 600, "--out", tokenizer)
    options = ("--tokenizer", tokenizer / "tokenizer.model", "--frame-tokens", 1024)
    options = (*options, "--val-fraction", 0.1, "--out", shards)
    megaback("shards", "plan", "--source", source, "--tasks", 2, *options)
    assert PLANT not in (shards / "plan.json").read_text()
    renewed = with_secret(server.url("a.jsonl"), signature=f"{PLANT}-renewed")
    megaback("shards", "build", "--source", renewed, "--task-index", 0, "--tasks", 2, *options)
    megaback("shards", "build", "--out", shards, code=10)  # has only the plan
    megaback("shards", "build", "--source", renewed, "--workers", 2, *options)
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest["source"] == server.url("a.jsonl?id=7")
    megaback("shards", "inspect", shards)
    # Refusals name the address.
    for other, code in (
        (source.replace("id=7", "id=8"), 44),
        (with_secret(server.url("circle.jsonl")), 22),
        (with_secret(server.url("gone.jsonl")), 20),
    ):
        out = shards if code == 44 else shards.with_name("other")
        said = megaback("shards", "build", "--source", other, *options[:-1], out, code=code)
        assert server.url("") in said
    server.key += "x"
    megaback("tokenizer", "train", "--source", source, "--out", tokenizer / "other", code=22)
    server.key = PLANT


def _train(megaback: Commands, config: Path, shards: str, out: Path) -> None:
    run, short = out / "run", ("training.steps=3", "checkpoint.every_steps=2")
    dry = megaback("submit", config, *short, "--cpu", "--dry-run")
    assert "sbatch" in dry
    megaback("train", config, *short, f"data.shards={shards}")
    assert len(list(run.glob("checkpoints/step-*"))) == 2
    said = megaback("train", run / "config.yaml", "training.steps=4", code=10)
    assert "MEGABACK_SECRET_" in said
    variables = _variables_of(run / "config.yaml", shards)
    alone = ("training.steps=4", "hardware.processes=1")
    megaback("train", run / "config.yaml", *alone, **variables)
    assert len(list(run.glob("checkpoints/step-*"))) == 3
    for words in (("inspect", run), ("status", run), ("plan", config)):
        megaback(*words)
    megaback("convert", run, "--to", "full", "--out", out / "model")
    result = out / "eval.json"
    suite = ("--suite", "bits-per-byte", "--shards", shards)
    megaback("eval", out / "model", *suite, "--out", result)


def _variables_of(config: Path, shards: str) -> dict[str, str]:
    """Variables that a user exports after the error that names the missing ones."""
    from data_pipeline.storage.address_variables import kept

    kept(shards)
    held = {name: value for name, value in os.environ.items() if PLANT in value}
    assert all(name in config.read_text() for name in held)
    return held
