"""Attention within segments, as PyTorch's sdpa computes it in groups, against the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megaback.model.attention import (
    SegmentGroups,
    Segments,
    _grouped,
    padded_boundaries,
    sdpa_attention,
)
from megaback.model.attention_choice import definition

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(tuple)


class PaddedSegments(Segments):
    """Segments that are grouped as on a GPU."""

    @property
    def groups(self) -> SegmentGroups:
        return _grouped(np.array(self.lengths), CPU, pads=True)


def outputs_and_gradients(attend: object, segments: Segments, num_kv_heads: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(segments.lengths)
    heads = [
        torch.randn(num_tokens, number, 8, generator=generator, dtype=torch.float64)
        for number in (4, num_kv_heads, num_kv_heads, 4)
    ]
    inputs = [one.requires_grad_() for one in heads[:3]]
    attended_THE = attend(*inputs, segments)  # type: ignore[operator]
    return [attended_THE, *torch.autograd.grad(attended_THE, inputs, heads[3])]


@pytest.mark.parametrize("kind", [Segments, PaddedSegments])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "lengths",
    [(1,), (37,), (5, 5, 5), (1, 40, 7, 1, 40, 3, 17, 18)],
    ids=["one token", "one document", "equal", "uneven"],
)
def test_sdpa_equals_the_definition_in_every_segment(
    lengths: tuple[int, ...], num_kv_heads: int, kind: type[Segments]
) -> None:
    segments = kind(Segments.from_lengths(lengths, CPU).cu_seqlens, lengths, max(lengths))

    found = outputs_and_gradients(sdpa_attention, segments, num_kv_heads)

    exact = outputs_and_gradients(definition, segments, num_kv_heads)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=1e-12)


@given(lengths=LENGTHS, pads=st.booleans())
def test_every_token_has_one_place_in_a_group_of_its_segment(
    lengths: tuple[int, ...], pads: bool
) -> None:
    groups = _grouped(np.array(lengths), CPU, pads=pads)

    num_places = sum(number * length for number, length in groups.shapes)
    if groups.source_P is None or groups.place_T is None:
        assert groups.shapes == ((len(lengths), lengths[0]),)
        return
    source, place = groups.source_P.numpy(), groups.place_T.numpy()
    assert len(source) == num_places
    assert (source[place] == np.arange(sum(lengths))).all()
    segment = np.repeat(np.arange(len(lengths)), lengths)
    of_places = np.repeat(
        np.arange(len(lengths)), [size for number, size in groups.shapes for _ in range(number)]
    )
    of_tokens = of_places[place]  # each segment's tokens are in one run of places, in order
    assert all(len(set(of_tokens[segment == one])) == 1 for one in range(len(lengths)))


@given(lengths=LENGTHS)
def test_a_gpu_computes_few_calls_and_little_padding(lengths: tuple[int, ...]) -> None:
    groups = _grouped(np.array(lengths), CPU, pads=True)

    assert len(groups.shapes) <= 18  # of 300 possible lengths
    assert all(
        padded < length + max(16, length / 4)
        for length, padded in zip(
            sorted(lengths),
            sorted(size for number, size in groups.shapes for _ in range(number)),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("num_segments", "padded"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (140, 256)]
)
def test_boundaries_are_padded_with_empty_segments(num_segments: int, padded: int) -> None:
    boundaries = np.arange(num_segments + 1, dtype=np.int32) * 7

    found = padded_boundaries(boundaries)

    assert found.dtype == np.int32
    assert np.diff(found).tolist() == [7] * num_segments + [0] * (padded - num_segments)
