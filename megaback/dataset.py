"""PyTorch IterableDataset over shards, for third-party trainers, in the order of `megaback train`.

A step is `global_batch_rows` rows, of which each rank reads a contiguous slice. An epoch is a whole
number of steps, the same in every epoch, so that consecutive epochs are the rows of a run. Within a
rank, DataLoader's workers alternate: each yields `micro_batch_rows` rows at a time.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from multiprocessing import context
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from pydantic import ValidationError
from torch.utils.data import IterableDataset, get_worker_info

from data_pipeline.common import number_ranges as ranges
from data_pipeline.errors import ConfigError, RunMismatchError
from data_pipeline.loading.order import ORDER_VERSION, require_order_version
from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from megaback.config import TrainingSection
from megaback.config_batch import BatchSection
from megaback.config_data import DataSection
from megaback.config_messages import sentence
from megaback.dataset_arguments import require_flags, require_rank, weighted
from megaback.open_shards import OpenShards, RankRows, open_shards

State = dict[str, Any]

_TOKENS_AT_A_TIME = 1 << 16


class _Learned(TypedDict):
    input_ids: torch.Tensor
    """Token ids, int64."""
    labels: torch.Tensor
    """Labels in the convention of transformers, int64: `shift_labels` moved right by one. A model
    that receives only these shifts them back, and loses the last target."""
    shift_labels: torch.Tensor
    """Target of each token, int64; -100 where it is ignored. For a loss that does not shift;
    transformers' models prefer these to `labels`."""


class Rows(_Learned, total=False):
    """One row, with tensors of shape (context_tokens,), or packed rows, with shape (1, T)."""

    position_ids: torch.Tensor
    """Positions, int64, which restart at each document and row."""
    cu_seqlens: torch.Tensor
    """Segment bounds of attention, int32, shape (segments + 1,): from 0 to the number of tokens."""
    max_seqlen: int
    """Length of the longest segment, in tokens."""


def open_dataset(
    shards: str | Path | Mapping[str, float],
    *,
    context_tokens: int,
    global_batch_rows: int = 64,
    micro_batch_rows: int | None = None,
    seed: int = 0,
    direction: Literal["backward", "forward", "both"] = "backward",
    split: Literal["train", "val"] = "train",
    epochs: float = 1.0,
    packed: bool = False,
    position_ids: bool = False,
    cu_seqlens: bool = False,
    rank: int | None = None,
    world_size: int | None = None,
    rows: Literal["stream", "documents"] = "stream",
    lanes: int | None = None,
    window_frames: int = 8,
    on_bad_frame: Literal["stop", "skip"] = "stop",
    cache: str | Path | None = None,
    cache_gb: float = 100.0,
) -> "RowDataset":
    """Open shards as a data set for `torch.utils.data.DataLoader`, ordered as in `megaback train`.

    Args:
        shards: folder or URL of a data set that `megaback shards build` wrote, or a dictionary of
            several with their weights.
        context_tokens: tokens per row; divides the shards' frames.
        global_batch_rows: rows per training step, over all ranks. The order of rows depends on it.
        micro_batch_rows: rows that DataLoader takes from a worker at a time, which is its
            batch_size. Required with several workers. With `packed`, rows per item; default: all
            rows of the rank in a step. With split "val", rows assigned to a rank at a time
            (default 1).
        seed: seed of the order.
        direction: reading direction, or both: half of the rows are read in each, as `megaback
            train` does. Shards of unit `token` serve every direction.
        split: "train", or "val" for every row of the val set once, in stored order.
        epochs: length of a pass over the data set. An epoch is rounded up to whole steps.
        packed: yield batches of consecutive rows, for DataLoader's batch_size=None.
        position_ids, cu_seqlens: optional keys of `Rows` to include; `cu_seqlens` adds
            `max_seqlen` too.
        rank, world_size: position in the data-parallel group. Default: from torch.distributed, else
            from the variables RANK and WORLD_SIZE, else 0 and 1. Use 0 and 1 when the trainer
            distributes rows over ranks itself, as transformers' Trainer and Accelerate's `prepare`
            do.
        rows, lanes, window_frames, on_bad_frame, cache, cache_gb: as in the `data` section of a
            config.

    Raises:
        ConfigError: for an invalid value, BatchError if a step is not divisible by the ranks;
            ShardsMissingError, ShardCorruptError, SourceUnreadableError, DirectionMismatchError,
            TokenizerMismatchError and others of `megaback.errors` for the shards. Iterating raises
            ShardCorruptError and SourceUnreadableError.
    """
    require_flags(packed=packed, position_ids=position_ids, cu_seqlens=cu_seqlens)
    if not isinstance(cache, str | Path | None):
        raise ConfigError(f"open_dataset: `cache` is {cache!r}; give a folder or None")
    try:
        section = DataSection(
            shards=weighted(shards),
            direction=direction,  # type: ignore[arg-type] # pydantic converts the string
            rows=rows,
            lanes=lanes,
            window_frames=window_frames,
            on_bad_frame=on_bad_frame,
            cache=None if cache is None else Path(cache),
            cache_gb=cache_gb,
        )
        batch = BatchSection(
            context_tokens=context_tokens,
            global_batch_rows=global_batch_rows,
            micro_batch_rows=1 if micro_batch_rows is None else micro_batch_rows,
        )
        training = TrainingSection(epochs=epochs, seed=seed)
    except ValidationError as error:
        raise ConfigError(f"open_dataset: {sentence(error, DataSection)}") from None
    if split not in ("train", "val"):
        raise ConfigError(f"open_dataset: `split` is {split!r}; give 'train' or 'val'")
    if (rank is None) != (world_size is None):
        raise ConfigError("open_dataset: give `rank` and `world_size` together, or neither")
    if rank is not None and world_size is not None:
        require_rank(rank, world_size)
    return RowDataset(
        section,
        batch,
        training,
        split=split,
        micro_batch_rows=None if micro_batch_rows is None else batch.micro_batch_rows,
        packed=packed,
        position_ids=position_ids,
        cu_seqlens=cu_seqlens,
        rank=rank,
        world_size=world_size,
    )


