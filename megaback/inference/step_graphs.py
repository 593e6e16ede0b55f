"""The steps of a batch as graphs: a token costs the host two launches, whatever the model's depth.

A graph has fixed shapes and addresses: one serves a number of rows and a number of slots of the
cache, and fewer rows or shorter ones use the next larger. Unused rows have length 0 and stay so.
What the host decides by itself, such as a row that joins, it writes into the same tensors.

Shapes: R slots of the batch, B rows in use, V vocabulary.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from megaback.inference.cuda_graph import Capture, Work
from megaback.inference.decoder import Decoder
from megaback.inference.kv_cache import KeyValueCache

_LOG = logging.getLogger("megaback.inference")
_MIN_SLOTS = 256
"""Fewest slots of a graph: below, attention takes less time than a launch."""
_USES_BEFORE_CAPTURE = 8
"""Capturing costs as much as some tens of steps, and many shapes and options are used briefly."""
_MAX_CHOICES = 64
"""Graphs of choices that are kept, those of the last options."""

_MAX_COUNTED = 1024


class StepGraphs:
    """Graphs of one batch, by what they compute."""

    def __init__(
        self, decoder: Decoder, cache: KeyValueCache, ids_R: Tensor, capture: Capture
    ) -> None:
        """`ids_R`: the last ids of the rows, on the device."""
        self._decoder, self._cache, self._ids_R = decoder, cache, ids_R
        self._capture: Capture | None = capture
        self._logits_RV = torch.zeros(cache.num_rows, decoder.vocab_size, device=decoder.device)
        self._chosen_R = torch.zeros_like(ids_R)
        self._steps: dict[Hashable, Work] = {}
        self._choices: OrderedDict[Hashable, Work] = OrderedDict()
        self._uses: Counter[Hashable] = Counter()
        self.row_sizes = _doubled(1, cache.num_rows)
        self.slot_sizes = _doubled(_MIN_SLOTS, cache.capacity_tokens)

    def prepare(self) -> None:
        """Capture the steps of all shapes, the largest first, whose memory the others use."""
        for rows in reversed(self.row_sizes):
            for slots in reversed(self.slot_sizes):
                if self._capture is not None:
                    self._captured(self._steps, (rows, slots), *self._step(rows, slots))

    def logits(self) -> Tensor:
        """As `Decoder.step`, of the rows in use: shape (B, V), valid until the next step."""
        lengths = self._cache.lengths
        rows = _fitting(len(lengths), self.row_sizes)
        slots = _fitting(max(lengths) + 1, self.slot_sizes)
        self._run(self._steps, (rows, slots), *self._step(rows, slots))
        self._cache.count_token()
        return self._logits_RV[: len(lengths)]

    def choose(
        self,
        options: Hashable,
        compute: Callable[[Tensor], Tensor],
        commit: Callable[[Tensor], None],
    ) -> Tensor:
        """The ids that `compute` returns for logits (B, V) of the last step: shape (B,).

        It is the same function for the same options. `commit` is called with the ids, and changes
        what the next step begins with.
        """
        num_rows = len(self._cache.lengths)
        rows = _fitting(num_rows, self.row_sizes)
        chosen_B, logits_BV = self._chosen_R[:rows], self._logits_RV[:rows]

        def store() -> None:
            chosen_B.copy_(compute(logits_BV))

        self._run(self._choices, (rows, options), store, partial(commit, chosen_B))
        if (rows, options) in self._choices:
            self._choices.move_to_end((rows, options))
        while len(self._choices) > _MAX_CHOICES:
            self._choices.popitem(last=False)
        return self._chosen_R[:num_rows]

    def _step(self, rows: int, slots: int) -> tuple[Work, Work]:
        def compute() -> None:
            view = self._cache.masked_view(rows, slots)
            positions_B = self._cache.positions_of(rows)
            logits_BV = self._decoder.logits(self._ids_R[:rows], positions_B, view)
            self._logits_RV[:rows].copy_(logits_BV)

        return compute, partial(self._cache.advance_on_device, rows)

    def _run(
        self, graphs: "dict[Hashable, Work]", key: Hashable, compute: Work, commit: Work
    ) -> None:
        replay = graphs.get(key)
        if replay is None and self._capture is not None:
            if len(self._uses) > _MAX_COUNTED:  # options of requests are of any number
                self._uses.clear()
            self._uses[key] += 1
            if self._uses[key] > _USES_BEFORE_CAPTURE:
                del self._uses[key]
                replay = self._captured(graphs, key, compute, commit)
        if replay is not None:
            replay()
        else:
            compute()
            commit()

    def _captured(
        self, graphs: "dict[Hashable, Work]", key: Hashable, compute: Work, commit: Work
    ) -> Work | None:
        """The replay of work; None, now and later, if it cannot be captured."""
        assert self._capture is not None
        try:
            graphs[key] = self._capture(compute, commit)
        except RuntimeError as error:  # also a lack of memory
            self._capture = None
            reason = " ".join(str(error).split())
            _LOG.warning(
                "CUDA graphs could not be captured (%.300s); text is written with %d of them, and "
                "slower without; `cuda_graphs=False` does not try",
                reason,
                len(self._steps) + len(self._choices),
            )
            return None
        return graphs[key]


def _doubled(first: int, last: int) -> list[int]:
    """Sizes from the first on, each twice the one before, and the last."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


def _fitting(wanted: int, sizes: list[int]) -> int:
    return next(size for size in sizes if size >= wanted)
