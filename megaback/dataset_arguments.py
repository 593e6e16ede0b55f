"""Validation of those arguments of `open_dataset` that are not in a config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError


def weighted(shards: str | Path | Mapping[str, float]) -> Any:
    """`shards` in the form of a config. Raises ConfigError for an invalid address."""
    addresses = shards if isinstance(shards, Mapping) else (shards,)
    if not addresses or not all(isinstance(one, str | Path) and str(one) for one in addresses):
        raise ConfigError(
            f"open_dataset: `shards` is of type {type(shards).__name__}, or an address is empty; "
            "give a folder or URL, or a dictionary {address: weight}"
        )
    if isinstance(shards, Mapping):
        if any(isinstance(weight, Mapping) for weight in shards.values()):
            raise ConfigError(
                "open_dataset: a weight of `shards` is a dictionary; weights over training are for "
                "`megaback train`: give a number"
            )
        return [{"path": str(path), "weight": weight} for path, weight in shards.items()]
    return str(shards)


def require_rank(rank: int, world_size: int) -> None:
    """Raises ConfigError unless 0 <= rank < world_size."""
    if not isinstance(rank, int) or not isinstance(world_size, int) or not 0 <= rank < world_size:
        raise ConfigError(
            f"open_dataset: `rank` is {rank!r} and `world_size` is {world_size!r}; give integers "
            "with 0 <= rank < world_size"
        )


def require_flags(**flags: bool) -> None:
    """Raises ConfigError for a value that is not a bool: "no" would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"open_dataset: `{name}` is {value!r}; give True or False")
