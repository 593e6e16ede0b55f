"""What `open_dataset` asks of arguments that no section of a config has."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError


def weighted(shards: str | Path | Mapping[str, float]) -> Any:
    """`shards` as a config has them. Raises ConfigError for what is no address."""
    addresses = shards if isinstance(shards, Mapping) else (shards,)
    if not addresses or not all(isinstance(one, str | Path) and str(one) for one in addresses):
        raise ConfigError(
            f"open_dataset: `shards` is of type {type(shards).__name__}, or an address is missing; "
            "give a folder or URL, or a dictionary {address: weight} of several"
        )
    if isinstance(shards, Mapping):
        return [{"path": str(path), "weight": weight} for path, weight in shards.items()]
    return str(shards)


def require_rank(rank: int, world_size: int) -> None:
    """Raises ConfigError for a rank that is none of that many."""
    if not isinstance(rank, int) or not isinstance(world_size, int) or not 0 <= rank < world_size:
        raise ConfigError(
            f"open_dataset: `rank` is {rank!r} and `world_size` {world_size!r}; a rank is a whole "
            "number from 0 to below that size"
        )


def require_flags(**flags: bool) -> None:
    """Raises ConfigError for what is neither True nor False: "no" would be taken for True."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"open_dataset: `{name}` is {value!r}; it is True or False")
