"""Reading of parameters from runs of elements that are spread over files, and their index."""

import json
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints import safetensors_file
from megaback.checkpoints.safetensors_file import write_tensors
from megaback.checkpoints.saved_runs import (
    WEIGHT,
    RunIndex,
    SavedState,
    index_from_headers,
    index_of,
    part_names,
    require_plausible,
)
from megaback.optim.zero_matrices import Slice, slices_of_each

Runs = dict[str, Tensor]
NUM_FILES = 3


def write(folder: Path, files: list[Runs]) -> RunIndex:
    """Write the runs of each rank; returns their index, by the files' headers."""
    paths = []
    for rank, runs in enumerate(files):
        for name, is_weights in zip(part_names(rank), (True, False), strict=True):
            keys = [key for key in runs if key.startswith(WEIGHT) is is_weights]
            specs = {key: (runs[key].dtype, runs[key].shape) for key in keys}
            write_tensors(folder / name, specs, runs.__getitem__)
            paths.append(folder / name)
    return index_from_headers(paths)


def split(data: st.DataObject, kind: str, name: str, whole: Tensor, files: list[Runs]) -> None:
    """Split a tensor into runs, and distribute them over files."""
    inner = data.draw(st.sets(st.integers(1, max(1, len(whole) - 1)), max_size=6))
    bounds = sorted({0, len(whole)} | {place for place in inner if place < len(whole)})
    for start, stop in data.draw(st.permutations(list(pairwise(bounds)))):
        number = data.draw(st.integers(0, NUM_FILES - 1))
        files[number][f"{kind}:{name}:{start}"] = whole[start:stop]


@given(st.data())
def test_any_part_of_a_tensor_is_read_from_runs_in_several_files(data: st.DataObject) -> None:
    wholes = {
        (kind, name): torch.randn(data.draw(st.integers(1, 40)))
        for kind in (WEIGHT, "exp_avg")
        for name in ("block.0.a", "block.1.a")
    }
    files: list[Runs] = [{} for _ in range(NUM_FILES)]
    for (kind, name), whole in wholes.items():
        split(data, kind, name, whole, files)

    with TemporaryDirectory() as folder:
        saved = SavedState(Path(folder), write(Path(folder), files))

        assert saved.differences({key: len(whole) for key, whole in wholes.items()}) == []
        for (kind, name), whole in wholes.items():
            start = data.draw(st.integers(0, len(whole)))
            stop = data.draw(st.integers(start, len(whole)))
            for first, last in ((0, len(whole)), (start, stop)):
                out = torch.empty(last - first)
                saved.read(kind, name, first, out)
                assert torch.equal(out, whole[first:last])


def test_differences_from_the_expected_elements_are_listed(tmp_path: Path) -> None:
    runs = {
        f"{WEIGHT}:a:0": torch.ones(5),
        f"{WEIGHT}:a:7": torch.ones(5),  # two elements before it are missing
        f"{WEIGHT}:b:0": torch.ones(5),
        "exp_avg:b:0": torch.ones(5),
    }
    saved = SavedState(tmp_path, write(tmp_path, [runs]))

    assert saved.differences(
        {(WEIGHT, "a"): 12, (WEIGHT, "b"): 5, ("momentum", "b"): 5, (WEIGHT, "c"): 5}
    ) == [
        "exp_avg of b is unexpected",
        "momentum of b is missing",
        "weight of a has 5 elements, not 12",
        "weight of c is missing",
    ]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Number of times that each file of tensors was opened."""
    counts: Counter[str] = Counter()

    def counted(opens: Callable[[Path], object]) -> Callable[[Path], object]:
        def count(path: Path) -> object:
            counts[path.name] += 1
            return opens(path)

        return count

    for name in ("open_tensors", "open_file"):
        monkeypatch.setattr(safetensors_file, name, counted(getattr(safetensors_file, name)))
    return counts


def test_parts_of_512_ranks_are_read_by_any_number_from_the_files_that_they_need(
    tmp_path: Path, opened: Counter[str]
) -> None:
    lengths = {"block.0.a": 1000, "block.0.b": 512, "norm": 7}  # most ranks have nothing of `norm`
    wholes = {name: torch.randn(length) for name, length in lengths.items()}
    files: list[Runs] = [{} for _ in range(512)]
    for rank, name, run in slices_over(512, lengths):
        if run.length:
            files[rank][f"{WEIGHT}:{name}:{run.matrix_start}"] = within(wholes[name], run)
    index = write(tmp_path, files)
    assert index == {
        "weight:block.0.a": [(0, 500, 0, 2)],
        "weight:block.0.b": [(0, 512, 0, 1)],
        "weight:norm": [(0, 7, 0, 1)],
    }

    with limit_of_open_files(64):
        for world_size, most_files in ((1, 512), (7, 96), (512, 1)):
            found = {name: torch.empty(length) for name, length in lengths.items()}
            for rank, runs in groupby(slices_over(world_size, lengths), key=itemgetter(0)):
                opened.clear()
                saved = SavedState(tmp_path, index)
                saved.read_all(
                    (WEIGHT, name, run.matrix_start, within(found[name], run))
                    for _, name, run in runs
                )
                assert len(opened) <= most_files, (world_size, rank)
                assert set(opened.values()) <= {1}
            assert all(torch.equal(found[name], wholes[name]) for name in lengths)


def within(flat: Tensor, run: Slice) -> Tensor:
    return flat[run.matrix_start : run.matrix_start + run.length]


def slices_over(world_size: int, lengths: dict[str, int]) -> Iterator[tuple[int, str, Slice]]:
    """Rank, parameter and slice, as ZeRO 3 cuts each parameter."""
    partitions = [-(-length // world_size) for length in lengths.values()]
    slices = slices_of_each(partitions, list(lengths.values()), world_size)
    for rank, of_rank in enumerate(slices):
        for name, run in zip(lengths, of_rank, strict=True):
            yield rank, name, run


@contextmanager
def limit_of_open_files(more: int) -> Iterator[None]:
    """Allow this process only some more files than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@given(st.data())
