"""Base of a new run: the checkpoint that it continues, or the weights that it starts from.

A local base is verified before the start is accepted. One at a URL is fetched afterwards, into the
run's folder, where it stays until it is loaded.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megaback.checkpoints.fetching import fetch_base
from megaback.config import Config
from megaback.copy_location import BaseCopy, location_of, require_base_copy
from megaback.data import Data
from megaback.distributed.world import World
from megaback.faults.start_fence import Fence
from megaback.origins import Import, WeightsIdentity
from megaback.run_folder import BASE_FOLDER, META_NAME, step_name
from megaback.training.branch import Trunk, open_trunk
from megaback.weights.identity import description_of, identity_of
from megaback.weights.init_from import open_base
from megaback.weights.source import WeightSource


@dataclass(frozen=True)
class RunBase:
    """Beginning of a run: a trunk, or initial weights, or neither for random ones."""

    trunk: Trunk | None = None
    """Checkpoint that a branch continues."""
    weights: WeightSource | None = None
    """Initial weights (`init_from`)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Identity of the base, for the record of the start."""

    @property
    def imported(self) -> Import | None:
        """Origin of the base's first weights, if another program has trained them."""
        if self.trunk is not None:
            return self.trunk[1].imported
        if self.weights is None:
            return None
        description = self.weights.description
        if description.is_foreign and "base" in self.facts:  # on the first rank, which writes it
            return Import(base=WeightsIdentity(**self.facts["base"]), kind="transformers")
        return description.imported


def open_local_base(config: Config, data: Data, world: World) -> RunBase:
    """Verify and open a local base. Collective: ends all ranks if it does not verify or fit."""
    if data.branch is not None:
        if isinstance(config.branch_from, str):
            return RunBase()
        facts = {"branch": data.branch.identity()}
        return RunBase(open_trunk(Path(data.branch.checkpoint), world), facts=facts)
    if isinstance(config.init_from, Path):
        opening = partial(_opener(config, data, world), config.init_from)
        weights = world.run_collectively(opening)
        described = description_of(config.init_from)
        facts = {"base": asdict(identity_of(described))} if world.is_first else {}
        return RunBase(weights=weights, facts=facts)
    return RunBase()


def fetch_remote_base(
    config: Config, data: Data, world: World, fence: Fence, base: RunBase
) -> RunBase:
    """Fetch and open the base if its address is a URL; otherwise `base`. Collective."""
    if data.branch is not None:
        if not isinstance(config.branch_from, str) or base.trunk is not None:
            return base
        location, folder = location_of(config.branch_from)[0], step_name(data.branch.trunk_step)
        copy = BaseCopy(location=location, folder=folder, sha256=data.branch.sha256)
        trunk = world.run_collectively(fetch_base, config.run / BASE_FOLDER, copy, world, fence)
        return RunBase(trunk, facts={"branch": data.branch.identity()})
    if not isinstance(config.init_from, str):
        return base
    named = world.run_collectively(_copy_of, config.init_from, world)
    found = world.of_first(named, BaseCopy | None)
    assert found is not None
    into = config.run / BASE_FOLDER
    target, _ = world.run_collectively(fetch_base, into, found, world, fence)
    opening = partial(_opener(config, data, world), target, address=found.name)
    weights = world.run_collectively(opening)
    identity = replace(identity_of(target / META_NAME), path=found.name)
    return RunBase(weights=weights, facts={"base": asdict(identity)})


def remove_fetched_base(run: Path, world: World) -> None:
    """Remove what was fetched, on the first rank."""
    if world.is_first:
        shutil.rmtree(run / BASE_FOLDER, ignore_errors=True)


def _copy_of(init_from: str, world: World) -> BaseCopy | None:
    return require_base_copy(init_from) if world.is_first else None


def _opener(config: Config, data: Data, world: World) -> Callable[..., WeightSource]:
    """A function that opens a base of this run, of which this rank verifies a part."""
    return partial(
        open_base,
        shape=config.model,
        vocab_size=data.codec.vocab_size,
        text_format=data.text_format,
        run=f"the run on {config.data.description}",
        part=world.rank,
        parts=world.size,
    )
