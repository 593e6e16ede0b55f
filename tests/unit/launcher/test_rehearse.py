"""`megaback rehearse`: one rank from the command line, and runs that fail at their size."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from data_pipeline.errors import BatchError, ConfigError, MegabackError, NotEnoughMemoryError
from launcher.rehearse import main
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
    result = rehearse(*words, "optimizer.name=muon", "zero.stage=3", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    (rank,) = found["ranks"]
    assert found["parameters"] == rank["ownership"]["parameters"]
    assert (rank["ownership"]["matrices"], rank["owned"]["matrices"]) == (7, 1)
    planned = found["planned"]["sent_bytes"]
    sent = {one["kind"]: one["sent_bytes"] for one in rank["traffic"] if one["group"] == "engine"}
    assert planned.keys() <= sent.keys()
    assert planned["all-to-all"] / 2 < sent["all-to-all"] <= planned["all-to-all"]
    assert (found["rows"]["rows_per_step"], found["rows"]["problems"]) == (8, [])


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
