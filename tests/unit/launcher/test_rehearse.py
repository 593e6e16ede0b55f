"""`megaback rehearse`: one rank from the command line, and runs that fail at their size."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from pydantic import TypeAdapter

from data_pipeline.errors import (
    BackendError,
    BatchError,
    CheckpointMissingError,
    ConfigError,
    MegabackError,
    NotEnoughMemoryError,
)
from launcher.rehearse import main, problems_between, shown_checks
from megaback.config import Config
from megaback.planning.search import with_settings
from megaback.rehearsal.report import Ownership, RankReport, RowsCheck
from tests.helpers.tiny_run import tiny_config


@pytest.fixture
def rehearse(tmp_path: Path, tiny_shards: Path) -> Callable[..., Result]:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tiny_shards)))

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, [str(path), *words])

    return run


def test_a_rank_is_rehearsed_beside_the_plan_of_the_shortened_model(
    rehearse: Callable[..., Result],
) -> None:
    words = ["--devices-per-node", "8", "--ranks", "0", "--layers", "1", "--steps", "1"]
    parts = ("batch.sequence_parallel=4", "training.activation_checkpointing=block")
    result = rehearse(*words, "optimizer.name=muon", "zero.stage=3", *parts, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (rank,) = found["ranks"]
    assert found["failures"] == []
    assert (rank["ownership"]["matrices"], rank["owned"]["matrices"]) == (7, 1)
    planned = rank["planned"]["sent_bytes"]
    sent = {one["kind"]: one["sent_bytes"] for one in rank["traffic"] if one["group"] == "engine"}
    assert planned.keys() <= sent.keys()
    assert sent["all-to-all"] == planned["all-to-all"]
    exchanged = [one for one in rank["traffic"] if one["group"] == "node"]
    assert {one["kind"]: one["sent_bytes"] for one in exchanged} == rank["planned"][
        "sent_bytes_within_node"
    ]
    assert [one["calls"] for one in exchanged] == [2 * 3 * 2]  # of 3 passes and 2 micro-batches
    calls = {one["kind"]: one["calls"] for one in rank["traffic"] if one["group"] == "engine"}
    assert rank["planned"]["calls"].keys() == calls.keys()
    assert rank["planned"]["calls_within_node"] == {"all-to-all": 2 * 3 * 2}
    assert (found["rows"]["rows_per_step"], found["rows"]["problems"]) == (8, [])

    planned = rank.pop("planned")["memory_bytes"]
    report = TypeAdapter(RankReport).validate_python(rank)
    assert planned["start"] < report.memory_start_bytes
    assert planned["training"] < report.memory_training_bytes
    assert problems_between([report, report]) == []
    other = replace(report, rank=1, ownership=replace(report.ownership, max_weights=1))
    assert problems_between([report, other]) == ["ranks 0 and 1 partition the weights differently"]


def test_rows_that_ranks_share_and_weights_that_every_node_has_are_reported_as_such(
    tiny_shards: Path,
) -> None:
    config = Config.model_validate(tiny_config(tiny_shards))
    owned = Ownership(
        parameters=100,
        min_weights=20,
        max_weights=30,
        matrices=3,
        ranks_without_matrices=1,
        first_without_matrices=3,
        problems=(),
    )

    def shown(**settings: object) -> list[str]:
        changed = with_settings(config, {key.replace("__", "."): settings[key] for key in settings})
        return [*shown_checks(owned, RowsCheck(steps=2, rows_per_step=8, problems=()), changed)]

    rows = "rows     8 of each of 2 steps, each read by "
    assert shown() == [
        f"{rows}one rank",
        "weights  100, each updated by one rank: 20 to 30 per rank",
        "Muon     3 matrices; 1 ranks orthogonalize none",
    ]
    assert shown(batch__sequence_parallel=2, zero__hierarchical=True) == [
        f"{rows}2 ranks, each of which trains on a part of it",
        "weights  100, each updated by one rank of each node: 20 to 30 per rank",
        "Muon     3 matrices; 1 ranks of each node orthogonalize none",
    ]
    assert shown(zero__hierarchical=True, zero__stage=3) == shown()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--devices-per-node 3", BatchError),
        ("--devices-per-node 2 --ranks 2", ConfigError),
        (
            "--devices-per-node 2 --device-name a100-40gb model.width=65536 model.num_heads=512",
            NotEnoughMemoryError,
        ),
    ],
)
def test_a_run_that_would_fail_is_refused(
    rehearse: Callable[..., Result], words: str, error: type[MegabackError]
) -> None:
    assert rehearse(*words.split()).exit_code == error.exit_code


def test_ranks_that_fail_are_listed_with_those_that_do_not(
    rehearse: Callable[..., Result], tmp_path: Path
) -> None:
    """The first rank alone finds that the run's base does not exist."""
    words = ["--devices-per-node", "2", "--ranks", "0,1", f"init_from={tmp_path / 'none'}"]
    result = rehearse(*words, "--json")
    assert result.exit_code == CheckpointMissingError.exit_code
    found = json.loads(result.stdout)
    assert [(one["rank"], one["exit_code"]) for one in found["failures"]] == [
        (rank, CheckpointMissingError.exit_code) for rank in (0, 1)
    ]
    assert "none" in found["failures"][0]["message"]
    assert (found["ranks"], found["rows"]["problems"]) == ([], [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused_as_by_a_run(rehearse: Callable[..., Result]) -> None:
    result = rehearse("--devices-per-node", "2", "--device", "cuda", "--json")
    assert result.exit_code == BackendError.exit_code
    assert "torch sees no CUDA device" in json.loads(result.stdout)["failures"][1]["message"]
    assert rehearse("--device", "cuda", "--skip-arithmetic").exit_code == ConfigError.exit_code
