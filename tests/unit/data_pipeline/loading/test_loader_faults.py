"""Threads and bad frames: one data set of 40 whole frames of 4 rows, 24 rows per step."""

import threading
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.errors import ShardCorruptError, SourceUnreadableError
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.shards.data_set import DataSet as OpenDataSet
from data_pipeline.shards.reader import ShardReader
from data_pipeline.storage import retries
from tests.helpers.batches import (
    whole_frames,
    write_data_set,
)
from tests.helpers.data_sets import publish
from tests.helpers.file_server import QUICK, serving
from tests.helpers.loaders import (
    Corpus,
    Reading,
    at_steps,
    joined,
    pairs_of_rows,
)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    data = write_data_set(tmp_path, whole_frames(40))
    data.manifest.save(tmp_path)
    return Corpus([data], Reading())


def frames_of(corpus: Corpus, step: int) -> npt.NDArray[np.int64]:
    """The stored frame of each row of a step."""
    (stream,) = corpus.streams()
    places = stream.order.places(step)
    return stream.table.locate(places.frame, places.row)[0]


def a_late_frame(corpus: Corpus) -> tuple[int, int]:
    """A frame that is not needed at first, and the first step that needs it."""
    for step in range(100):
        for frame in frames_of(corpus, step).tolist():
            if step >= 3:
                earlier = {number for before in range(step) for number in frames_of(corpus, before)}
                if frame not in earlier:
                    return frame, step
    raise AssertionError


def a_step_without(corpus: Corpus, frame: int, first: int) -> int:
    return next(step for step in range(first, 100) if frame not in frames_of(corpus, step))


def ours() -> set[threading.Thread]:
    return {one for one in threading.enumerate() if one.name.startswith(("pack", "decode"))}


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_closing_ends_all_threads(corpus: Corpus, threads: int) -> None:
    before = ours()
    training = corpus.training(threads=threads)
    training.at(0)
    assert ours() > before
    training.close()
    assert ours() == before


def test_reading_another_step_leaves_no_thread_behind(corpus: Corpus) -> None:
    before = len(ours())
    training = corpus.training(threads=3)
    for step in (0, 7, 3, 9):
        training.at(step)
    assert len(ours()) - before <= 3
    training.close()


def test_closing_twice_is_allowed(corpus: Corpus) -> None:
    training = corpus.training(threads=2)
    training.at(0)
    training.close()
    training.close()


def test_steps_can_be_read_after_closing(corpus: Corpus) -> None:
    training = corpus.training(threads=2)
    before = at_steps(training, range(3))
    assert list(map(joined, at_steps(training, range(3)))) == list(map(joined, before))


def test_without_threads_none_is_started(corpus: Corpus) -> None:
    before = ours()
    corpus.training(threads=0).at(0)
    assert ours() == before


