"""Open data sets of a config's `data`: their rows, order and fingerprint. Loads no torch."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.loading.document_index import DocumentIndex, open_document_index
from data_pipeline.loading.document_rows import DocumentRowReader
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.loader import SequentialRows, Stream, TrainingLoader
from data_pipeline.loading.order import MAX_AUTOMATIC_LANES, Order, choose_lanes
from data_pipeline.loading.row_grid import RowGrid
from data_pipeline.loading.rows import Batch, RowReader
from data_pipeline.loading.weight_schedule import peak_shares
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.frame_cache import CacheSettings
from data_pipeline.text.codec import TextCodec
from megaback.branch_order import (
    require_whole_lanes,
    whole_steps,
)
from megaback.branches import BranchPoint
from megaback.config import TrainingSection
from megaback.config_batch import BatchSection
from megaback.config_data import DataSection
from megaback.planning.data_mixture import (
    DataMixture,
    constant_mixture,
    plan_mixture,
    rows_until_all_are_read,
)


@dataclass(frozen=True)
class OpenShards:
    """Open data sets of a config's `data`, compatible with each other."""

    section: DataSection
    data_sets: tuple[DataSet, ...]
    codec: TextCodec

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the contents of the data set or, with the weights, of all data sets."""
        return _fingerprint(self.data_sets, self.section)

    def streams(
        self, batch: BatchSection, seed: int, branch: BranchPoint | None = None
    ) -> tuple[Stream, ...]:
        """Training rows, in order. Raises a MegabackError for incompatible settings."""
        return tuple(
            _stream(data_set, self.section, batch, seed, share, branch)
            for data_set, share in zip(
                self.data_sets, peak_shares(self.section.weights), strict=True
            )
        )

    def mixed(
        self,
        batch: BatchSection,
        training: TrainingSection,
        streams: Sequence[Stream],
        read_steps: int = 0,
    ) -> DataMixture:
        """The mixture of a run's rows, and its length, as of `plan_mixture`. Raises ConfigError."""
        rows = rows_per_epoch(streams)
        return plan_mixture(self.section, batch, training, rows, read_steps)

    @property
    def val_sets(self) -> tuple[DataSet, ...]:
        """Data sets with a val set, each once, also one that is in the mixture twice."""
        different = {data_set.manifest.fingerprint: data_set for data_set in self.data_sets}
        return tuple(one for one in different.values() if one.manifest.split("val"))

    def val_rows(self, context_tokens: int) -> tuple[RowReader, ...]:
        """Validation rows of all val sets."""
        return tuple(
            _reader(FrameStore(data_set, "val"), context_tokens, self.section)
            for data_set in self.val_sets
        )

    def train_rows_of(
        self, batch: BatchSection, seed: int, epochs: float, rank: int, world_size: int
    ) -> "RankRows":
        """Training rows of a rank. Raises a MegabackError for incompatible settings."""
        mixture, streams = constant_mixture(self.section), self.streams(batch, seed)
        loader = TrainingLoader(
            streams, mixture, batch.global_batch_rows, rank, world_size, micro_batch_rows=1
        )
        rows = epochs * rows_until_all_are_read(self.section, rows_per_epoch(streams))
        steps = math.ceil(rows / batch.global_batch_rows)
        return RankRows(
            source=loader,
            world_size=world_size,
            rank_rows=loader.rank_rows,
            steps=steps,
            is_endless=True,
        )

    def val_rows_of(self, batch: BatchSection, rank: int, world_size: int) -> "RankRows":
        """Validation rows of a rank. Raises ConfigError when there is no val set."""
        readers = self.val_rows(batch.context_tokens)
        if not readers:
            raise ConfigError(
                f"{self.section.description} has no val set; build one with "
                "`megaback shards build --val-fraction`"
            )
        rows = SequentialRows(readers, rank, world_size, batch.micro_batch_rows)
        steps = rows.num_rows // batch.micro_batch_rows
        return RankRows(
            source=rows,
            world_size=world_size,
            rank_rows=batch.micro_batch_rows,
            steps=steps,
            is_endless=False,
        )


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """Rows of a rank by number, for third-party trainers; an epoch is a whole number of steps."""

    source: TrainingLoader | SequentialRows
    world_size: int
    rank_rows: int
    """Number of rows per step."""
    steps: int
    """Number of steps per epoch."""
    is_endless: bool
    """Whether the source continues with further epochs after the first."""

    @property
    def num_rows(self) -> int:
        """Number of rows per epoch."""
        return self.steps * self.rank_rows

    def slices(self, epoch: int, first: int, stop: int, size: int, stride: int) -> Iterator[Batch]:
        """Batches as from `TrainingLoader.slices`, with rows counted from the epoch's start."""
        before = epoch * self.num_rows if self.is_endless else 0
        return self.source.slices(before + first, before + stop, size, stride)


