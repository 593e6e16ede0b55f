"""Reading of parameters from runs of elements that are spread over files."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megaback.checkpoints.safetensors_file import write_tensors
from megaback.checkpoints.state import WEIGHT, SavedState
from megaback.optim.zero_matrices import Slice, slices_of_each

Runs = dict[str, Tensor]
NUM_FILES = 3


def write(folder: Path, files: list[Runs]) -> SavedState:
    paths = [folder / f"{number}.safetensors" for number in range(len(files))]
    for path, runs in zip(paths, files, strict=True):
        specs = {key: (run.dtype, run.shape) for key, run in runs.items()}
        write_tensors(path, specs, runs.__getitem__)
    return SavedState(paths)


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
        saved = write(Path(folder), files)

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
    saved = write(tmp_path, [runs])

    assert saved.differences(
        {(WEIGHT, "a"): 12, (WEIGHT, "b"): 5, ("momentum", "b"): 5, (WEIGHT, "c"): 5}
    ) == [
        "exp_avg of b is unexpected",
        "momentum of b is missing",
        "weight of a has 5 elements, not 12",
        "weight of c is missing",
    ]


def test_parts_of_512_ranks_are_read_by_any_number_with_few_open_files(tmp_path: Path) -> None:
    lengths = {"block.0.a": 1000, "block.0.b": 512, "norm": 7}  # most ranks have nothing of `norm`
    wholes = {name: torch.randn(length) for name, length in lengths.items()}
    files: list[Runs] = [{} for _ in range(512)]
    for rank, name, run in slices_over(512, lengths):
        if run.length:
            part = wholes[name][run.matrix_start : run.matrix_start + run.length]
            files[rank][f"{WEIGHT}:{name}:{run.matrix_start}"] = part

    with limit_of_open_files(64):
        saved = write(tmp_path, files)
        assert saved.differences({(WEIGHT, name): lengths[name] for name in lengths}) == []
        for world_size in (1, 7, 512):
            found = {name: torch.empty(length) for name, length in lengths.items()}
            for _, name, run in slices_over(world_size, lengths):
                start, stop = run.matrix_start, run.matrix_start + run.length
                if run.length:
                    saved.read(WEIGHT, name, start, found[name][start:stop])
            assert all(torch.equal(found[name], wholes[name]) for name in lengths)


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
        saved = write(Path(folder), [runs, {"weight:a:1000": torch.ones(5)}])
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
    saved = write(tmp_path, [{"weight:a:0": torch.ones(5)}])

    with pytest.raises(KeyError):
        saved.read(kind, name, start, torch.empty(5))


def test_elements_are_converted_to_the_type_of_the_output(tmp_path: Path) -> None:
    weight = torch.randn(10)
    saved = write(tmp_path, [{"weight:a:0": weight}])
    out = torch.empty(10, dtype=torch.bfloat16)

    saved.read(WEIGHT, "a", 0, out)

    assert torch.equal(out, weight.bfloat16())
