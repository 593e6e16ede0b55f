"""Rows of open_dataset equal those of our own loader, for any workers, ranks and resumes."""

import json
import pickle
import re
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

import megaback
from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from megaback.data import open_data
from megaback.errors import (
    BatchError,
    ConfigError,
    DirectionMismatchError,
    MegabackError,
    RunMismatchError,
    ShardCorruptError,
    ShardsMissingError,
)
from tests.helpers.data_sets import publish, with_flipped_bit
from tests.helpers.file_server import FileServer
from tests.helpers.run_config import run_config

CONTEXT = 64
BATCH_ROWS = 8
MICRO_ROWS = 2
SEED = 3

Array = npt.NDArray[np.int64]
Shards = Path | str | dict[str, float]


def own_batches(
    shards: Shards, steps: range, rank: int = 0, world_size: int = 1, **section: object
) -> dict[str, Array]:
    """Rows of a rank of our own loader, with targets and positions: each (rows, CONTEXT)."""
    if isinstance(shards, dict):
        section["shards"] = [{"path": path, "weight": of} for path, of in shards.items()]
    else:
        section["shards"] = str(shards)
    batch = {"context_tokens": CONTEXT, "global_batch_rows": BATCH_ROWS, "micro_batch_rows": 4}
    training = {"steps": 1, "seed": SEED}
    config = run_config(Path("run"), data=section | {"threads": 0}, batch=batch, training=training)
    loader = open_data(config, rank, world_size).training
    batches = [batch for step in steps for batch in loader.at(step)]
    found = {
        "input_ids": np.concatenate([one.ids_T for one in batches]),
        "shift_labels": np.concatenate([one.targets_T for one in batches]),
        "position_ids": np.concatenate([one.positions_T for one in batches]),
    }
    return {name: values.reshape(-1, CONTEXT) for name, values in found.items()}


def opened(shards: Shards, **options: Any) -> megaback.RowDataset:
    fixed: dict[str, Any] = {
        "context_tokens": CONTEXT,
        "global_batch_rows": BATCH_ROWS,
        "micro_batch_rows": MICRO_ROWS,
        "position_ids": True,
        "seed": SEED,
    }
    return megaback.open_dataset(shards, **fixed | options)


def loaded(dataset: megaback.RowDataset, workers: int) -> DataLoader[Any]:
    return DataLoader(dataset, batch_size=MICRO_ROWS, num_workers=workers)


def together(batches: Iterator[dict[str, torch.Tensor]]) -> dict[str, Array]:
    found = list(batches)
    return {
        name: np.concatenate([one[name].reshape(-1, CONTEXT).numpy() for one in found])
        for name in ("input_ids", "shift_labels", "position_ids")
    }


