"""Training and validation data of a run: shards checked against the config, with a fixed order.

Loads no torch, so that the launcher can report errors before any rank starts.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.errors import ConfigError
from data_pipeline.loading.document_index import DocumentIndex
from data_pipeline.loading.loader import SequentialRows, Stream, TrainingLoader
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.row_parts import RowPart
from data_pipeline.loading.rows import Batch, RowReader
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import TextCodec, TextFormat
from megaback.branch_order import (
    require_same_data,
    require_steps_left,
    whole_steps,
)
from megaback.branches import BranchPoint, find_branch_point
from megaback.config import Config
from megaback.config_batch import split_batch
from megaback.given_texts import GivenTexts, given_texts
from megaback.open_shards import open_shards, rows_per_epoch
from megaback.planning.data_facts import attended_of
from megaback.planning.data_mixture import (
    DataMixture,
    require_data_to_horizons,
)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training and validation rows of one rank, or its parts of those of a group of ranks."""

    fingerprint: str
    """Fingerprint of the contents of the data set or, with the weights, of all data sets."""
    codec: TextCodec
    text_format: TextFormat
    streams: tuple[Stream, ...]
    mixed: DataMixture
    training: TrainingLoader
    """Whole rows."""
    part: RowPart
    """Part of each row that is the rank's."""
    micro_batch_rows: int
    accumulation_steps: int
    branch: BranchPoint | None
    """Checkpoint that the run continues, if it is a branch."""
    read_steps: int
    """Steps of the order that the run's own steps are later, if it continues the trunk's data; or
    earlier, if it continues the trunk's count of steps alone."""
    val: tuple[RowReader, ...]
    max_val_rows: int | None
    """Limit on the number of rows of all val sets that are measured."""
    given: GivenTexts

    @property
    def mixture(self) -> Mixture:
        return self.mixed.mixture

    @property
    def total_steps(self) -> int:
        return self.mixed.total_steps

    @property
    def has_val(self) -> bool:
        return bool(self.val)

    @property
    def data_sets(self) -> tuple[DataSet, ...]:
        """Data sets, in the order of the config."""
        return tuple(stream.rows.frames.data_set for stream in self.streams)

    @property
    def val_sets(self) -> tuple[DataSet, ...]:
        """Data sets that have a val set, each once."""
        return tuple(rows.frames.data_set for rows in self.val)

    @property
    def num_tokens(self) -> int:
        """Tokens of all train sets."""
        return sum(int(stream.rows.frames.shard_tokens.sum()) for stream in self.streams)

    @property
    def context_tokens(self) -> int:
        return self.streams[0].rows.context_tokens

    @property
    def num_lanes(self) -> int:
        return sum(stream.order.lanes for stream in self.streams)

    def batches_at(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step, from 0. Raises the errors of `training.at`."""
        batches = self.training.at(step + self.read_steps)
        return [self.part.of_batch(batch, self.context_tokens) for batch in batches]

    def rows_by_data_set(self, step: int, batch_rows: int) -> dict[str, dict[str, int]] | None:
        """Rows of each data set at a step, from 0, of a mixture that changes; else None."""
        if self.mixture.is_constant:
            return None
        first = (step + self.read_steps) * batch_rows
        before, after = (self.mixture.counts(row) for row in (first, first + batch_rows))
        rows: Counter[str] = Counter()  # a data set may be in the mixture twice
        for use, start, stop in zip(self.mixed.uses, before, after, strict=True):
            rows[use.name] += stop - start
        return {name: {"rows": count} for name, count in rows.items()}

    def attended_tokens(self) -> float:
        """Mean number of tokens that a token attends to, for FLOPs. Raises ShardCorruptError."""
        return sum(
            use.share
            * attended_of(
                stream.rows.frames.data_set,
                stream.rows.context_tokens,
                are_whole=isinstance(stream.table, DocumentIndex),
            )
            for use, stream in zip(self.mixed.uses, self.streams, strict=True)
        )

    def describe_documents(self) -> list[str]:
        """Contents of rows of whole documents, a line for each data set; none for streams."""
        return [
            f"whole documents of {stream.rows.frames.data_set.name}: "
            f"{stream.table.totals.describe()}"
            for stream in self.streams
            if isinstance(stream.table, DocumentIndex)
        ]

    def describe_val(self) -> str | None:
        """The part of the val sets that is measured; None if that is all, or there is none."""
        if not self.val or self.max_val_rows is None:
            return None
        rows = self._val_rows(0, 1)
        if rows.rows_read == rows.rows_of_split:
            return None
        return (
            f"val set: {rows.rows_read:,} of {rows.rows_of_split:,} rows are measured "
            "(validation.tokens)"
        )

    def _val_rows(self, group: int, groups: int) -> SequentialRows:
        return SequentialRows(
            self.val, group, groups, self.micro_batch_rows, max_rows=self.max_val_rows
        )

    def validation(self, rank: int, world_size: int) -> Iterator[Batch]:
        """A rank's share of what is measured of all val sets."""
        if not self.val:
            return
        rows = self._val_rows(rank // self.part.count, world_size // self.part.count)
        size = self.micro_batch_rows
        for batch in rows.slices(0, rows.num_rows, size, size):
            yield self.part.of_batch(batch, self.context_tokens)


def open_data(
    config: Config, rank: int, world_size: int, branch: BranchPoint | None = None
) -> Data:
    """Open shards, check them against the config, and fix the order. Loads no weights.

    `branch`: point at which the run leaves its trunk. Default: found by the config. Raises the
    errors of data sets and of `find_branch_point`, and a MegabackError for incompatible settings.
    """
    section, batch = config.data, config.batch
    branch = branch or find_branch_point(config)
    shards = open_shards(section)
    streams = shards.streams(batch, config.training.seed, branch)
    if branch is not None:
        require_same_data(
            branch, shards.fingerprint, streams[0].rows.text_format, section.description
        )
    val = shards.val_rows(batch.context_tokens)
    for key in ("patience", "samples"):
        if getattr(config.validation, key) and not val:
            raise ConfigError(
                f"validation.{key} needs a val set, and {section.description} has none; build one "
                f"with `megaback shards build --val-fraction`, or remove validation.{key}"
            )
    folder = config.validation.suite_folder
    if config.validation.suites and folder is not None and not folder.is_dir():
        raise ConfigError(
            f"validation.suite_folder {folder} is not a folder; name one of saved data sets, or "
            "omit it"
        )
    micro_batch_rows, accumulation_steps = split_batch(batch, world_size)
    group, part = divmod(rank, batch.sequence_parallel)
    read_steps = 0 if branch is None else whole_steps(branch, batch) - branch.step
    if branch is not None:
        require_steps_left(branch, config.training, config.training.steps)
    mixed = shards.mixed(batch, config.training, streams, read_steps)
    require_data_to_horizons(config, rows_per_epoch(streams))
    if branch is not None:
        require_steps_left(branch, config.training, mixed.total_steps)
    return Data(
        fingerprint=shards.fingerprint,
        codec=shards.codec,
        text_format=streams[0].rows.text_format,
        streams=streams,
        mixed=mixed,
        training=TrainingLoader(
            streams,
            mixed.mixture,
            batch.global_batch_rows,
            group,
            batch.row_groups(world_size),
            micro_batch_rows,
            section.threads,
        ),
        part=RowPart(part, batch.sequence_parallel),
        micro_batch_rows=micro_batch_rows,
        accumulation_steps=accumulation_steps,
        branch=branch,
        read_steps=read_steps,
        val=val,
        max_val_rows=config.validation.max_rows(batch.context_tokens),
        given=given_texts(
            config,
            shards.codec,
            is_of_examples=shards.data_sets[0].manifest.row_tokens is not None,
        ),
    )
