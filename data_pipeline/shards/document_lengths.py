"""Document lengths of a data set, in tokens, from the shards' indexes alone.

A distribution is stored as distinct lengths with their numbers of documents, which stays small for
billions of documents, and gives exact quantiles.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.traversal import on_threads

_BAR_WIDTH = 32
_EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Bin:
    """Documents of `low` to `high` tokens, both included: from a power of two to the next."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class DocumentLengths:
    """Distinct lengths in tokens, ascending, and documents of each: int64, shape (lengths,)."""

    lengths: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    @classmethod
    def of(cls, document_tokens: npt.NDArray[np.integer[Any]]) -> "DocumentLengths":
        lengths, documents = np.unique(document_tokens, return_counts=True)
        return cls(lengths.astype(np.int64), documents.astype(np.int64))

    @classmethod
    def joined(cls, parts: list["DocumentLengths"]) -> "DocumentLengths":
        empty: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        lengths, place = np.unique(
            np.concatenate([empty, *(part.lengths for part in parts)]), return_inverse=True
        )
        documents = np.zeros(len(lengths), dtype=np.int64)
        np.add.at(documents, place, np.concatenate([empty, *(part.documents for part in parts)]))
        return cls(lengths, documents)

    @property
    def num_documents(self) -> int:
        return int(self.documents.sum())

    @property
    def tokens(self) -> int:
        return int((self.lengths * self.documents).sum())

    @property
    def mean(self) -> float:
        """Raises ZeroDivisionError when there are no documents."""
        return self.tokens / self.num_documents

    def quantile(self, fraction: float) -> int:
        """Smallest length that at least this fraction of the documents does not exceed."""
        up_to = np.cumsum(self.documents)
        place = int(np.searchsorted(up_to, fraction * up_to[-1], side="left"))
        return int(self.lengths[place])

    def bins(self) -> list[Bin]:
        """Bins from the shortest document's to the longest one's, including empty ones."""
        if not len(self.lengths):
            return []
        exponent = np.frexp(self.lengths)[1] - 1
        bins = []
        for power in range(int(exponent[0]), int(exponent[-1]) + 1):
            here = exponent == power
            documents = self.documents[here]
            tokens = int((self.lengths[here] * documents).sum())
            bins.append(Bin(1 << power, (2 << power) - 1, int(documents.sum()), tokens))
        return bins

    def to_dict(self) -> dict[str, Any]:
        """Figures and bins, for JSON."""
        if not self.num_documents:
            return {"bins": []}
        return {
            "min": int(self.lengths[0]),
            "p5": self.quantile(0.05),
            "median": self.quantile(0.5),
            "mean": self.mean,
            "p95": self.quantile(0.95),
            "max": int(self.lengths[-1]),
            "bins": [vars(piece) for piece in self.bins()],
        }


def read_document_lengths(
    data_set: DataSet, split: str, workers: int | None = None
) -> DocumentLengths:
    """The lengths of a split's documents, markers included. Decodes no frame."""

    def read(entry: ShardEntry) -> DocumentLengths:
        with data_set.open_shard(entry) as reader:
            return DocumentLengths.of(reader.text_tokens())

    entries = data_set.manifest.split(split)
    found = [lengths for _, lengths in on_threads(read, entries, workers, "lengths")]
    return DocumentLengths.joined(found)


def describe(lengths: DocumentLengths) -> list[str]:
    """The distribution as lines of text: figures, then a bar per power of two."""
    if not lengths.num_documents:
        return ["no documents"]
    bins = lengths.bins()
    maximum = max(piece.documents for piece in bins)
    lines = [
        f"min {lengths.lengths[0]:,} · 5% {lengths.quantile(0.05):,} · "
        f"median {lengths.quantile(0.5):,} · mean {lengths.mean:,.1f} · "
        f"95% {lengths.quantile(0.95):,} · max {lengths.lengths[-1]:,}",
        f"{'tokens':>21} {'documents':>13} {'share':>7} {'of tokens':>10}",
    ]
    for piece in bins:
        span = f"{piece.low:,} - {piece.high:,}" if piece.high > piece.low else f"{piece.low:,}"
        lines.append(
            f"{span:>21} {piece.documents:>13,} {piece.documents / lengths.num_documents:>7.2%} "
            f"{piece.tokens / lengths.tokens:>10.2%} {_bar(piece.documents / maximum)}".rstrip()
        )
    return lines


def _bar(fraction: float) -> str:
    """A bar in eighths of a character; at least one of them if not zero."""
    eighths = round(fraction * _BAR_WIDTH * 8) or (fraction > 0)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