def assert_same(found: dict[str, Array], expected: dict[str, Array]) -> None:
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.fixture(scope="module")
def instruct_shards(
    tmp_path_factory: pytest.TempPathFactory,
    english_documents: list[str],
    codec: Callable[..., TextCodec],
) -> Path:
    folder = tmp_path_factory.mktemp("instruct")
    lines = [
        {"instruction": "What came last?", "input": text[:20], "output": text[-20:]}
        for text in english_documents
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BuildSettings(
        sources=(WeightedSource(str(folder / "rows.jsonl")),),
        tokenizer_sha256=codec().format.tokenizer_sha256,
        val_fraction=0.2,
        frame_tokens=1024,
        examples=ExampleColumns(),
        row_tokens=CONTEXT,
    )
    build_shards(settings, codec(), folder / "shards", workers=1)
    return folder / "shards"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_an_epoch_has_the_rows_of_our_own_loader(
    tiny_shards: Path, workers: int, world_size: int
) -> None:
    for rank in range(world_size):
        dataset = opened(tiny_shards, rank=rank, world_size=world_size)
        found = together(iter(loaded(dataset, workers)))
        steps = range(dataset.steps_per_epoch)
        assert len(found["input_ids"]) == len(dataset) == len(steps) * BATCH_ROWS // world_size
        assert_same(found, own_batches(tiny_shards, steps, rank, world_size))


@pytest.mark.parametrize("direction", ["backward", "forward", "both"])
def test_all_directions_have_the_rows_of_our_own_loader(tiny_shards: Path, direction: Any) -> None:
    dataset = opened(tiny_shards, direction=direction)
    expected = own_batches(tiny_shards, range(dataset.steps_per_epoch), direction=direction)
    assert_same(together(iter(loaded(dataset, 0))), expected)


@pytest.mark.parametrize("direction", ["backward", "both"])
def test_whole_documents_are_the_rows_of_our_own_loader(tiny_shards: Path, direction: Any) -> None:
    dataset = opened(tiny_shards, rows="documents", direction=direction)
    steps = range(dataset.steps_per_epoch)
    expected = own_batches(tiny_shards, steps, rows="documents", direction=direction)
    assert_same(together(iter(loaded(dataset, 2))), expected)


def test_instruction_examples_have_labels_where_ours_have_targets(instruct_shards: Path) -> None:
    dataset = opened(instruct_shards)
    found = together(iter(loaded(dataset, 2)))
    assert_same(found, own_batches(instruct_shards, range(dataset.steps_per_epoch)))
    assert 0 < (found["shift_labels"] != -100).mean() < 0.5


@pytest.mark.parametrize("rows", ["stream", "documents"])
def test_mixtures_and_urls_have_the_rows_of_our_own_loader(
    tiny_shards: Path, server: FileServer, rows: Any
) -> None:
    shards: Shards = {str(tiny_shards): 1.0, publish(server, tiny_shards): 2.0}
    dataset = opened(shards, epochs=0.4, rows=rows)
    expected = own_batches(shards, range(dataset.steps_per_epoch), rows=rows)
    assert_same(together(iter(loaded(dataset, 2))), expected)


def test_consecutive_epochs_are_the_steps_of_a_run(tiny_shards: Path) -> None:
    """Holds with persistent workers too: no row is lost where an epoch ends."""
    dataset = opened(tiny_shards, epochs=0.5)
    steps = dataset.steps_per_epoch
    loader = DataLoader(dataset, batch_size=MICRO_ROWS, num_workers=2, persistent_workers=True)
    for epoch in range(4):
        dataset.set_epoch(epoch)
        own = own_batches(tiny_shards, range(epoch * steps, (epoch + 1) * steps))
        assert_same(together(iter(loader)), own)


def test_packed_items_are_the_micro_batches_of_our_own_loader(tiny_shards: Path) -> None:
    dataset = opened(tiny_shards, packed=True, cu_seqlens=True)
    items = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert len(items) == len(dataset)
    assert_same(together(iter(items)), own_batches(tiny_shards, range(dataset.steps_per_epoch)))
    for item in items:
        assert item["input_ids"].shape == (1, MICRO_ROWS * CONTEXT)
        (starts,) = np.nonzero(item["position_ids"][0].numpy() == 0)
        np.testing.assert_array_equal(item["cu_seqlens"], [*starts, MICRO_ROWS * CONTEXT])
        assert item["max_seqlen"] == int(item["position_ids"].max()) + 1


def test_a_row_has_its_own_segments_and_labels_shifted_for_transformers(tiny_shards: Path) -> None:
    for row in islice(opened(tiny_shards, cu_seqlens=True), 20):
        starts = np.flatnonzero(row["position_ids"].numpy() == 0)
        np.testing.assert_array_equal(row["cu_seqlens"], [*starts, CONTEXT])
        assert row["max_seqlen"] == int(row["position_ids"].max()) + 1
        assert row["labels"][0] == -100
        learned = row["labels"] != -100
        assert torch.equal(row["labels"][learned], row["input_ids"][learned])
        assert torch.equal(row["labels"][1:], row["shift_labels"][:-1])


def test_the_val_set_is_distributed_as_in_validation(tiny_shards: Path) -> None:
    batch = {"context_tokens": CONTEXT, "global_batch_rows": 4, "micro_batch_rows": MICRO_ROWS}
    config = run_config(Path("run"), data={"shards": str(tiny_shards)}, batch=batch)
    for rank in range(2):
        own = list(open_data(config, rank, 2).validation(rank, 2))
        dataset = opened(tiny_shards, split="val", rank=rank, world_size=2)
        found = together(iter(loaded(dataset, 3)))
        ids = np.concatenate([one.ids_T for one in own]).reshape(-1, CONTEXT)
        np.testing.assert_array_equal(found["input_ids"], ids)
        assert len(dataset) == len(ids)


@pytest.mark.parametrize("saved_after_steps", [0, 5, 41])
@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 3), (4, 1)])
def test_a_state_between_steps_is_resumed_by_other_ranks_and_workers(
    tiny_shards: Path, saved_after_steps: int, world_size: int, workers: int
) -> None:
    saved = opened(tiny_shards, epochs=0.5, rank=0, world_size=1).state_at(saved_after_steps)
    state = json.loads(json.dumps(saved))
    for rank in range(0, world_size, 3):
        dataset = opened(tiny_shards, epochs=0.5, rank=rank, world_size=world_size)
        dataset.load_state_dict(state)
        steps = dataset.steps_per_epoch
        epoch = saved_after_steps // steps
        assert dataset.epoch == epoch
        rest = range(saved_after_steps, (epoch + 1) * steps)
        own = own_batches(tiny_shards, rest, rank, world_size)
        assert_same(together(iter(loaded(dataset, workers))), own)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("num_batches", [0, 1, 7, 24])