def open_shards(section: DataSection) -> OpenShards:
    """Open data sets and check that they are compatible.

    Raises the errors of data sets, and a MegabackError for incompatible ones.
    """
    data_sets = tuple(DataSet.open(part.path, _cache(section)) for part in section.shards)
    first = data_sets[0]
    for other in data_sets[1:]:
        first.manifest.text_format.require_same(
            other.manifest.text_format, f"the data set {first.name}", f"the data set {other.name}"
        )
    if len({data_set.manifest.row_tokens is None for data_set in data_sets}) > 1:
        raise ConfigError(
            f"shards: documents and instruction examples cannot be mixed ({section.description}); "
            "train on one kind after the other"
        )
    codec = first.codec()
    for other in data_sets[1:]:
        other.require_codec(codec)
    return OpenShards(section, data_sets, codec)


def _stream(
    data_set: DataSet,
    section: DataSection,
    batch: BatchSection,
    seed: int,
    share: float,
    branch: BranchPoint | None,
) -> Stream:
    batch_rows = batch.global_batch_rows
    frames = FrameStore(data_set, "train", skip_bad_frames=section.on_bad_frame == "skip")
    rows = _reader(frames, batch.context_tokens, section)
    table: RowGrid | DocumentIndex
    window_frames = section.window_frames
    if section.rows == "documents":
        table = open_document_index(data_set, "train", batch.context_tokens)
        rows = DocumentRowReader(frames, table, section.direction.first, both=section.is_both)
        window_frames = table.window_groups(window_frames, data_set.manifest.frame_tokens)
    else:
        table = RowGrid(frames.shard_tokens, data_set.manifest.frame_tokens, batch.context_tokens)
    order_rows = batch_rows if branch is None else branch.order_rows
    lanes = section.lanes or choose_lanes(table.num_frames, order_rows)
    if branch is not None and batch_rows != order_rows:
        require_whole_lanes(branch, batch_rows, lanes, is_mixture=len(section.shards) > 1)
    missing_rows = 0
    if branch is not None:
        missing_rows = (whole_steps(branch, batch) * batch_rows - branch.rows) // lanes
    if share < 1.0:
        # A step takes `share` of its rows from this data set, plus or minus one: the order uses
        # nearly that number of rows per step, a multiple of the lanes.
        mean_rows = share * batch_rows
        lanes = min(table.num_frames, max(1, round(mean_rows)), MAX_AUTOMATIC_LANES)
        batch_rows = lanes * max(1, round(mean_rows / lanes))
    order = Order(
        num_frames=table.num_frames,
        rows_per_frame=table.rows_per_frame,
        global_batch_rows=batch_rows,
        lanes=lanes,
        seed=seed,
        window_frames=window_frames,
        missing_rows=missing_rows,
    )
    return Stream(rows, table, order, section.share_read_forward)


def _reader(frames: FrameStore, context_tokens: int, section: DataSection) -> RowReader:
    return RowReader(frames, context_tokens, section.direction.first, both=section.is_both)


def rows_per_epoch(streams: Sequence[Stream]) -> list[int]:
    return [stream.order.rows_per_epoch for stream in streams]


def _fingerprint(data_sets: Sequence[DataSet], section: DataSection) -> str:
    """Fingerprint of all that determines the rows of a mixture but the batch and the seed."""
    fingerprints = [data_set.manifest.fingerprint for data_set in data_sets]
    if len(fingerprints) == 1:
        return fingerprints[0]
    limits = [
        None if part.after_max_epochs == "stop" else part.max_epochs for part in section.shards
    ]
    if section.is_changing:
        weights: list[Any] = [asdict(weight) for weight in section.weights]
        contents: list[Any] = [fingerprints, weights, section.weight_positions, limits]
    else:
        contents = list(zip(fingerprints, peak_shares(section.weights), strict=True))
        contents += [limits] if any(limits) else []
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _cache(section: DataSection) -> CacheSettings | None:
    if section.cache is None:
        return None
    return CacheSettings(section.cache, int(section.cache_gb * 1e9))
