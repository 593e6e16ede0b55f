"""Horizons of a run with `optimizer.decay_at`: decayed models at several budgets of tokens.

The run itself, the trunk, stays at the peak rate. For each horizon, a branch below its folder
continues the checkpoint at which the horizon's decay begins, and ends at the horizon: it repeats
the run that was planned for that horizon alone. Loads no torch.
"""

from dataclasses import dataclass
from decimal import Decimal
from math import ceil
from pathlib import Path

from data_pipeline.common.next_command import override
from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.run_folder import (
    BRANCHES_FOLDER,
    CHECKPOINTS_FOLDER,
    META_NAME,
    complete_checkpoints,
    newest_checkpoint_step,
    step_name,
)
from megaback.yaml_text import apply_override


@dataclass(frozen=True)
class Horizon:
    """A budget of tokens at which a decayed model is wanted."""

    name: str
    """Number of tokens, as `2e9`: the name of the branch's folder."""
    branch_step: int
    """Number of steps at the peak rate, after which the branch decays."""
    steps: int
    """Number of steps at its end."""

    def run(self, trunk: Path) -> Path:
        """Folder of its branch."""
        return trunk / BRANCHES_FOLDER / self.name

    def checkpoint(self, trunk: Path) -> Path:
        """The trunk's checkpoint that its branch continues."""
        return trunk / CHECKPOINTS_FOLDER / step_name(self.branch_step)


def horizons_of(config: Config) -> tuple[Horizon, ...]:
    """Horizons of a run, in order; none without `optimizer.decay_at`.

    Raises ConfigError for one that is too near for its warmup or decay.
    """
    optimizer, batch = config.optimizer, config.batch
    step_tokens = batch.global_batch_rows * batch.context_tokens
    found: list[Horizon] = []
    for tokens in optimizer.decay_at or ():
        steps = ceil(tokens / step_tokens)
        branch_step = steps - optimizer.decay_steps(steps)
        horizon = Horizon(_name(tokens), branch_step, steps)
        if branch_step < max(optimizer.warmup_steps, 1):
            raise ConfigError(
                f"optimizer.decay_at: {horizon.name} tokens are {steps:,} steps, of which "
                f"{optimizer.decay_steps(steps):,} decay (optimizer.decay_fraction), and "
                f"{branch_step:,} are left for a warmup of {optimizer.warmup_steps:,} and at least "
                "one; use more tokens, a shorter warmup or a shorter decay"
            )
        if found and steps == found[-1].steps:
            raise ConfigError(
                f"optimizer.decay_at: {found[-1].name} and {horizon.name} tokens end at the same "
                f"step, {steps:,}; use horizons that are a step of {step_tokens:,} tokens apart"
            )
        found.append(horizon)
    return tuple(found)


def with_trunk_steps(config: Config) -> Config:
    """A config with the length of its trunk: the steps before the last horizon's decay.

    Raises ConfigError, also for another `training.steps`.
    """
    horizons = horizons_of(config)
    if not horizons:
        return config
    steps = horizons[-1].branch_step
    if config.training.steps not in (None, steps):
        raise ConfigError(
            f"training.steps is {config.training.steps}, but optimizer.decay_at ends the trunk "
            f"after {steps} steps, where the last horizon begins to decay; set training.steps=null"
        )
    return config.model_copy(
        update={"training": config.training.model_copy(update={"steps": steps})}
    )


def branch_overrides(config: Config, horizon: Horizon) -> tuple[str, ...]:
    """Overrides that make the config of a trunk that of a horizon's branch."""
    overrides = [
        override("run", horizon.run(config.run)),
        override("branch_from", horizon.checkpoint(config.run)),
        override("optimizer.decay_at", None),
        override("training.steps", horizon.steps),
    ]
    if config.init_from is not None:
        overrides.append(override("init_from", None))
    copy_to = config.checkpoint.copy_to
    if copy_to is not None:
        place = f"{copy_to.rstrip('/')}/{config.run.resolve().name}-{BRANCHES_FOLDER}"
        overrides.append(override("checkpoint.copy_to", place))
    return tuple(overrides)


def branch_config(trunk: Config, horizon: Horizon) -> Config:
    """The config of a horizon's branch, also before its trunk has a checkpoint."""
    fields = trunk.model_dump(mode="json")
    for one in branch_overrides(trunk, horizon):
        apply_override(fields, one)
    return Config.model_validate(fields)


def require_branch_points(config: Config) -> None:
    """Raises ConfigError for a horizon whose branch cannot begin, as its trunk is past that step.

    So it is for one that was added when the trunk had not kept the checkpoint.
    """
    newest = newest_checkpoint_step(config.run)
    for horizon in horizons_of(config):
        checkpoint = horizon.checkpoint(config.run)
        if newest <= horizon.branch_step or (checkpoint / META_NAME).is_file():
            continue
        if not complete_checkpoints(horizon.run(config.run)):
            raise ConfigError(
                f"optimizer.decay_at: the decay of {horizon.name} tokens begins at step "
                f"{horizon.branch_step:,}, of which {config.run} has no checkpoint, and it is at "
                f"step {newest:,}; remove this horizon, or use another run folder"
            )


def _name(tokens: float) -> str:
    return f"{Decimal(repr(tokens)).normalize():E}".lower().replace("+", "")
