"""Runs of elements in the files of a checkpoint, and their index.

The index in meta.json lists which rank has saved which elements, so that a reader opens only the
files that it needs. ZeRO cuts parameters into equal parts: an entry of the index is a series of
equal runs, one per rank, so that it grows with parameters plus ranks, not with their product.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from torch import Tensor

from data_pipeline.common.checked_json import briefly, require_within
from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints.safetensors_file import OpenFiles, TensorFile
from megaback.run_folder import OPTIMIZER_PREFIX, TENSORS_SUFFIX, WEIGHTS_PREFIX

WEIGHT = "weight"
_RUN_KEY = re.compile(r"([a-z_]+:[^:]+):(\d{1,18})")
_INDEX_KEY = re.compile(r"[a-z_]+:[^:]+")
_RANK = re.compile(rf".*-(\d{{5,9}}){re.escape(TENSORS_SUFFIX)}")

RunIndex = dict[str, list[tuple[int, int, int, int]]]
"""Series of each KIND:PARAMETER: first rank, number of ranks, start, length of each run."""


@dataclass(frozen=True, slots=True)
class Series:
    """Consecutive runs of one length, each saved by the rank after that of the previous run."""

    first_rank: int
    num_ranks: int
    start: int
    """First element of the parameter, in its flat order."""
    length: int
    """Number of elements of each run."""

    @property
    def stop(self) -> int:
        return self.start + self.num_ranks * self.length


def index_of(runs: Iterable[tuple[int, str, int, int]]) -> RunIndex:
    """The index of runs (rank, KIND:PARAMETER, start, length), those of a parameter in order."""
    series: dict[str, list[Series]] = {}
    for rank, key, start, length in runs:
        of_key = series.setdefault(key, [])
        last = of_key[-1] if of_key else None
        is_next = (
            last is not None
            and (last.first_rank + last.num_ranks, last.stop) == (rank, start)
            and last.length == length
        )
        if last is not None and is_next:
            of_key[-1] = replace(last, num_ranks=last.num_ranks + 1)
        else:
            of_key.append(Series(rank, 1, start, length))
    return {key: [astuple(one) for one in of_key] for key, of_key in series.items()}


def index_from_headers(files: Iterable[Path]) -> RunIndex:
    """The index of the checkpoint's files, by their headers: earlier versions saved none.

    Raises OSError, CheckpointCorruptError.
    """
    runs = []
    open_files = OpenFiles()
    for path in files:
        rank = _RANK.fullmatch(path.name)
        for name, entry in TensorFile(path, open_files).entries.items():
            found = _RUN_KEY.fullmatch(name)
            if rank is None or found is None or len(entry.shape) != 1:
                raise CheckpointCorruptError(
                    f"{path} has {briefly(name)} of shape {list(entry.shape)}, which is not a "
                    "run of a parameter's elements; use another checkpoint"
                )
            runs.append((int(rank[1]), found[1], int(found[2]), entry.shape[0]))
    return index_of(sorted(runs, key=lambda run: (run[1:3], run)))


def require_plausible(index: RunIndex, world_size: int, files: Collection[str]) -> None:
    """Raises ValueError for an index that no run of `world_size` ranks with these files writes."""
    if len(files) < 2 * world_size or not all(
        name in files for rank in range(world_size) for name in part_names(rank)
    ):
        raise ValueError(f"it lists no files for some of its {world_size:,} ranks")
    for key, of_key in index.items():
        if not _INDEX_KEY.fullmatch(key):
            raise ValueError(f"{briefly(key)} in its index is not a kind and a parameter")
        for first_rank, num_ranks, start, length in of_key:
            require_within(f"the first rank of {key}", first_rank, 0, world_size - 1)
            require_within(f"the number of ranks of {key}", num_ranks, 1, world_size - first_rank)
            require_within(f"the start of {key}", start, 0, INT64_MAX)
            require_within(f"the length of {key}", length, 1, INT64_MAX // num_ranks)


def part_names(rank: int) -> tuple[str, str]:
    """Names of a rank's files: of its weights, and of its optimizer state."""
    return (
        f"{WEIGHTS_PREFIX}{rank:05d}{TENSORS_SUFFIX}",
        f"{OPTIMIZER_PREFIX}{rank:05d}{TENSORS_SUFFIX}",
    )


