"""Other trainers see the rows of our own loader: the examples, and the Trainer on two ranks."""

import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import megaback
from megaback.data import open_data
from tests.helpers.run_config import run_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONTEXT = 64
STEP_ROWS = 16
RANKS = 2


def own_rows(shards: Path, steps: range, rank: int = 0, world_size: int = 1) -> npt.NDArray[Any]:
    """Ids and targets of our own loader, shape (2, rows, CONTEXT)."""
    batch = {"context_tokens": CONTEXT, "global_batch_rows": STEP_ROWS, "micro_batch_rows": 4}
    section = {"shards": str(shards), "threads": 0}
    training = {"steps": 1, "seed": 1}
    config = run_config(Path("run"), data=section, batch=batch, training=training)
    loader = open_data(config, rank, world_size).training
    rows = [(one.ids_T, one.targets_T) for step in steps for one in loader.at(step)]
    return np.concatenate([np.stack(both) for both in rows], axis=1).reshape(2, -1, CONTEXT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ranks(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows that two real ranks saw."""
    out = tmp_path_factory.mktemp("trainer")
    common = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    common["MASTER_PORT"] = str(free_port())
    command = [sys.executable, "-m", "tests.helpers.trainer_rank", str(tiny_shards), str(out)]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(RANKS)
    ]
    errors = [process.communicate(timeout=200)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(errors)
    return [dict(np.load(out / f"{rank}.npz")) for rank in range(RANKS)]


@pytest.mark.parametrize("way", ["plain", "own part"])
def test_a_plain_loader_on_two_ranks_gives_each_its_part(
    ranks: list[dict[str, Any]], tiny_shards: Path, way: str
) -> None:
    """Also in the Trainer, where it is not passed to Accelerate's `prepare`."""
    for rank, found in enumerate(ranks):
        rows = found[way].reshape(2, -1, CONTEXT)
        steps = range(rows.shape[1] * RANKS // STEP_ROWS)
        np.testing.assert_array_equal(rows, own_rows(tiny_shards, steps, rank, RANKS))


def test_the_trainer_on_one_rank_has_the_rows_of_a_step(
    ranks: list[dict[str, Any]], tiny_shards: Path
) -> None:
    for found in ranks:
        rows = found["example, one rank"].reshape(2, -1, CONTEXT)
        np.testing.assert_array_equal(rows, own_rows(tiny_shards, range(3)))


@pytest.mark.parametrize(
    ("way", "first_step"),
    [
        ("example", 0),
        ("read by every rank", 0),
        ("begun", 0),
        ("resumed", None),
        ("resumed by state", None),
    ],
)
def test_the_trainer_has_each_row_of_a_step_on_one_rank(
    ranks: list[dict[str, Any]], tiny_shards: Path, way: str, first_step: int | None
) -> None:
    """Over epochs, workers and accumulation; and where it resumed."""
    # Ranks take turns, micro-batch by micro-batch.
    rows = np.stack([found[way] for found in ranks], axis=2).reshape(2, -1, CONTEXT)
    if first_step is None:
        first_step = ranks[0]["begun"].shape[1] // 2
    num_steps = rows.shape[1] // STEP_ROWS
    assert num_steps >= 1
    own = own_rows(tiny_shards, range(first_step, first_step + num_steps))
    np.testing.assert_array_equal(rows, own)


def test_the_trainer_without_a_rank_is_refused_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert "`rank` and `world_size` are required with Accelerate" in str(found["refused"])
        assert f"else {rank} and 2" in str(found["refused"])


LOOP = ROOT / "examples/pytorch_loop.py"


def losses(printed: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"step (\d+) loss (\S+)", printed)}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are rounded as in a process of one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_plain_loop_resumes_in_another_process_with_other_workers(
    tiny_shards: Path, tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Across the end of an epoch."""
    train = runpy.run_path(str(LOOP))["train"]
    dataset = megaback.open_dataset(tiny_shards, context_tokens=64, global_batch_rows=16)
    stop, steps = dataset.steps_per_epoch - 1, dataset.steps_per_epoch + 2
    train(str(tiny_shards), tmp_path / "whole.pt", steps, workers=2)
    whole = losses(capsys.readouterr().out)
    train(str(tiny_shards), tmp_path / "parts.pt", stop, workers=0)
    begun = losses(capsys.readouterr().out)
    resumed = subprocess.run(
        [
            sys.executable,
            LOOP,
            tiny_shards,
            tmp_path / "parts.pt",
            f"--steps={steps}",
            "--workers=3",
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert begun | losses(resumed.stdout) == whole
    assert list(losses(resumed.stdout)) == list(range(stop + 1, steps + 1))
    assert float(whole[steps]) < 0.7 * float(whole[1])