def test_torchdatas_loader_resumes_after_any_batch(
    tiny_shards: Path, workers: int, num_batches: int
) -> None:
    def loader() -> Any:
        dataset = opened(tiny_shards, epochs=0.2)
        dataset.set_epoch(1)
        return StatefulDataLoader(dataset, batch_size=MICRO_ROWS, num_workers=workers)

    whole = together(iter(loader()))
    before = loader()
    for _ in islice(before, num_batches):
        pass
    after = loader()
    after.load_state_dict(pickle.loads(pickle.dumps(before.state_dict())))
    rest = {name: values[num_batches * MICRO_ROWS :] for name, values in whole.items()}
    assert_same(together(iter(after)), rest)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_continues_with_the_next_epoch_after_a_whole_one(
    tiny_shards: Path, workers: int
) -> None:
    def loader() -> tuple[megaback.RowDataset, Any]:
        dataset = opened(tiny_shards, epochs=0.2)
        return dataset, StatefulDataLoader(dataset, batch_size=MICRO_ROWS, num_workers=workers)

    _, before = loader()
    assert len(list(before)) == len(before)
    dataset, after = loader()
    after.load_state_dict(before.state_dict())
    dataset.set_epoch(1)
    steps = dataset.steps_per_epoch
    assert_same(together(iter(after)), own_batches(tiny_shards, range(steps, 2 * steps)))


def test_a_resumed_pass_is_followed_by_whole_ones(tiny_shards: Path) -> None:
    dataset = opened(tiny_shards, epochs=0.2)
    steps = dataset.steps_per_epoch
    dataset.load_state_dict(dataset.state_at(2))
    assert len(list(dataset)) == len(dataset) - 2 * BATCH_ROWS
    dataset.set_epoch(1)
    own = own_batches(tiny_shards, range(steps, 2 * steps))
    assert_same(together(iter(loaded(dataset, 0))), own)
    assert dataset.state_dict()["epoch"] == 1


