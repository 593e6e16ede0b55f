"""Examples in rows: none is cut, lost or attended to by another, and targets are right."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.build.task_output import RowPacker
from data_pipeline.errors import ConfigError, DirectionMismatchError, ShardCorruptError
from data_pipeline.loading.rows import IGNORED_TARGET, Batch, RowReader
from data_pipeline.shards.examples import PackedExample, require_rows
from data_pipeline.shards.manifest import Manifest, ShardEntry
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.codec import Direction
from megaback.config import ModelSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from tests.helpers.batches import BACKWARD_TOKENS, BEGIN, END, DataSet

ROW_TOKENS, FRAME_TOKENS = 16, 64
# Numbers of ids without and with loss, per example.
SIZES = st.lists(st.tuples(st.integers(1, 10), st.integers(1, 6)), min_size=1, max_size=40)


def examples_of(sizes: list[tuple[int, int]]) -> list[PackedExample]:
    """Examples of distinct ids, by which each is recognized."""
    first, examples = 10, []
    for given_ids, loss_tokens in sizes:
        ids = np.arange(first, first + given_ids + loss_tokens, dtype="<u2")
        examples.append(PackedExample(ids, given_ids, loss_tokens, text_bytes=len(ids)))
        first += len(ids)
    return examples


def packed(sizes: list[tuple[int, int]]) -> list[PackedExample]:
    packer = RowPacker(ROW_TOKENS, END)
    rows = [row for example in examples_of(sizes) for row in packer.add(example)]
    return [*rows, *packer.finish()]


@contextmanager
def example_set(sizes: list[tuple[int, int]]) -> Iterator[DataSet]:
    """A data set of one shard."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train-00000-00000.zst"
        with path.open("wb") as file:
            identity = BACKWARD_TOKENS.to_dict()
            id_dtype = np.dtype("<u2")
            writer = ShardWriter(file, identity, id_dtype, FRAME_TOKENS, row_tokens=ROW_TOKENS)
            for example in packed(sizes):
                writer.add_example(example)
            entry = ShardEntry(path.name, "train", **asdict(writer.finish()))
        manifest = Manifest(
            text_format=BACKWARD_TOKENS,
            vocab_size=600,
            begin_id=BEGIN,
            end_id=END,
            id_bytes=2,
            frame_tokens=FRAME_TOKENS,
            source="test",
            val_fraction=0.0,
            excluded={},
            shards=(entry,),
            dictionary_sha256=None,
        )
        yield DataSet(Path(folder), replace(manifest, row_tokens=ROW_TOKENS), [])


