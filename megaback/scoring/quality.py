"""Quality of documents by direction: the loss of a forward less that of a backward model.

After Yu et al., "Reverse Modeling in Large Language Models" (2025, arXiv 2410.09817), who select
the documents with the highest value. Both models score the same windows (directions.py): a document
that fits the context is one window, with both markers, so that both losses are of the same event.

Documents are read in blocks of bounded size, in passes that do not depend on the devices.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np

from data_pipeline.errors import DirectionMismatchError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import Direction
from megaback.inference.device_pool import DevicePool, choose_devices
from megaback.inference.direction_pair import require_pair
from megaback.inference.likelihood import in_packs
from megaback.inference.placement import choose_dtype, dtype_name
from megaback.scoring.directions import Ids, Markers, Window, continuation, windows_of
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import ModelDescription, read_description

_LOG = logging.getLogger("megaback.scoring")

_Carried = TypeVar("_Carried")
_BLOCK_TOKENS = 1 << 18
_BLOCKS_AHEAD = 2
_DIRECTIONS = (Direction.FORWARD, Direction.BACKWARD)


@dataclass(frozen=True, kw_only=True)
class DocumentQuality:
    """Losses of both models on one document, summed over the tokens that each predicts."""

    tokens: int
    """Number of predicted tokens: those of the text and one marker."""
    text_bytes: int
    forward_nats: float
    backward_nats: float

    @property
    def quality(self) -> float:
        """Forward less backward loss, in nats per token."""
        return self._per_token(self.forward_nats) - self._per_token(self.backward_nats)

    def to_dict(self) -> dict[str, Any]:
        """Fields of a record, rounded to the precision of fp32."""
        return {
            "tokens": self.tokens,
            "bytes": self.text_bytes,
            "forward_nats": round(self.forward_nats, 5),
            "backward_nats": round(self.backward_nats, 5),
            "forward_per_token": round(self._per_token(self.forward_nats), 6),
            "backward_per_token": round(self._per_token(self.backward_nats), 6),
            "quality": round(self.quality, 6),
        }

    def _per_token(self, nats: float) -> float:
        return nats / max(self.tokens, 1)


class QualityScorer:
    """Scores documents with a pair of models, on one or several devices.

    Close it, or use it with `with`.
    """

    def __init__(
        self, pools: dict[Direction, DevicePool], data_set: DataSet, context_tokens: int
    ) -> None:
        """`pools`: the model of each direction; `data_set`: the origin of the documents."""
        self._pools = pools
        self._context_tokens = context_tokens
        self._markers = Markers(data_set.manifest.begin_id, data_set.manifest.end_id)
        self._piece_num_bytes = data_set.codec().piece_num_bytes()

    @classmethod
    def load(
        cls,
        forward: str | Path,
        backward: str | Path,
        data_set: DataSet,
        device: str | None = None,
        dtype: str = "auto",
    ) -> "QualityScorer":
        """The models in two folders, runs or checkpoints, for the documents of a data set.

        Windows have the shorter context of the two. `device`: names separated by commas; each
        device has both models. Raises DirectionMismatchError, TokenizerMismatchError,
        BackendError, and the errors of models and shards.
        """
        folders = dict(zip(_DIRECTIONS, map(model_folder, (forward, backward)), strict=True))
        described = {name: read_description(folder) for name, folder in folders.items()}
        _require_usable(described, data_set)
        steps = {one.step for one in described.values()}
        if len(steps) > 1:
            _LOG.warning(
                "the models were trained for %s steps: the quality also has the advantage of the "
                "longer trained one; use a pair of `megaback arrow`",
                " and ".join(f"{one.step:,}" for one in described.values()),
            )
        devices = choose_devices(device)
        on = choose_dtype(dtype, devices[0])
        pools = {name: DevicePool(folder, devices, on) for name, folder in folders.items()}
        return cls(pools, data_set, min(one.context_tokens for one in described.values()))

    @property
    def dtype(self) -> str:
        """Data type of the weights: `float32` or `bfloat16`."""
        return dtype_name(self._pools[Direction.FORWARD].dtype)

    def score(
        self, documents: Iterable[tuple[_Carried, Ids]]
    ) -> Iterator[tuple[_Carried, DocumentQuality]]:
        """Losses of documents in text order, in their order, each with its carried value."""
        running: deque[_Running[_Carried]] = deque()
        for block in self._blocks(documents):
            running.append(self._begin(block))
            if len(running) == _BLOCKS_AHEAD:
                yield from self._finish(running.popleft())
        for one in running:
            yield from self._finish(one)

    def _blocks(
        self, documents: Iterable[tuple[_Carried, Ids]]
    ) -> Iterator["list[_Piece[_Carried]]"]:
        """Lists of windows with about _BLOCK_TOKENS tokens; a document may be in several."""
        block: list[_Piece[_Carried]] = []
        num_tokens = 0
        for carried, ids in documents:
            windows: list[Window | None] = [*windows_of(0, ids, self._context_tokens)]
            windows = windows or [None]
            num_bytes = int(self._piece_num_bytes[ids].sum())
            document = _Document(carried, len(ids) - 1, num_bytes, len(windows))
            for window in windows:
                block.append(_Piece(document, window))
                num_tokens += 0 if window is None else len(window.ids)
                if num_tokens >= _BLOCK_TOKENS:
                    yield block
                    block, num_tokens = [], 0
        if block:
            yield block

    def _begin(self, block: "list[_Piece[_Carried]]") -> "_Running[_Carried]":
        scored = [(piece.document, piece.window) for piece in block if piece.window is not None]
        futures: _Futures = []
        for direction, pool in self._pools.items():
            continuations = [
                continuation(self._markers.as_read(window.ids, direction)) for _, window in scored
            ]
            for numbers in in_packs(continuations):
                future = pool.submit([continuations[number] for number in numbers])
                futures.append((direction, numbers, future))
        return block, scored, futures

    def _finish(self, running: "_Running[_Carried]") -> Iterator[tuple[_Carried, DocumentQuality]]:
        block, scored, futures = running
        nats_2W = {direction: np.zeros(len(scored)) for direction in self._pools}
        for direction, numbers, future in futures:
            nats_2W[direction][numbers] = -np.array(self._pools[direction].result(future))
        for number, (document, window) in enumerate(scored):
            document.forward_nats += window.weight * float(nats_2W[Direction.FORWARD][number])
            document.backward_nats += window.weight * float(nats_2W[Direction.BACKWARD][number])
        for piece in block:
            piece.document.windows_left -= 1
            if not piece.document.windows_left:
                yield piece.document.carried, piece.document.quality()

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> "QualityScorer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@dataclass
class _Document(Generic[_Carried]):
    """Sums of a document while its windows are scored."""

    carried: _Carried
    tokens: int
    text_bytes: int
    windows_left: int
    forward_nats: float = 0.0
    backward_nats: float = 0.0

    def quality(self) -> DocumentQuality:
        return DocumentQuality(
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            forward_nats=self.forward_nats,
            backward_nats=self.backward_nats,
        )


@dataclass(frozen=True)
class _Piece(Generic[_Carried]):
    """A window of a document; None stands for the lack of one in a document of one token."""

    document: _Document[_Carried]
    window: Window | None


_Futures = list[tuple[Direction, list[int], "Future[list[float]]"]]
_Running = tuple[list[_Piece[_Carried]], list[tuple[_Document[_Carried], Window]], _Futures]


def _require_usable(described: dict[Direction, ModelDescription], data_set: DataSet) -> None:
    """Raises DirectionMismatchError or TokenizerMismatchError."""
    forward, backward = (described[name].text_format for name in _DIRECTIONS)
    if forward.both or backward.both:
        raise DirectionMismatchError(
            "documents are scored by two models that were trained alike in one direction each, but "
            "one of these has both; train a pair with data.direction=forward and backward"
        )
    require_pair(forward, backward)
    stored = replace(data_set.manifest.text_format, direction=Direction.FORWARD)
    stored.require_same(forward, data_set.name, "the models")
    if data_set.manifest.row_tokens is not None:
        raise DirectionMismatchError(
            f"{data_set.name} holds instruction examples, which have one direction; score shards "
            "of documents"
        )