def test_one_process_resumes_in_the_middle_of_a_batch(tiny_shards: Path) -> None:
    dataset = opened(tiny_shards, epochs=0.2)
    whole = list(dataset)
    iterator = iter(dataset)
    for _ in range(13):
        next(iterator)
    resumed = opened(tiny_shards, epochs=0.2)
    resumed.load_state_dict(dataset.state_dict())
    rest = list(resumed)
    assert len(rest) == len(whole) - 13
    assert all(
        torch.equal(one["input_ids"], other["input_ids"])
        for one, other in zip(rest, whole[13:], strict=True)
    )
    with pytest.raises(RunMismatchError, match="within a step by 1 ranks, but there are 2"):
        opened(tiny_shards, rank=0, world_size=2).load_state_dict(dataset.state_dict())
    resumed.load_state_dict(dataset.state_dict() | {"row": 1})
    with pytest.raises(RunMismatchError, match="within a batch of 2 rows"):
        next(iter(loaded(resumed, 2)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_shard_raises_shard_corrupt_error(
    tiny_shards: Path, tmp_path: Path, workers: int
) -> None:
    for path in tiny_shards.iterdir():
        if path.is_file():
            data = path.read_bytes()
            is_shard = path.name.startswith("train")
            (tmp_path / path.name).write_bytes(with_flipped_bit(data, 99) if is_shard else data)
    with pytest.raises(ShardCorruptError, match=r"train-00000-00000\.zst is damaged: frame 0"):
        list(loaded(opened(tmp_path), workers))


def test_a_spawned_worker_knows_its_parents_rank(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker itself has neither the variables nor a process group."""
    dataset = opened(tiny_shards, epochs=0.1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(dataset) == dataset.steps_per_epoch * BATCH_ROWS // 2
    context.set_spawning_popen(object())  # as multiprocessing does while it starts one
    there = pickle.dumps(dataset)
    context.set_spawning_popen(None)
    monkeypatch.undo()
    own = own_batches(tiny_shards, range(dataset.steps_per_epoch), 1, 2)
    assert_same(together(iter(loaded(pickle.loads(there), 0))), own)


def test_a_step_is_a_whole_number_and_its_state_is_json(tiny_shards: Path) -> None:
    dataset = opened(tiny_shards)
    for step in (-1, 1.5, None, "3"):
        with pytest.raises(ConfigError, match=f"state_at: `step` is {step!r}, which is not "):
            dataset.state_at(step)  # type: ignore[arg-type] # what a caller may do
    of_numpy = dataset.state_at(np.int64(3))  # type: ignore[arg-type] # as above
    assert json.loads(json.dumps(of_numpy)) == dataset.state_at(3)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"context_tokens": 48}, ConfigError, "context_tokens is 48, which does not divide"),
        ({"context_tokens": 0}, ConfigError, "context_tokens = 0: "),
        ({"global_batch_rows": 0}, ConfigError, "global_batch_rows = 0: "),
        ({"micro_batch_rows": -1}, ConfigError, "micro_batch_rows = -1: "),
        ({"seed": -1}, ConfigError, "seed = -1: "),
        ({"epochs": 0}, ConfigError, "epochs = 0: "),
        ({"lanes": 3}, BatchError, "lanes 3 does not divide global_batch_rows 8"),
        ({"direction": "up"}, ConfigError, "direction = 'up': "),
        ({"split": "test"}, ConfigError, "`split` is 'test'"),
        ({"rank": 1}, ConfigError, "give `rank` and `world_size` together"),
        ({"rank": 2, "world_size": 2}, ConfigError, "`rank` is 2 and `world_size` is 2"),
        ({"rank": "0", "world_size": "2"}, ConfigError, "`rank` is '0'"),
        ({"rank": 0, "world_size": 3}, BatchError, "global_batch_rows 8"),
        ({"shards": {"nowhere": 0.0}}, ConfigError, "shards.0.weight = 0.0: "),
        ({"shards": {"nowhere": {0: 1.0, 0.5: 2.0}}}, ConfigError, "is a dictionary; weights over"),
        ({"shards": "nowhere"}, ShardsMissingError, "nowhere"),
        ({"shards": ["a", "b"]}, ConfigError, "`shards` is of type list"),
        ({"shards": None}, ConfigError, "`shards` is of type NoneType"),
        ({"shards": ""}, ConfigError, "or an address is empty; give a folder"),
        ({"shards": {}}, ConfigError, "or an address is empty; give a folder"),
        ({"packed": "no"}, ConfigError, "`packed` is 'no'; give True or False"),
        ({"cu_seqlens": 1}, ConfigError, "`cu_seqlens` is 1; give True or False"),
        ({"cache": 0}, ConfigError, "`cache` is 0; give a folder or None"),
    ],
)
def test_an_invalid_argument_is_reported(
    tiny_shards: Path, options: dict[str, Any], kind: type[MegabackError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        opened(options.pop("shards", tiny_shards), **options)
    assert message in str(caught.value)


def test_examples_cannot_be_read_forward_or_mixed_with_documents(
    instruct_shards: Path, tiny_shards: Path
) -> None:
    with pytest.raises(DirectionMismatchError, match="'forward'"):
        opened(instruct_shards, direction="forward")
    with pytest.raises(DirectionMismatchError, match=r"use data\.direction=backward, also to"):
        opened(instruct_shards, direction="both")
    with pytest.raises(ConfigError, match=r"holds instruction examples.*remove data\.rows"):
        opened(instruct_shards, rows="documents")
    with pytest.raises(ConfigError, match="documents and instruction examples cannot be mixed"):
        opened({str(instruct_shards): 1.0, str(tiny_shards): 1.0})


def test_several_workers_without_a_batch_size_are_refused(tiny_shards: Path) -> None:
    dataset = opened(tiny_shards, micro_batch_rows=None)
    with pytest.raises(ConfigError, match="`micro_batch_rows` is required with 2 workers"):
        next(iter(loaded(dataset, 2)))


def test_an_invalid_or_incompatible_state_is_refused(tiny_shards: Path) -> None:
    dataset = opened(tiny_shards)
    of_step = dataset.state_at(2)
    negative, infinite = {**of_step, "row": -1}, {**of_step, "step": float("inf")}
    for no_state in ({"_num_yielded": 3}, negative, infinite, {**of_step, "step": 1 << 70}):
        with pytest.raises(ConfigError, match="`state` is not a state"):
            dataset.load_state_dict(no_state)
    for changed in (
        {"seed": 4},
        {"global_batch_rows": 4},
        {"direction": "forward"},
        {"rows": "documents"},
    ):
        with pytest.raises(RunMismatchError, match=f"with {next(iter(changed))} "):
            dataset.load_state_dict(opened(tiny_shards, **changed).state_dict())
    other = {**of_step, "order": {**of_step["order"], "version": 2}}
    with pytest.raises(RunMismatchError, match=r"has version 2 .* version 1"):
        dataset.load_state_dict(other)
    dataset.load_state_dict(dataset.state_at(2 * dataset.steps_per_epoch))
    with pytest.raises(ConfigError, match="the loaded state is in epoch 2, after epoch 0"):
        dataset.set_epoch(0)


def test_the_example_in_the_docs_runs(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/shards").symlink_to(tiny_shards)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs/other-trainers.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(code, {})