def test_missing_elements_are_counted(data: st.DataObject) -> None:
    present = data.draw(st.lists(st.booleans(), min_size=1, max_size=8))
    runs = {
        f"weight:a:{5 * number}": torch.ones(5) for number, is_in in enumerate(present) if is_in
    }
    lacking = 5 * present.count(False)
    with TemporaryDirectory() as folder:
        index = write(Path(folder), [runs, {"weight:a:1000": torch.ones(5)}])
        saved = SavedState(Path(folder), index)
        out = torch.zeros(5 * len(present))
        if lacking:
            with pytest.raises(KeyError, match=f"{lacking} elements of weight:a"):
                saved.read(WEIGHT, "a", 0, out)
        else:
            saved.read(WEIGHT, "a", 0, out)
            assert out.all()


@pytest.mark.parametrize(
    ("kind", "name", "start"),
    [("momentum", "a", 0), (WEIGHT, "b", 0), (WEIGHT, "a", 1), (WEIGHT, "a", 9)],
)
def test_reading_unsaved_elements_is_a_key_error(
    kind: str, name: str, start: int, tmp_path: Path
) -> None:
    saved = SavedState(tmp_path, write(tmp_path, [{"weight:a:0": torch.ones(5)}]))

    with pytest.raises(KeyError):
        saved.read(kind, name, start, torch.empty(5))


def test_elements_are_converted_to_the_type_of_the_output(tmp_path: Path) -> None:
    weight = torch.randn(10)
    saved = SavedState(tmp_path, write(tmp_path, [{"weight:a:0": weight}]))
    out = torch.empty(10, dtype=torch.bfloat16)

    saved.read(WEIGHT, "a", 0, out)

    assert torch.equal(out, weight.bfloat16())


@given(st.data())
def test_an_index_is_that_of_the_headers_and_has_a_series_per_cut(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 9))
    lengths = {name: data.draw(st.integers(1, 40)) for name in ("a", "b")}
    runs = [
        (rank, f"{WEIGHT}:{name}", run.matrix_start, run.length)
        for rank, name, run in slices_over(world_size, lengths)
        if run.length
    ]
    files: list[Runs] = [{} for _ in range(world_size)]
    for rank, key, start, length in runs:
        files[rank][f"{key}:{start}"] = torch.ones(length)

    index = index_of(runs)

    with TemporaryDirectory() as folder:
        assert index == write(Path(folder), files)
    assert all(len(series) <= 2 for series in index.values())  # the last run may be shorter
    names = [name for rank in range(world_size) for name in part_names(rank)]
    require_plausible(json.loads(json.dumps(index)), world_size, names)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight:a": [(0, 3, 0, 1)]}, "number of ranks"),
        ({"weight:a": [(2, 1, 0, 1)]}, "first rank"),
        ({"weight:a": [(-1, 1, 0, 1)]}, "first rank"),
        ({"weight:a": [(0, 1, -1, 1)]}, "start"),
        ({"weight:a": [(0, 1, 0, 0)]}, "length"),
        ({"weight:a": [(0, 2, 0, 1 << 62)]}, "length"),
        ({"weight": [(0, 1, 0, 1)]}, "not a kind and a parameter"),
    ],
)
def test_an_index_of_no_run_is_refused(index: RunIndex, reason: str) -> None:
    names = [name for rank in range(2) for name in part_names(rank)]
    with pytest.raises(ValueError, match=reason):
        require_plausible(index, 2, names)


def test_an_index_of_ranks_without_files_is_refused() -> None:
    with pytest.raises(ValueError, match="no files for some of its 2 ranks"):
        require_plausible({}, 2, [*part_names(0), part_names(1)[0], "tokenizer.model"])


@pytest.mark.parametrize("series", [(0, 1, 1, 4), (0, 1, 0, 4), (1, 1, 0, 5)])
def test_an_index_that_contradicts_a_header_is_refused(
    series: tuple[int, int, int, int], tmp_path: Path
) -> None:
    write(tmp_path, [{"weight:a:0": torch.ones(5)}, {}])
    saved = SavedState(tmp_path, {"weight:a": [series]})
    with pytest.raises(CheckpointCorruptError, match=r"does not have the . elements 'weight:a:"):
        saved.read(WEIGHT, "a", series[2], torch.empty(4))