def everything(data: DataSet, context_tokens: int = ROW_TOKENS) -> Batch:
    """All rows of a data set, in stored order."""
    rows = data.rows(context_tokens)
    num_rows = -(-data.manifest.total("train")["tokens"] // context_tokens)
    number = np.arange(num_rows)
    a_frame = FRAME_TOKENS // context_tokens
    return rows.batch(number // a_frame, number % a_frame)


@given(SIZES)
def test_every_example_is_whole_in_exactly_one_row(sizes: list[tuple[int, int]]) -> None:
    found, room = [], ROW_TOKENS
    for example in packed(sizes):
        assert len(example.ids) <= room  # including the padding after it
        room = (room - len(example.ids)) or ROW_TOKENS
        size = example.num_given + example.num_loss_tokens
        found.append(example.ids[:size].tolist())
        assert set(example.ids[size:].tolist()) <= {END}
    assert room == ROW_TOKENS
    assert sorted(found) == [example.ids.tolist() for example in examples_of(sizes)]


def test_later_examples_fill_open_rows() -> None:
    sizes = [(8, 2)] * 10 + [(4, 2)] * 10
    assert sum(len(example.ids) for example in packed(sizes)) == 10 * ROW_TOKENS


def test_an_example_longer_than_a_row_is_not_packed() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        next(RowPacker(4, END).add(examples_of([(4, 1)])[0]))


@settings(max_examples=30)
@given(SIZES, st.sampled_from([16, 32, 64]))
def test_segments_and_targets_are_those_of_the_examples_one_by_one(
    sizes: list[tuple[int, int]], context_tokens: int
) -> None:
    with example_set(sizes) as data:
        batch = everything(data, context_tokens)
        totals = data.manifest.total("train")
    starts, targets = [], []
    for example in packed(sizes):
        begin, size = len(targets), example.num_given + example.num_loss_tokens
        starts += [begin] + [begin + size] * (size < len(example.ids))
        of_example = [IGNORED_TARGET] * len(example.ids)
        of_example[example.num_given - 1 : size - 1] = example.ids[example.num_given : size]
        targets += of_example
    padded = len(batch.ids_T) - len(targets)  # the end of a frame that is short
    assert batch.targets_T.tolist() == targets + [IGNORED_TARGET] * padded
    edges = {*starts, *range(0, len(batch.ids_T) + 1, context_tokens)}
    assert batch.cu_seqlens.tolist() == sorted(edges)
    assert (
        batch.num_targets == totals["loss_tokens"] == sum(loss_tokens for _, loss_tokens in sizes)
    )
    assert totals["padding_tokens"] == sum(len(example.ids) for example in packed(sizes)) - sum(
        map(sum, sizes)
    )


def test_a_row_past_the_end_of_the_shard_has_no_targets() -> None:
    with example_set([(8, 8)] * 5) as data:
        batch = data.rows(ROW_TOKENS).batch(np.array([1, 1]), np.array([0, 1]))
    assert batch.num_targets == 8
    assert set(batch.targets_T[ROW_TOKENS:].tolist()) == {IGNORED_TARGET}
    assert set(batch.ids_T[ROW_TOKENS:].tolist()) == {END}


def test_a_skipped_damaged_frame_has_no_targets() -> None:
    with example_set([(8, 8)] * 8) as data:
        data.damage(0)
        rows = RowReader(data.store(skip_bad_frames=True), ROW_TOKENS, Direction.BACKWARD)
        batch = rows.batch(np.array([0, 1]), np.array([0, 0]))
    assert (batch.num_targets, batch.num_skipped_rows) == (8, 1)


def test_rows_that_would_cut_examples_are_refused_and_multiples_are_not() -> None:
    with example_set([(8, 8)] * 4) as data:
        assert data.rows(32).context_tokens == 32
        for context_tokens in (4, 8):
            with pytest.raises(ConfigError, match=f"context-tokens {context_tokens}"):
                data.rows(context_tokens)


def test_examples_are_not_read_against_their_direction() -> None:
    with (
        example_set([(8, 8)]) as data,
        pytest.raises(DirectionMismatchError, match="instruct build --direction forward"),
    ):
        data.rows(ROW_TOKENS, Direction.FORWARD)


def test_a_copy_of_a_shard_holds_the_same_examples() -> None:
    with example_set([(8, 4), (3, 1), (2, 2)]) as data:
        entry = data.manifest.shards[0]
        copy = data.folder / "copy.zst"
        with ShardReader(data.folder / entry.file) as reader, copy.open("wb") as file:
            dtype = np.dtype("<u2")
            writer = ShardWriter(
                file, BACKWARD_TOKENS.to_dict(), dtype, FRAME_TOKENS, row_tokens=ROW_TOKENS
            )
            writer.add_shard(reader)
            assert ShardEntry(entry.file, "train", **asdict(writer.finish())) == entry


def test_counts_that_contradict_each_other_are_refused() -> None:
    for counts in ([[10, 8, 4]], [[16, 0, 4]], [[10, 8, 2], [10, 8, 2]]):
        with pytest.raises(ValueError, match="crosses"):
            require_rows(np.array(counts), ROW_TOKENS)
    with example_set([(8, 4)]) as data:
        path = data.folder / data.manifest.shards[0].file
        with path.open("wb") as file:
            identity, dtype = BACKWARD_TOKENS.to_dict(), np.dtype("<u2")
            writer = ShardWriter(file, identity, dtype, FRAME_TOKENS, row_tokens=ROW_TOKENS)
            writer.add_example(PackedExample(np.arange(20, dtype="<u2"), 8, 12, 20))
            writer.finish()
        with ShardReader(path) as reader, pytest.raises(ShardCorruptError, match="is malformed"):
            reader.marks(0)


def arguments(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Segments]:
    lengths = tuple(np.diff(batch.cu_seqlens).tolist())
    segments = Segments.from_lengths(lengths, torch.device("cpu"))
    ids_T, targets_T, positions_T = map(
        torch.from_numpy, (batch.ids_T.copy(), batch.targets_T, batch.positions_T)
    )
    return ids_T, targets_T, positions_T, segments


def tiny_model() -> ReverseGPT:
    shape = ModelSection(num_layers=2, width=16, num_heads=2).resolved()
    model = ReverseGPT(shape, 600)
    model.initialize(1)
    return model


def test_examples_do_not_attend_to_each_other() -> None:
    """Changing one changes no logits of the others, nor does their loss reach its embeddings."""
    with example_set([(5, 3), (2, 4), (3, 2), (6, 6)]) as data:
        batch = everything(data)
    ids_T, targets_T, positions_T, segments = arguments(batch)
    model = tiny_model()
    before_TV = model.logits(ids_T, positions_T, segments)
    for start, stop in pairwise(batch.cu_seqlens.tolist()):
        other_ids_T = ids_T.clone()
        other_ids_T[start:stop] = 599 - other_ids_T[start:stop]
        after_TV = model.logits(other_ids_T, positions_T, segments)
        outside = torch.ones(len(ids_T), dtype=torch.bool)
        outside[start:stop] = False
        assert torch.equal(before_TV[outside], after_TV[outside])
        assert not torch.equal(before_TV[start], after_TV[start])
        others_T = torch.where(outside, targets_T, IGNORED_TARGET)
        model.zero_grad()
        model(ids_T, others_T, positions_T, segments).sum().backward()
        embedded = model.model.embed_tokens.weight.grad
        assert embedded is not None
        inside = set(ids_T[start:stop].tolist()) - {END}
        assert not embedded[list(inside)].any()


def test_the_loss_has_no_gradient_at_given_tokens() -> None:
    sizes = [(5, 3), (2, 4), (3, 2), (6, 6)]
    with example_set(sizes) as data:
        ids_T, targets_T, positions_T, segments = arguments(everything(data))
    kept: list[Tensor] = []

    def keep(_module: object, given: tuple[Tensor, ...]) -> None:
        given[0].retain_grad()
        kept.append(given[0])

    model = tiny_model()
    model.lm_head.register_forward_pre_hook(keep)
    model(ids_T, targets_T, positions_T, segments).sum().backward()
    (hidden_TD,) = kept
    assert hidden_TD.grad is not None
    has_gradient = hidden_TD.grad.abs().sum(dim=1) > 0
    loss_tokens = {int(ids[0]) for ids in (e.ids[e.num_given :] for e in packed(sizes))}
    assert int(has_gradient.sum()) == sum(count for _, count in sizes)
    assert loss_tokens <= set(targets_T[has_gradient].tolist())
    assert torch.equal(has_gradient, targets_T != IGNORED_TARGET)