@pytest.mark.parametrize("threads", [2, 4])
def test_frames_pending_at_a_restart_are_read(
    corpus: Corpus, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = ShardReader.frame
    is_slow = threading.Event()

    def slowly(reader: ShardReader, frame: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        is_slow.wait(0.02)
        return decode(reader, frame)

    monkeypatch.setattr(ShardReader, "frame", slowly)
    found = at_steps(corpus.training(threads=threads), [0, 2, 1, 3])
    monkeypatch.undo()
    assert list(map(joined, found)) == [corpus.step(step) for step in (0, 2, 1, 3)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_steps_before_a_bad_frame_are_unaffected(corpus: Corpus, threads: int) -> None:
    frame, needed_at = a_late_frame(corpus)
    expected = [corpus.step(step) for step in range(needed_at)]
    corpus.data_sets[0].damage(frame)
    found = at_steps(corpus.training(threads=threads), range(needed_at))
    assert list(map(joined, found)) == expected


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_bad_frame_is_named_whenever_its_step_is_read(corpus: Corpus, threads: int) -> None:
    frame, needed_at = a_late_frame(corpus)
    path = corpus.data_sets[0].damage(frame)
    training = corpus.training(threads=threads)
    for step in range(needed_at):
        training.at(step)
    for _ in range(3):
        with pytest.raises(ShardCorruptError, match=rf"{path.name}.* frame {frame % 10} at byte"):
            training.at(needed_at)
    training.close()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_after_an_error_steps_without_the_bad_frame_are_unaffected(
    corpus: Corpus, threads: int
) -> None:
    frame, needed_at = a_late_frame(corpus)
    others = [a_step_without(corpus, frame, needed_at + 1), 0, needed_at - 1]
    expected = [corpus.step(step) for step in others]
    corpus.data_sets[0].damage(frame)
    training = corpus.training(threads=threads)
    with pytest.raises(ShardCorruptError):
        training.at(needed_at)
    assert list(map(joined, at_steps(training, others))) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_stops_the_threads(corpus: Corpus, threads: int) -> None:
    before = ours()
    frame, needed_at = a_late_frame(corpus)
    corpus.data_sets[0].damage(frame)
    with pytest.raises(ShardCorruptError):
        corpus.training(threads=threads).at(needed_at)
    assert ours() == before


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_shard_that_is_missing_is_named_at_the_step_that_needs_it(
    corpus: Corpus, threads: int
) -> None:
    shards = corpus.data_sets[0].manifest.shards
    numbers = [frames_of(corpus, step) // 10 for step in range(10)]
    shard, needed_at = next(
        (shard, step)
        for shard in range(4)
        for step in range(10)
        if shard in numbers[step] and all(shard not in before for before in numbers[:step])
    )
    (corpus.data_sets[0].folder / shards[shard].file).unlink()
    training = corpus.training(threads=threads)
    for step in range(needed_at):
        training.at(step)
    with pytest.raises(ShardCorruptError, match=shards[shard].file):
        training.at(needed_at)
    training.close()


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_rows_of_a_skipped_frame_have_no_targets_and_others_are_unaffected(
    corpus: Corpus, threads: int
) -> None:
    bad = 17
    expected = [pairs_of_rows(corpus.step(step), corpus.reading) for step in range(14)]
    for step, of_step in enumerate(expected):
        for row in np.flatnonzero(frames_of(corpus, step) == bad):
            of_step[row] = []
    corpus.data_sets[0].damage(bad)
    found = at_steps(corpus.training(threads=threads, stores=skipping(corpus)), range(14))
    assert [pairs_of_rows(joined(of_step), corpus.reading) for of_step in found] == expected


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_of_a_skipped_frame_are_counted_by_step(
    corpus: Corpus, threads: int, world_size: int
) -> None:
    bad = 17
    corpus.data_sets[0].damage(bad)
    expected = [int((frames_of(corpus, step) == bad).sum()) for step in range(14)]
    assert sum(expected) == 2 * 4  # two epochs
    of_ranks = [
        at_steps(
            corpus.training(rank, world_size, threads=threads, stores=skipping(corpus)), range(14)
        )
        for rank in range(world_size)
    ]
    of_steps = zip(*of_ranks, strict=True)
    found = [joined(chain.from_iterable(of_step))["counts"][1] for of_step in of_steps]
    assert found == expected


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_frame_skipped_in_every_epoch_is_counted_once(corpus: Corpus, threads: int) -> None:
    corpus.data_sets[0].damage(17)
    stores = skipping(corpus)
    at_steps(corpus.training(threads=threads, stores=stores), range(28))  # four epochs
    assert [store.skipped_frames for store in stores] == [1]


def skipping(corpus: Corpus) -> list[FrameStore]:
    return [data.store(keep_frames=1, skip_bad_frames=True) for data in corpus.data_sets]


def test_an_undamaged_data_set_has_no_skipped_frames(corpus: Corpus) -> None:
    training = corpus.training(stores=skipping(corpus))
    assert [joined(training.at(step))["counts"][1] for step in range(14)] == [0] * 14


@dataclass
class Watched:
    """Records decoded frames, and which of them are still kept."""

    decoded: list[tuple[str, int]] = field(default_factory=list)
    references: list[weakref.ref[Any]] = field(default_factory=list)

    @property
    def num_kept(self) -> int:
        return sum(reference() is not None for reference in self.references)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    found = Watched()
    decode = ShardReader.frame

    def noting(reader: ShardReader, frame: int) -> npt.NDArray[np.unsignedinteger[Any]]:
        ids = decode(reader, frame)
        found.decoded.append((reader.shown, frame))
        found.references.append(weakref.ref(ids))
        return ids

    monkeypatch.setattr(ShardReader, "frame", noting)
    return found


LARGE_LANES, LARGE_WINDOW = 24, 4


@pytest.fixture
def large(tmp_path: Path) -> Corpus:
    """960 frames, 40 per lane of 24."""
    folder = tmp_path / "large"
    folder.mkdir()
    data = write_data_set(folder, whole_frames(960, 240))
    return Corpus([data], Reading([LARGE_LANES], [1], window_frames=LARGE_WINDOW))


@pytest.mark.parametrize("threads", [0, 1, 2, 4])
def test_no_more_frames_are_kept_than_lanes_need(
    large: Corpus, threads: int, watched: Watched
) -> None:
    training = large.training(threads=threads)
    kept = []
    for step in range(160):
        training.at(step)
        kept.append(watched.num_kept)
    training.close()
    # A window per lane, pending frames, and frames in use by threads.
    assert max(kept) <= (LARGE_LANES + 2) * (LARGE_WINDOW + 2) + 2 * (threads + 1)


@pytest.mark.parametrize("threads", [0, 1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 4])
def test_with_threads_every_frame_is_decoded_by_one_rank_once_per_epoch(
    large: Corpus, threads: int, world_size: int, watched: Watched
) -> None:
    num_steps = 160 - 24  # threads are some steps ahead, still in this epoch
    for rank in range(world_size):
        at_steps(large.training(rank, world_size, threads=threads), range(num_steps))
    assert set(Counter(watched.decoded).values()) == {1}


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_a_dead_server_is_an_error_and_a_recovered_one_is_read_again(
    corpus: Corpus, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "POLICY", QUICK)
    (data,) = corpus.data_sets
    expected = [corpus.step(step) for step in range(7)]
    with serving() as server:
        store = FrameStore(OpenDataSet.open(publish(server, data.folder)), "train")
        training = corpus.training(threads=threads, stores=[store])
        assert joined(training.at(0)) == expected[0]
        server.faults.extend(["503"] * 10_000)
        with suppress(SourceUnreadableError):
            for step in range(1, 7):
                assert joined(training.at(step)) == expected[step]
            pytest.fail("all frames came from a dead server")
        server.faults.clear()
        found = at_steps(training, range(7))
    assert list(map(joined, found)) == expected
