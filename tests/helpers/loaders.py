"""Data sets and reading parameters for tests of a run's batches."""

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from data_pipeline.loading.document_index import DocumentIndex, open_document_index
from data_pipeline.loading.document_rows import DocumentRowReader
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.loader import Stream, TrainingLoader
from data_pipeline.loading.mixture import Change, Mixture
from data_pipeline.loading.order import Order
from data_pipeline.loading.row_grid import RowGrid
from data_pipeline.loading.rows import IGNORED_TARGET, Batch, RowReader
from data_pipeline.text.codec import Direction
from tests.helpers.batches import (
    DataSet,
    Ids,
    document_shards,
    write_data_set,
)

BATCH_ROWS = 24
WORLD_SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 24])
THREADS = st.integers(0, 4)
BRIEFLY = settings(max_examples=20, deadline=None)


@dataclass(frozen=True)
class Reading:
    """Reading parameters: everything that the batches are a function of."""

    lanes: list[int] = field(default_factory=lambda: [4])
    lane_rows: list[int] = field(default_factory=lambda: [6])
    """Rows per lane in a batch of each data set alone."""
    weights: list[float] = field(default_factory=lambda: [1.0])
    changes: list[Change] = field(default_factory=list)
    context_tokens: int = 16
    window_frames: int = 2
    seed: int = 1
    direction: Direction = Direction.BACKWARD
    forward_share: float | None = None
    """Share of the rows that a model of both directions reads forward."""
    are_whole: bool = False
    """Whether rows are of whole documents."""

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.weights, self.changes)

    def stream(self, number: int, store: FrameStore) -> Stream:
        manifest, both = store.manifest, self.forward_share is not None
        table: RowGrid | DocumentIndex
        if self.are_whole:
            table = open_document_index(store.data_set, "train", self.context_tokens)
            rows: RowReader = DocumentRowReader(store, table, self.direction, both=both)
        else:
            table = RowGrid(store.shard_tokens, manifest.frame_tokens, self.context_tokens)
            rows = RowReader(store, self.context_tokens, self.direction, both=both)
        order = Order(
            num_frames=table.num_frames,
            rows_per_frame=table.rows_per_frame,
            global_batch_rows=self.lanes[number] * self.lane_rows[number],
            lanes=self.lanes[number],
            seed=self.seed,
            window_frames=self.window_frames,
        )
        return Stream(rows, table, order, self.forward_share)


@dataclass
class Corpus:
    """Data sets, and their reading parameters."""

    data_sets: list[DataSet]
    reading: Reading

    def stores(self) -> list[FrameStore]:
        return [data.store(keep_frames=1) for data in self.data_sets]

    def streams(self, stores: list[FrameStore] | None = None) -> list[Stream]:
        return [
            self.reading.stream(number, store)
            for number, store in enumerate(stores or self.stores())
        ]

    def training(
        self,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_rows: int | None = None,
        threads: int = 0,
        stores: list[FrameStore] | None = None,
    ) -> TrainingLoader:
        return TrainingLoader(
            self.streams(stores),
            self.reading.mixture,
            BATCH_ROWS,
            rank,
            world_size,
            micro_batch_rows or BATCH_ROWS // world_size,
            threads,
        )

    def step(self, step: int, world_size: int = 1, threads: int = 0) -> "Joined":
        """A step of ranks that start at it."""
        return joined(
            batch
            for rank in range(world_size)
            for batch in at_steps(self.training(rank, world_size, threads=threads), [step])[0]
        )

    def near_an_epochs_end(self, epoch: int) -> int:
        """A step in which, or shortly after which, a data set begins a new epoch."""
        order = self.streams()[0].order
        return epoch * order.rows_per_epoch // BATCH_ROWS


Joined = dict[str, list[int]]


def joined(batches: Iterable[Batch]) -> Joined:
    """Batches joined into one, which is equal for the same rows, however they are dealt."""
    found: Joined = {name: [] for name in ("ids", "targets", "positions", "starts")}
    found["counts"], found["forward"] = [0, 0, 0], []
    for batch in batches:
        found["starts"] += (batch.cu_seqlens[:-1] + len(found["ids"])).tolist()
        found["ids"] += batch.ids_T.tolist()
        found["targets"] += batch.targets_T.tolist()
        found["positions"] += batch.positions_T.tolist()
        found["counts"][0] += batch.num_targets
        found["counts"][1] += batch.num_skipped_rows
        found["counts"][2] += batch.num_forward_targets
        found["forward"] += [] if batch.is_forward_N is None else batch.is_forward_N.tolist()
    return found


def at_steps(training: TrainingLoader, steps: list[int] | range) -> list[list[Batch]]:
    """The batches of each step; then stops the threads."""
    try:
        return [training.at(step) for step in steps]
    finally:
        training.close()


@st.composite
def readings(draw: st.DrawFn, num_data_sets: int) -> Reading:
    def of_each(values: st.SearchStrategy[Any]) -> Any:
        return draw(st.lists(values, min_size=num_data_sets, max_size=num_data_sets))

    only_last = (*[0.0] * (num_data_sets - 1), 1.0)
    changes = [
        Change(BATCH_ROWS + 7, only_last),
        Change(draw(st.integers(40, 200)), tuple(of_each(st.sampled_from([1.0, 3.0])))),
    ]
    return Reading(
        lanes=of_each(st.integers(1, 6)),
        lane_rows=of_each(st.integers(1, 4)),
        weights=of_each(st.sampled_from([1.0, 2.0, 0.7])),
        changes=draw(st.sampled_from([[], changes])),
        context_tokens=draw(st.sampled_from([4, 16, 64])),
        window_frames=draw(st.integers(1, 4)),
        seed=draw(st.integers(0, 2**63)),
        direction=draw(st.sampled_from(list(Direction))),
        forward_share=draw(st.sampled_from([None, 0.5, 0.3])),
        are_whole=draw(st.booleans()),
    )


@st.composite
def described_corpora(draw: st.DrawFn) -> tuple[list[list[list[Ids]]], Reading]:
    shards = draw(st.lists(document_shards(), min_size=1, max_size=3))
    return shards, draw(readings(len(shards)))


CORPORA = described_corpora()


@contextmanager
def written(described: tuple[list[list[list[Ids]]], Reading]) -> Iterator[Corpus]:
    shards_of, reading = described
    with tempfile.TemporaryDirectory() as folder:
        data_sets = []
        for number, shards in enumerate(shards_of):
            path = Path(folder) / str(number)
            path.mkdir()
            data_sets.append(write_data_set(path, shards))
        yield Corpus(data_sets, reading)


def pairs_of_rows(found: Joined, reading: Reading) -> list[list[tuple[int, int]]]:
    """For each row, (id, target) of every target that is not ignored."""
    pairs = list(zip(found["ids"], found["targets"], strict=True))
    size = reading.context_tokens
    return [
        [pair for pair in pairs[start : start + size] if pair[1] != IGNORED_TARGET]
        for start in range(0, len(pairs), size)
    ]
