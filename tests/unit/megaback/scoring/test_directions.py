"""Losses in both directions: the same targets, and no bias towards one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.command import build_shards
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import Direction, TextCodec
from megaback.config import ModelSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.scoring.directions import (
    DocumentLosses,
    Ids,
    Markers,
    documents_of,
    measure,
    windows_of,
)
from tests.helpers.builds import make_settings

BEGIN, END, VOCAB_SIZE = 1, 2, 40
MARKERS = Markers(BEGIN, END)
NUM_BYTES = np.array([0] * 3 + [2] * (VOCAB_SIZE - 3))
CONTEXT_TOKENS = 8

Texts = Sequence[Sequence[int]]
texts = st.lists(st.lists(st.integers(3, VOCAB_SIZE - 1), max_size=40), min_size=1, max_size=6)


def document(text: Sequence[int]) -> Ids:
    return np.array([BEGIN, *text, END])


def model_of(seed: int) -> ReverseGPT:
    shape = ModelSection(num_layers=1, width=16, num_heads=2).resolved()
    model = ReverseGPT(shape, VOCAB_SIZE)
    model.initialize(seed)
    for parameter in model.parameters():  # so that predictions are far from uniform
        parameter.data *= 20 if parameter.ndim > 1 else 1
    return model.eval()


FIRST, SECOND = model_of(1), model_of(2)


def losses_of(
    model: ReverseGPT, direction: Direction, documents: Sequence[Ids]
) -> tuple[DocumentLosses, int]:
    """Losses of documents, and their number of windows."""
    windows = [
        window
        for number, ids in enumerate(documents)
        for window in windows_of(number, ids, CONTEXT_TOKENS)
    ]
    done: list[int] = []
    losses = measure(model, direction, windows, CONTEXT_TOKENS, MARKERS, NUM_BYTES, done.append)
    assert sum(done) == len(windows)
    return losses, len(windows)


@given(st.integers(2, 60), st.integers(2, 16))
def test_every_cut_of_a_document_has_every_target_once(tokens: int, context_tokens: int) -> None:
    ids = np.arange(tokens)

    windows = windows_of(0, ids, context_tokens)

    weights = np.zeros(tokens - 1)
    for window in windows:
        assert window.ids.tolist() == list(range(window.start, window.start + len(window.ids)))
        assert 2 <= len(window.ids) <= context_tokens + 1
        weights[window.start : window.start + len(window.ids) - 1] += window.weight
    assert weights.tolist() == [1.0] * (tokens - 1)


@given(st.integers(2, 60), st.integers(2, 16))
def test_windows_of_a_reversed_document_are_its_windows_reversed(
    tokens: int, context_tokens: int
) -> None:
    ids = np.arange(10, 10 + tokens)

    there = sorted(one.ids.tolist() for one in windows_of(0, ids, context_tokens))
    back = sorted(one.ids.tolist()[::-1] for one in windows_of(0, ids[::-1], context_tokens))

    assert there == back


@settings(max_examples=20)
@given(texts)
def test_reversing_every_document_only_exchanges_the_models(given_texts: Texts) -> None:
    documents = [document(text) for text in given_texts]
    flipped = [MARKERS.reversed(ids) for ids in documents]

    for model in (FIRST, SECOND):
        there, _ = losses_of(model, Direction.FORWARD, documents)
        back, _ = losses_of(model, Direction.BACKWARD, flipped)

        assert there.whole.nats_N == pytest.approx(back.whole.nats_N, rel=1e-5)
        assert there.nats_of_context_NB == pytest.approx(back.nats_of_context_NB, rel=1e-5)
        assert there.targets_of_context_NB.tolist() == back.targets_of_context_NB.tolist()
        assert there.bytes_N.tolist() == back.bytes_N.tolist()


@settings(max_examples=20)
@given(texts)
def test_the_loss_of_a_short_document_is_its_negative_log_probability(
    given_texts: Texts,
) -> None:
    documents = [document(text[: CONTEXT_TOKENS - 1]) for text in given_texts]

    for direction in Direction:
        losses, num_windows = losses_of(FIRST, direction, documents)

        assert num_windows == len(documents)
        for number, ids in enumerate(documents):
            read = ids if direction is Direction.FORWARD else MARKERS.reversed(ids)
            ids_T = torch.from_numpy(read)
            with torch.no_grad():
                logits_TV = FIRST.logits(
                    ids_T[:-1],
                    torch.arange(len(ids_T) - 1),
                    Segments.from_lengths((len(ids_T) - 1,), torch.device("cpu")),
                )
            nats = F.cross_entropy(logits_TV, ids_T[1:], reduction="sum").item()
            assert losses.whole.nats_N[number] == pytest.approx(nats, rel=1e-4)
            assert losses.whole.targets_N[number] == len(ids) - 1
            assert losses.bytes_N[number] == 2 * (len(ids) - 2)


def test_a_target_is_counted_at_its_position_in_the_text() -> None:
    """The forward model scores all positions but the first, the backward one all but the last."""
    documents = [document([5, 6, 7, 8, 9, 10])]  # eight positions

    forward, _ = losses_of(FIRST, Direction.FORWARD, documents)
    backward, _ = losses_of(FIRST, Direction.BACKWARD, documents)

    # The centers of eight positions are in parts 0, 1, 3, 4, 5, 6, 8 and 9 of ten.
    assert np.flatnonzero(forward.targets_of_part_NP[0]).tolist() == [1, 3, 4, 5, 6, 8, 9]
    assert np.flatnonzero(backward.targets_of_part_NP[0]).tolist() == [0, 1, 3, 4, 5, 6, 8]
    for losses in (forward, backward):
        assert losses.nats_of_part_NP.sum() == pytest.approx(losses.whole.nats_N.sum())
        assert losses.targets_of_context_NB[0].tolist() == [1, 1, 2, 3]


def test_both_stored_directions_contain_the_same_documents(
    tmp_path: Path, source: Path, codec: Callable[..., TextCodec]
) -> None:
    """So losses do not depend on how shards are stored."""
    found = {}
    for direction in Direction:
        of_direction = codec(direction)
        folder = tmp_path / direction.value
        chosen = make_settings(source, of_direction, val_fraction=0.5)
        build_shards(chosen, of_direction, folder, workers=1)
        documents = [ids.tolist() for ids in documents_of(DataSet.open(folder), "val")]
        found[direction] = documents

    assert found[Direction.FORWARD] == found[Direction.BACKWARD]
    assert len(found[Direction.FORWARD]) > 50
    forward = codec(Direction.FORWARD)
    assert all(ids[0] == forward.begin_id for ids in found[Direction.BACKWARD])