class RowDataset(IterableDataset[Rows]):
    """The data set of `open_dataset`. Pickling drops its open shards, which are reopened on use."""

    def __init__(
        self,
        section: DataSection,
        batch: BatchSection,
        training: TrainingSection,
        *,
        split: str,
        micro_batch_rows: int | None,
        packed: bool,
        position_ids: bool,
        cu_seqlens: bool,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        self._section = section
        self._batch = batch
        self._training = training
        self._split = split
        self._micro_batch_rows = micro_batch_rows
        self._is_packed = packed
        self._has_positions = position_ids
        self._has_segments = cu_seqlens
        self._rank = rank
        self._world_size = world_size
        # In shared memory: persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._resume: _Position | None = None
        self._position: _Position | None = None
        self._opened: OpenShards | None = None
        self._cached: tuple[tuple[int, int, int], RankRows] | None = None
        self._rows()  # raises for invalid arguments

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_opened": None, "_cached": None}
        if context.get_spawning_popen() is not None:  # for a worker, which has no process group
            state["_rank"], state["_world_size"] = self._place()
        return state

    @property
    def vocab_size(self) -> int:
        """Number of pieces of the tokenizer, above all ids."""
        return self._shards().data_sets[0].manifest.vocab_size

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per pass, each of `global_batch_rows` rows over all ranks."""
        return self._rows().steps

    @property
    def epoch(self) -> int:
        """The epoch that the next pass reads."""
        return int(self._epoch)

    def __len__(self) -> int:
        """Number of items per pass of this rank, over all of its workers."""
        rows = self._rows()
        size = (self._micro_batch_rows or rows.rank_rows) if self._is_packed else 1
        return -(-rows.num_rows // size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next pass reads; without this, every pass reads the same one.

        Raises ConfigError for an epoch before that of a loaded state.
        """
        if (problem := ranges.COUNT_OR_ZERO.problem(epoch)) is not None:
            raise ConfigError(f"set_epoch: `epoch` is {epoch}, which is {problem}")
        if self._resume is not None and self._resume.epoch != epoch:
            if epoch < self._resume.epoch:
                raise ConfigError(
                    f"set_epoch: the loaded state is in epoch {self._resume.epoch}, after epoch "
                    f"{epoch}; resume from that epoch (with Accelerate: "
                    f"loader.set_epoch({self._resume.epoch})), or open the data set again"
                )
            self._resume = None
        self._position = None
        self._epoch.fill_(epoch)

    def state_dict(self) -> State:
        """Position of this copy of the data set, as JSON; for torchdata's StatefulDataLoader.

        Copies in workers read ahead of training, and the copy in the main process does not advance.
        With torch's DataLoader, save `state_at(step)` instead.
        """
        rows = self._rows()
        position = self._position or self._resume or _Position(self.epoch, 0)
        step, row = divmod(position.row, rows.rank_rows)
        state = self.state_at(position.epoch * rows.steps + step)
        state |= {"epoch": position.epoch, "row": row, "world_size": rows.world_size}
        if position.worker is not None:
            state["worker"] = list(position.worker)
        return state

    def state_at(self, step: int) -> State:
        """State from which the next step is `step`, counted over all epochs from 0.

        It is the same for every rank and worker, and can be loaded with another number of them.
        Raises ConfigError for an invalid step.
        """
        if (problem := ranges.COUNT_OR_ZERO.problem(step)) is not None:
            raise ConfigError(f"state_at: `step` is {step!r}, which is {problem}")
        step = int(step)  # json cannot encode numpy's integers
        rows = self._rows()
        return {
            "epoch": step // rows.steps,
            "step": step,
            "row": 0,
            "world_size": rows.world_size,
            "order": self._order(rows),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start the next pass at the position of a state; it ends with the state's epoch.

        Raises RunMismatchError for a state of other rows or another order, or one that another
        number of ranks saved within a step; ConfigError for an invalid state.
        """
        rows = self._rows()
        try:
            epoch, step, row = (int(state[key]) for key in ("epoch", "step", "row"))
            order, world_size = (
                {"version": 1, "rows": "stream", **state["order"]},
                int(state["world_size"]),
            )
            worker = state.get("worker")
            worker = None if worker is None else (int(worker[0]), int(worker[1]))
            if any(ranges.COUNT_OR_ZERO.problem(one) for one in (epoch, step, row)):
                raise ValueError("not a position in a data set")
        except (KeyError, TypeError, ValueError, IndexError, OverflowError):
            raise ConfigError(
                "load_state_dict: `state` is not a state of open_dataset's data set; with "
                "torchdata, load the state of a StatefulDataLoader into a StatefulDataLoader"
            ) from None
        require_order_version(order["version"], "load_state_dict: the state")
        for name, here in self._order(rows).items():
            if order.get(name) != here:
                raise RunMismatchError(
                    f"load_state_dict: the state was saved with {name} {order.get(name)!r}, but "
                    f"the data set was opened with {here!r}; open it with the same arguments"
                )
        if row and world_size != rows.world_size:
            raise RunMismatchError(
                f"load_state_dict: the state was saved within a step by {world_size} ranks, but "
                f"there are {rows.world_size} now; save it between steps (state_at), or resume "
                "with the same number of ranks"
            )
        in_worker = get_worker_info()
        if worker is not None and (
            in_worker is None or worker != (in_worker.id, in_worker.num_workers)
        ):
            raise RunMismatchError(
                f"load_state_dict: the state is that of worker {worker[0]} of {worker[1]}; load "
                f"the state of the StatefulDataLoader with {worker[1]} workers, or use state_at"
            )
        if not epoch * rows.steps <= step <= (epoch + 1) * rows.steps:
            epoch = step // rows.steps  # `epochs` was another when the state was saved
        within = (step - epoch * rows.steps) * rows.rank_rows + row
        self._resume, self._position = _Position(epoch, within, worker), None
        # At an epoch's end, set_epoch may have been called for the next one.
        if in_worker is None and (within < rows.num_rows or self.epoch < epoch):
            self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Rows]:
        """Yield one pass. Raises ShardCorruptError or SourceUnreadableError at an affected row."""
        rows = self._rows()
        info = get_worker_info()
        turn = None if info is None or info.num_workers == 1 else (info.id, info.num_workers)
        size = self._micro_batch_rows
        if size is None and self._is_packed:
            size = rows.rank_rows
        if size is None and turn is not None:
            raise ConfigError(
                f"open_dataset: `micro_batch_rows` is required with {turn[1]} workers, to keep "
                "rows in order; set it to the DataLoader's batch_size"
            )
        if size is None:
            size = max(1, _TOKENS_AT_A_TIME // self._batch.context_tokens)
        resume, self._resume = self._resume, None
        start = resume or _Position(self.epoch, 0)
        if turn is not None and start.worker is None:
            if start.row % size:
                raise RunMismatchError(
                    f"load_state_dict: the state was saved within a batch of {size} rows; resume "
                    "with at most one worker, or save it between steps (state_at)"
                )
            start = _Position(start.epoch, start.row + turn[0] * size)
        self._position = _Position(start.epoch, min(start.row, rows.num_rows), turn)
        return self._items(rows, start, size, turn)

    def _items(
        self, rows: RankRows, start: "_Position", size: int, turn: tuple[int, int] | None
    ) -> Iterator[Rows]:
        """Yield this worker's items from `start` on, alternating every `size` rows."""
        stride = size * (1 if turn is None else turn[1])
        row, stop = start.row, rows.num_rows
        rest = -row % size  # of a partially read batch
        following = row + rest + (stride - size if rest else 0)
        batches = chain(
            rows.slices(start.epoch, row, min(row + rest, stop), rest, rest) if rest else (),
            rows.slices(start.epoch, following, stop, size, stride),
        )
        context_tokens = self._batch.context_tokens
        for batch in batches:
            num_rows = len(batch.ids_T) // context_tokens
            for part in (batch,) if self._is_packed else batch.rows(context_tokens):
                row += num_rows if self._is_packed else 1
                if row % size == 0:
                    row += stride - size
                self._position = _Position(start.epoch, min(row, stop), turn)
                yield self._item(part)

    def _item(self, batch: Batch) -> Rows:
        targets_T = torch.from_numpy(batch.targets_T)
        labels_T = torch.full_like(targets_T, IGNORED_TARGET)
        labels_T[1:] = targets_T[:-1]
        shape = (1, -1) if self._is_packed else (-1,)
        item = Rows(
            input_ids=torch.from_numpy(batch.ids_T).view(shape),
            labels=labels_T.view(shape),
            shift_labels=targets_T.view(shape),
        )
        if self._has_positions:
            item["position_ids"] = torch.from_numpy(batch.positions_T).view(shape)
        if self._has_segments:
            item["cu_seqlens"] = torch.from_numpy(batch.cu_seqlens)
            item["max_seqlen"] = int(np.diff(batch.cu_seqlens).max())
        return item

    def _shards(self) -> OpenShards:
        if self._opened is None:
            self._opened = open_shards(self._section)
        return self._opened

    def _place(self) -> tuple[int, int]:
        """Rank and world size."""
        if self._rank is not None and self._world_size is not None:
            return self._rank, self._world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            place = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            try:
                place = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            except (KeyError, ValueError):
                place = 0, 1
        accelerate = sys.modules.get("accelerate.state")
        if place[1] > 1 and accelerate is not None and accelerate.is_initialized():
            raise ConfigError(
                "open_dataset: `rank` and `world_size` are required with Accelerate; give 0 and 1 "
                "for transformers' Trainer and for loaders passed to `prepare`, which distribute "
                f"rows over ranks themselves, else {place[0]} and {place[1]}"
            )
        return place

    def _rows(self) -> RankRows:
        """Rows of this rank, reopened after a fork: processes must not share open files."""
        rank, world_size = self._place()
        key = (os.getpid(), rank, world_size)
        if self._cached is None or self._cached[0] != key:
            shards, batch, training = self._shards(), self._batch, self._training
            if self._split == "val":
                made = shards.val_rows_of(batch, rank, world_size)
            else:
                epochs = training.epochs or 1.0
                made = shards.train_rows_of(batch, training.seed, epochs, rank, world_size)
            self._cached = key, made
        return self._cached[1]

    def _order(self, rows: RankRows) -> State:
        """Version and arguments that determine the rows of a step, by name."""
        return {
            "version": ORDER_VERSION,
            "shards": self._shards().fingerprint,
            "context_tokens": self._batch.context_tokens,
            "global_batch_rows": rows.rank_rows * rows.world_size,
            "seed": self._training.seed,
            "direction": self._section.direction.value,
            "split": self._split,
            "rows": self._section.rows,
            "lanes": self._section.lanes,
            "window_frames": self._section.window_frames,
        }


@dataclass(frozen=True)
class _Position:
    """Next row of a rank in an epoch; in a worker, the next row that it reads."""

    epoch: int
    row: int
    worker: tuple[int, int] | None = None
    """Id of the worker, and the number of workers."""
