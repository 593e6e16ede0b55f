"""The arrow of time: losses of a forward and a backward model on the same documents.

Both score the same windows of each document; the forward model is given the first id of a window,
the backward one the last. A document longer than the context is cut into windows twice, from its
beginning and from its end, with half weight each: reversing every document only exchanges the two
models.

Shapes: N documents, B buckets of context, P parts of a document.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.text.codec import Direction
from megaback.inference.likelihood import Continuation, token_log_probabilities
from megaback.model.gpt import ReverseGPT
from megaback.scoring.paired_difference import Losses
from megaback.tracking.loss_by_context import bucket_of, num_buckets

NUM_PARTS = 10
"""Number of parts of a document, from its beginning to its end."""
_WINDOWS_AT_ONCE = 64

Ids = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Markers:
    """Ids of the markers at the two ends of a document, in reading order."""

    begin_id: int
    end_id: int

    def reversed(self, ids: Ids) -> Ids:
        """Ids in reverse order, with the markers exchanged."""
        flipped = ids[::-1].copy()
        begins, ends = flipped == self.begin_id, flipped == self.end_id
        flipped[begins], flipped[ends] = self.end_id, self.begin_id
        return flipped

    def as_read(self, ids: Ids, direction: Direction) -> Ids:
        """Ids of a text in the order in which a model of this direction reads them."""
        return self.reversed(ids) if direction is Direction.BACKWARD else ids


@dataclass(frozen=True, kw_only=True)
class Window:
    """Ids of a document in text order, at most context_tokens + 1."""

    document: int
    ids: Ids
    start: int
    """Position of its first id in the document."""
    document_tokens: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class DocumentLosses:
    """Sums over the targets of each document."""

    nats_of_context_NB: Sums
    targets_of_context_NB: Sums
    nats_of_part_NP: Sums
    targets_of_part_NP: Sums
    bytes_N: Sums
    """Bytes of text that the targets encode."""

    @property
    def whole(self) -> Losses:
        return Losses(self.nats_of_context_NB.sum(axis=1), self.targets_of_context_NB.sum(axis=1))

    def at_context(self, bucket: int) -> Losses:
        return Losses(self.nats_of_context_NB[:, bucket], self.targets_of_context_NB[:, bucket])

    def at_part(self, part: int) -> Losses:
        return Losses(self.nats_of_part_NP[:, part], self.targets_of_part_NP[:, part])

    @property
    def bits_per_byte(self) -> float:
        nats = float(self.nats_of_context_NB.sum())
        return nats / float(np.log(2)) / max(float(self.bytes_N.sum()), 1.0)


def documents_of(data_set: DataSet, split: str) -> Iterator[Ids]:
    """Documents in text order, markers included. Raises the errors of shards."""
    for entry in data_set.manifest.split(split):
        yield from documents_of_shard(data_set, entry)


def documents_of_shard(data_set: DataSet, entry: ShardEntry) -> Iterator[Ids]:
    """`documents_of` of one shard."""
    manifest = data_set.manifest
    markers = Markers(manifest.begin_id, manifest.end_id)
    with data_set.open_shard(entry) as shard:
        for stored in shard.documents():
            yield markers.as_read(stored.astype(np.int64), manifest.text_format.direction)


def continuation(ids: Ids) -> Continuation:
    """Ids in reading order, of which all but the first are predicted."""
    return Continuation([int(ids[0])], ids[1:].tolist())


def windows_of(number: int, ids: Ids, context_tokens: int) -> list[Window]:
    """Windows of a document for models of this context."""
    first_starts = range(0, len(ids) - 1, context_tokens)
    if len(first_starts) == 1:
        return [Window(document=number, ids=ids, start=0, document_tokens=len(ids), weight=1.0)]
    windows = []
    for start in first_starts:
        stop = start + context_tokens + 1
        windows.append(
            Window(
                document=number,
                ids=ids[start:stop],
                start=start,
                document_tokens=len(ids),
                weight=0.5,
            )
        )
    for last in range(len(ids) - 1, 0, -context_tokens):
        start = max(last - context_tokens, 0)
        windows.append(
            Window(
                document=number,
                ids=ids[start : last + 1],
                start=start,
                document_tokens=len(ids),
                weight=0.5,
            )
        )
    return windows


def measure(
    model: ReverseGPT,
    direction: Direction,
    windows: Sequence[Window],
    context_tokens: int,
    markers: Markers,
    piece_num_bytes: npt.NDArray[np.int64],
    on_windows: Callable[[int], None],
) -> DocumentLosses:
    """Losses of a model of the given direction on the windows.

    `on_windows` is called with the number of windows of each finished batch.
    """
    num_documents = 1 + max(window.document for window in windows)
    of_context_2NB = np.zeros((2, num_documents, num_buckets(context_tokens)))
    of_part_2NP = np.zeros((2, num_documents, NUM_PARTS))
    bytes_N = np.zeros(num_documents)
    # Sorted by length, so that passes hold windows of one length.
    order = sorted(windows, key=lambda window: len(window.ids))
    is_backward = direction is Direction.BACKWARD
    for first in range(0, len(order), _WINDOWS_AT_ONCE):
        at_once = order[first : first + _WINDOWS_AT_ONCE]
        read = [markers.as_read(one.ids, direction) for one in at_once]
        found = token_log_probabilities(model, list(map(continuation, read)))
        for window, ids, log_probabilities_W in zip(at_once, read, found, strict=True):
            nats_W = -window.weight * log_probabilities_W.numpy()
            context_W = np.arange(1, len(ids))
            place_W = window.start + (len(ids) - 1 - context_W if is_backward else context_W)
            for sums_2NX, bin_W in (
                (of_context_2NB, bucket_of(context_W)),
                (of_part_2NP, (2 * place_W + 1) * NUM_PARTS // (2 * window.document_tokens)),
            ):
                np.add.at(sums_2NX[0, window.document], bin_W, nats_W)
                np.add.at(sums_2NX[1, window.document], bin_W, window.weight)
            bytes_N[window.document] += window.weight * piece_num_bytes[ids[1:]].sum()
        on_windows(len(at_once))
    return DocumentLosses(
        nats_of_context_NB=of_context_2NB[0],
        targets_of_context_NB=of_context_2NB[1],
        nats_of_part_NP=of_part_2NP[0],
        targets_of_part_NP=of_part_2NP[1],
        bytes_N=bytes_N,
    )
