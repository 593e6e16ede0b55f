"""The config of a small run, for tests that need only a config and a folder."""

from pathlib import Path
from typing import Any

from megaback.config import Config


def run_config(run: Path, **sections: Any) -> Config:
    """A run of 25 steps of 4 rows of 64 tokens."""
    return Config.model_validate(
        {
            "run": run,
            "data": {"shards": "shards"},
            "model": {"num_layers": 1, "width": 32, "num_heads": 4},
            "batch": {"context_tokens": 64, "global_batch_rows": 4, "micro_batch_rows": 2},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 25},
            **sections,
        }
    )