class SavedState:
    """Weights and optimizer state in a checkpoint of any world size."""

    def __init__(self, folder: Path, index: RunIndex, *, only_weights: bool = False) -> None:
        """Open nothing yet."""
        self._folder = folder
        self._series: dict[tuple[str, str], list[Series]] = {}
        for key, of_key in index.items():
            kind, _, name = key.partition(":")
            if kind == WEIGHT or not only_weights:
                series = sorted((Series(*one) for one in of_key), key=lambda one: one.start)
                self._series[kind, name] = series
        self._files: dict[Path, TensorFile] = {}
        self._open_files = OpenFiles()

    def num_parameters(self) -> int:
        """Number of parameters that have weights."""
        return sum(kind == WEIGHT for kind, _ in self._series)

    def differences(self, expected: Mapping[tuple[str, str], int]) -> list[str]:
        """Differences from the expected number of elements, by kind and parameter."""
        found = {key: self._num_elements(key) for key in self._series}
        return [
            f"{kind} of {name} "
            + (
                "is missing"
                if (kind, name) not in found
                else "is unexpected"
                if (kind, name) not in expected
                else f"has {found[kind, name]:,} elements, not {expected[kind, name]:,}"
            )
            for kind, name in sorted(found.keys() | expected.keys())
            if found.get((kind, name)) != expected.get((kind, name))
        ]

    def _num_elements(self, key: tuple[str, str]) -> int:
        """Number of consecutive elements from 0, up to the first gap or overlap."""
        end = 0
        for series in self._series[key]:
            if series.start != end:
                break
            end = series.stop
        return end

    def read(self, kind: str, name: str, start: int, out: Tensor) -> None:
        """Fill `out` with a parameter's elements from `start` on. Raises KeyError if any lack."""
        self.read_all([(kind, name, start, out)])

    def read_all(self, wanted: Iterable[tuple[str, str, int, Tensor]]) -> None:
        """Fill each (kind, parameter, start, out), file by file: each is opened once.

        Raises KeyError if any elements lack, CheckpointCorruptError, OSError.
        """
        parts = []
        for kind, name, start, out in wanted:
            missing = len(out)
            for rank, run_start, length in self._runs_within(kind, name, start, len(out)):
                first, last = max(start, run_start), min(start + len(out), run_start + length)
                missing -= last - first
                key = f"{kind}:{name}:{run_start}"
                part = out[first - start : last - start]
                parts.append(
                    (part_names(rank)[kind != WEIGHT], key, length, first - run_start, part)
                )
            if missing:
                raise KeyError(f"{missing} elements of {kind}:{name}")
        for file_name, key, length, offset, part in sorted(parts, key=lambda one: one[0]):
            self._file_with(self._folder / file_name, key, length).read(key, offset, part)

    def _runs_within(
        self, kind: str, name: str, start: int, length: int
    ) -> Iterator[tuple[int, int, int]]:
        """Rank, start and length of the runs that have some of these elements."""
        for series in self._series[kind, name]:
            first, last = max(start, series.start), min(start + length, series.stop)
            if first < last:
                skipped = (first - series.start) // series.length
                for number in range(skipped, -(-(last - series.start) // series.length)):
                    run_start = series.start + number * series.length
                    yield series.first_rank + number, run_start, series.length

    def _file_with(self, path: Path, key: str, length: int) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path, self._open_files)
        file = self._files[path]
        if key not in file.entries or file.entries[key].shape != (length,):
            raise CheckpointCorruptError(
                f"{path} does not have the {length:,} elements {briefly(key)} of the index in its "
                "checkpoint's meta.json; use another checkpoint"
            )
        return file
