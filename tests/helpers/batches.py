"""Test data sets: shards of given documents, and their expected contents."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st

from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.loader import Stream, TrainingLoader
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.order import Order
from data_pipeline.loading.row_grid import RowGrid
from data_pipeline.loading.rows import RowReader
from data_pipeline.shards.data_set import DataSet as OpenDataSet
from data_pipeline.shards.data_set import LocalFolder
from data_pipeline.shards.manifest import Manifest, ShardEntry
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.codec import Direction, TextFormat, Unit

Ids = npt.NDArray[np.int64]

BEGIN, END = 1, 2
FRAME_TOKENS = 64
CHECKPOINT_TOKENIZER = b"a tokenizer"
CONTEXT_TOKENS = 16  # for tests that do not depend on it
BACKWARD_TOKENS = TextFormat(Direction.BACKWARD, Unit.TOKEN, "5" * 64)


@dataclass
class DataSet:
    """Shards of given documents, and their expected contents."""

    folder: Path
    manifest: Manifest
    frames: list[Ids]

    @property
    def opened(self) -> OpenDataSet:
        return OpenDataSet(LocalFolder(self.folder), self.manifest)

    def store(self, keep_frames: int = 64, *, skip_bad_frames: bool = False) -> FrameStore:
        return FrameStore(
            self.opened,
            "train",
            keep_frames,
            skip_bad_frames=skip_bad_frames,
        )

    def damage(self, frame: int) -> Path:
        """Flip a bit of a frame, numbered over all shards. Returns its file."""
        for entry in self.manifest.shards:
            path = self.folder / entry.file
            with ShardReader(path) as reader:
                if frame < reader.num_frames:
                    first, stop = reader.frame_offsets[frame : frame + 2].tolist()
                    break
                frame -= reader.num_frames
        data = bytearray(path.read_bytes())
        data[(first + stop) // 2] ^= 16
        path.write_bytes(data)
        return path

    def rows(self, context_tokens: int, direction: Direction = Direction.BACKWARD) -> RowReader:
        return RowReader(self.store(), context_tokens, direction)

    def training(
        self,
        store: FrameStore,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_rows: int = 1,
        threads: int = 0,
    ) -> TrainingLoader:
        rows = RowReader(store, CONTEXT_TOKENS, Direction.BACKWARD)
        table, order = self.table_and_order()
        return TrainingLoader(
            [Stream(rows, table, order)],
            Mixture([1.0]),
            order.global_batch_rows,
            rank,
            world_size,
            micro_batch_rows,
            threads,
        )

    def table_and_order(self) -> tuple[RowGrid, Order]:
        table = RowGrid(self.store().shard_tokens, self.manifest.frame_tokens, CONTEXT_TOKENS)
        order = Order(
            num_frames=table.num_frames,
            rows_per_frame=table.rows_per_frame,
            global_batch_rows=12,
            lanes=4,
            seed=1,
            window_frames=2,
        )
        return table, order


def write_data_set(
    folder: Path,
    shards: list[list[Ids]],
    frame_tokens: int = FRAME_TOKENS,
    text_format: TextFormat = BACKWARD_TOKENS,
    begin_id: int = BEGIN,
    end_id: int = END,
) -> DataSet:
    entries, frames = [], []
    for number, documents in enumerate(shards):
        name = f"train-{number:05d}-00000.zst"
        with (folder / name).open("wb") as file:
            writer = ShardWriter(file, text_format.to_dict(), np.dtype("<u2"), frame_tokens)
            for document in documents:
                writer.add(document, text_bytes=len(document))
            entries.append(ShardEntry(name, "train", **asdict(writer.finish())))
        ids = np.concatenate(documents)
        frames += [ids[start : start + frame_tokens] for start in range(0, len(ids), frame_tokens)]
    manifest = Manifest(
        text_format=text_format,
        vocab_size=max(600, 1 + max(int(of_frame.max()) for of_frame in frames)),
        begin_id=begin_id,
        end_id=end_id,
        id_bytes=2,
        frame_tokens=frame_tokens,
        source="test",
        val_fraction=0.0,
        excluded={},
        shards=tuple(entries),
    )
    return DataSet(folder, manifest, frames)


@st.composite
def document_shards(draw: st.DrawFn) -> list[list[Ids]]:
    """One to three shards of documents, markers included, of 2 to about 150 tokens."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    lengths = st.lists(st.one_of(st.integers(0, 6), st.integers(0, 150)), min_size=1, max_size=12)
    return [
        [np.array([BEGIN, *generator.integers(3, 600, length), END]) for length in of_shard]
        for of_shard in draw(st.lists(lengths, min_size=1, max_size=3))
    ]


@contextmanager
def data_set(shards: list[list[Ids]]) -> Iterator[DataSet]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_data_set(Path(folder), shards)


CONTEXTS = st.sampled_from([2, 16, 64])
DIRECTIONS = st.sampled_from(list(Direction))
QUICKLY = settings(max_examples=25)


def some_shards() -> list[list[Ids]]:
    """Two shards of four and two frames, the last frame of each short."""
    generator = np.random.default_rng(4)
    lengths = [[30, 5, 0, 120, 44], [9, 64, 1]]
    return [
        [np.array([BEGIN, *generator.integers(3, 600, length), END]) for length in of_shard]
        for of_shard in lengths
    ]


def mirrored(ids: Ids) -> Ids:
    """The same tokens from their other end, with begin and end markers exchanged."""
    exchanged = {BEGIN: END, END: BEGIN}
    return np.array([exchanged.get(piece_id, piece_id) for piece_id in ids[::-1].tolist()])


def whole_frames(num_frames: int, frames_per_shard: int = 10) -> list[list[Ids]]:
    """Shards of `num_frames` frames in total, each of one document; no token occurs twice."""
    tokens = np.arange(3, 3 + num_frames * (FRAME_TOKENS - 2)).reshape(num_frames, -1)
    documents = [np.array([BEGIN, *of_frame, END]) for of_frame in tokens.tolist()]
    return [
        documents[start : start + frames_per_shard]
        for start in range(0, num_frames, frames_per_shard)
    ]
