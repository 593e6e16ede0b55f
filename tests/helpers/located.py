"""`megaback locate` on small runs: its results, and the rows that training reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from megaback.config import Config
from megaback.data import open_data
from tests.helpers.batches import Ids
from tools.locate import main

CONTEXT_OF_RUN = 32
BATCH_ROWS = 12


def locate(*arguments: object, text: bytes | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=text)


def located(*arguments: object, text: bytes | None = None) -> list[dict[str, Any]]:
    """The documents that the command found, from its JSON output."""
    result = locate(*arguments, "--json", text=text)
    assert result.exit_code == 0, result.stderr
    documents: list[dict[str, Any]] = json.loads(result.stdout)["documents"]
    return documents


def write_config(path: Path, shards: object, **training: object) -> Path:
    fields = {
        "run": str(path.parent / "run"),
        "data": {"shards": shards, "threads": 0},
        "model": {"num_layers": 1, "width": 16, "num_heads": 1},
        "batch": {
            "context_tokens": CONTEXT_OF_RUN,
            "global_batch_rows": BATCH_ROWS,
            "micro_batch_rows": 1,
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": training or {"epochs": 3.5},
    }
    path.write_text(json.dumps(fields))
    return path


def reader_of(config: Config, world_size: int) -> Callable[[int, int, int], Ids]:
    """`ids(step, position, rank)`: a row as training reads it; steps as in the metrics."""
    ranks = [open_data(config, rank, world_size).training for rank in range(world_size)]
    rank_rows = config.batch.global_batch_rows // world_size

    def ids(step: int, position: int, rank: int) -> Ids:
        assert position // rank_rows == rank
        batches = ranks[rank].at(step - 1)
        assert len(batches) == rank_rows
        return batches[position % rank_rows].ids_T

    return ids
