"""Fixtures of the integration tests: training as real processes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny_run import (
    PlainResult,
    read_run_config,
    tiny_config,
    train_plainly,
    training_environment,
)
from tests.helpers.warm_ranks import WarmRanks
from tools.convert import convert

Run = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def config_path(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """The tiny config as a file."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tiny_shards)))
    return path


def _run(module: tuple[str, ...], config: Path, run: Path, overrides: tuple[str, ...]) -> Run:
    return subprocess.run(
        [sys.executable, "-m", *module, config, f"run={run}", *overrides],
        capture_output=True,
        text=True,
        check=False,
        env=training_environment(),
        timeout=200,
    )


@pytest.fixture(scope="session")
def train(config_path: Path) -> Callable[..., Run]:
    """`train(run, *overrides)`: `megaback train` on the tiny config, as a user would run it."""
    return lambda run, *overrides: _run(("megaback", "train"), config_path, run, overrides)


@pytest.fixture(scope="session")
def train_one_rank(config_path: Path) -> Callable[..., Run]:
    """As `train`, but the one rank itself, without a launcher: the quickest real run."""
    return lambda run, *overrides: _run(("megaback.train",), config_path, run, overrides)


@pytest.fixture(scope="session")
def start_training(config_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """As `train`, but returns while it runs; what it prints goes to `output.txt` in the run."""

    def start(run: Path, *overrides: str) -> subprocess.Popen[str]:
        run.mkdir(parents=True, exist_ok=True)
        with (run / "output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "megaback", "train", config_path, f"run={run}", *overrides],
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env=training_environment(),
            )

    return start


@pytest.fixture(scope="session")
def warm_ranks() -> Iterator[Callable[[int], WarmRanks]]:
    """`warm_ranks(world_size)`: rank processes that are reused for the session."""
    of_size = cache(WarmRanks)
    made = [of_size(size) for size in (1, 2)]
    yield of_size
    for ranks in made:
        ranks.close()


def _finished(ranks: WarmRanks, config: Path, folder: Callable[[], Path]) -> Callable[..., Path]:
    @cache
    def finished(*overrides: str) -> Path:
        run = folder() / "run"
        ranks.train(config, (f"run={run}", *overrides), run / "output.txt")
        return run

    return finished


@pytest.fixture(scope="session")
def run_of(
    tmp_path_factory: pytest.TempPathFactory,
    config_path: Path,
    warm_ranks: Callable[[int], WarmRanks],
) -> Callable[..., Path]:
    """`run_of(*overrides)`: the folder of a finished run, trained once, with its `output.txt`."""
    return _finished(warm_ranks(2), config_path, lambda: tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def lonely_run_of(
    tmp_path_factory: pytest.TempPathFactory,
    config_path: Path,
    warm_ranks: Callable[[int], WarmRanks],
) -> Callable[..., Path]:
    """As `run_of`, of one rank."""
    return _finished(warm_ranks(1), config_path, lambda: tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """`model_of(run)`: the converted model of a finished run, as a folder."""

    @cache
    def converted(run: Path) -> Path:
        out = tmp_path_factory.mktemp("models") / "model"
        convert(run, out, "full", "float32")
        return out

    return converted


@pytest.fixture(scope="session")
def plain(tiny_shards: Path) -> PlainResult:
    """The tiny run as a plain PyTorch loop."""
    return train_plainly(read_run_config(tiny_shards))
