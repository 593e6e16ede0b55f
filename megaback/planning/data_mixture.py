"""Mixture of a run's data sets: its weights over training, limits on repetition, and length.

Everything is known before the first step: which data set is dropped, or ends the run, at which
step, and how often each is read. Loads no torch, and reads no data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from data_pipeline.errors import ConfigError
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.weight_schedule import Limit, Limited, changes_of, limited, mean_shares
from data_pipeline.redaction import shown_url
from megaback.config import Config, TrainingSection
from megaback.config_batch import BatchSection
from megaback.config_data import DataSection, WeightedShards
from megaback.horizons import horizons_of


@dataclass(frozen=True, kw_only=True)
class DataUse:
    """Use of a data set in a run."""

    name: str
    rows: int
    """Number of rows that the run reads: exact, on any number of ranks and after restarts."""
    epochs: float
    share: float
    """Share of all rows of the run."""
    first_share: float
    """Share of the rows at the start."""
    last_share: float
    """Share of the rows at the end."""
    dropped_after_step: int | None
    """Last step that reads it, if it has reached `max_epochs` then."""

    def shown(self) -> str:
        """Shares and epochs, in a few words."""
        share, first, last = (
            f"{one:.1%}" for one in (self.share, self.first_share, self.last_share)
        )
        ends = "" if share == first == last else f" (at first {first}, at last {last})"
        dropped = ""
        if self.dropped_after_step is not None:
            dropped = f", dropped after step {self.dropped_after_step:,}"
        read = f"{self.rows:,} rows, {self.epochs:.2f} epochs"
        return f"{self.name}: {share} of the rows{ends}, {read}{dropped}"


@dataclass(frozen=True, kw_only=True)
class DataMixture:
    """Mixture and length of a run."""

    mixture: Mixture
    total_steps: int
    """Steps of the config, or fewer if `max_epochs` ends the run."""
    uses: tuple[DataUse, ...]
    end_reason: str | None
    """Reason why the run ends before the steps of the config; else None."""


def constant_mixture(section: DataSection) -> Mixture:
    """The mixture of constant weights. Raises ConfigError for anything else."""
    if section.is_changing or any(part.max_epochs is not None for part in section.shards):
        raise ConfigError("weights over training and max_epochs are for training runs only")
    return _first_mixture(section)


def plan_mixture(
    section: DataSection,
    batch: BatchSection,
    training: TrainingSection,
    rows_per_epoch: Sequence[int],
    read_steps: int = 0,
) -> DataMixture:
    """The mixture of a run's data sets, which have these numbers of rows. Raises ConfigError.

    `read_steps`: number of the step of the order that a branch reads at its step 0.

    Positions by fraction are of the steps of the config, also if `max_epochs` ends the run before.
    """
    batch_rows, steps = batch.global_batch_rows, training.steps
    if steps is None:
        rows = rows_until_all_are_read(section, rows_per_epoch)
        steps = ceil((training.epochs or 0.0) * rows / batch_rows)
    else:
        steps += read_steps
    is_fraction, all_rows = section.weight_positions == "fraction", steps * batch_rows

    def row_of(position: float) -> int:
        return round(position * all_rows) if is_fraction else ceil(position / batch.context_tokens)

    found = limited(
        changes_of(section.weights, row_of),
        [_limit(part, rows) for part, rows in zip(section.shards, rows_per_epoch, strict=True)],
        all_rows,
    )
    total_steps, end_reason = steps, None
    if found.end is not None and found.end[0] < all_rows:
        total_steps = found.end[0] // batch_rows
        part = section.shards[found.end[1]]
        end_reason = f"{shown_url(part.path)} has been read {part.max_epochs:g} times (max_epochs)"
        if part.after_max_epochs == "drop" and len(section.shards) > 1:
            end_reason += ", and no other data set has a weight then"
        if not total_steps:
            raise ConfigError(
                f"{shown_url(part.path)} reaches max_epochs within the first step, of "
                f"{batch_rows:,} rows; raise max_epochs, or lower batch.global_batch_rows"
            )
    total_rows = total_steps * batch_rows
    counts = found.mixture.counts(total_rows)
    shares = [count / total_rows for count in counts]
    if not section.is_changing and not found.dropped:
        shares = found.mixture.shares
    return DataMixture(
        mixture=found.mixture,
        total_steps=total_steps - read_steps,
        uses=tuple(
            DataUse(
                name=shown_url(section.shards[number].path),
                rows=counts[number],
                epochs=counts[number] / rows,
                share=shares[number],
                first_share=found.mixture.shares_at(0)[number],
                last_share=found.mixture.shares_at(total_rows - 1)[number],
                dropped_after_step=_last_step(found, number, total_rows, batch_rows, read_steps),
            )
            for number, rows in enumerate(rows_per_epoch)
        ),
        end_reason=end_reason,
    )


def require_data_to_horizons(config: Config, rows_per_epoch: Sequence[int]) -> None:
    """Raises ConfigError if `max_epochs` ends the run before its last horizon."""
    horizons = horizons_of(config)
    if not horizons:
        return
    last = horizons[-1]
    training = config.training.model_copy(update={"steps": last.steps})
    mixed = plan_mixture(config.data, config.batch, training, rows_per_epoch)
    if mixed.end_reason is not None:
        raise ConfigError(
            f"optimizer.decay_at: {last.name} tokens are {last.steps:,} steps, and the data ends "
            f"after {mixed.total_steps:,}, as {mixed.end_reason}; raise max_epochs, or use earlier "
            "horizons"
        )


def rows_until_all_are_read(section: DataSection, rows_per_epoch: Sequence[int]) -> float:
    """Number of rows until every data set has been read to its end, without `max_epochs`.

    Raises ConfigError for weights by tokens, with which it depends on the length of the run.
    """
    if section.is_changing and not section.depends_on_length:
        raise ConfigError(
            "training.epochs has no meaning for weights by tokens, whose shares depend on the "
            "length of the run; set training.steps, or data.weight_positions to fraction"
        )
    changes = section.is_changing
    shares = mean_shares(section.weights) if changes else _first_mixture(section).shares
    return max(rows / share for rows, share in zip(rows_per_epoch, shares, strict=True))


def _first_mixture(section: DataSection) -> Mixture:
    return Mixture([weight.after(0.0) for weight in section.weights])


def _limit(part: WeightedShards, rows_per_epoch: int) -> Limit | None:
    if part.max_epochs is None:
        return None
    rows = max(1, round(part.max_epochs * rows_per_epoch))
    return Limit(rows, ends_run=part.after_max_epochs == "stop")


def _last_step(
    found: Limited, number: int, total_rows: int, batch_rows: int, read_steps: int
) -> int | None:
    """Last step that reads a data set which is dropped within the run; else None."""
    row = found.dropped.get(number)
    if row is None or row >= total_rows:
        return None
    last_row = np.array(found.mixture.counts(row)[number] - 1)
    return int(found.mixture.number_of(number, last_row)) // batch_rows + 1 - read_steps
