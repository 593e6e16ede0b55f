"""Parameter counts and FLOPs compared with the model's, attended tokens with those of real rows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.loading.rows import Batch
from megaback.config import ModelSection
from megaback.config_file import load_config
from megaback.config_finetune import LoraSection
from megaback.data import open_data
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.model.lora import add_adapters
from megaback.planning.flops import ModelSize, attended_tokens, flops_per_token

VOCAB_SIZE = 97
CPU = torch.device("cpu")


def shape_of(**changes: object) -> ModelSection:
    fields = {"num_layers": 3, "width": 64, "num_heads": 4, **changes}
    return ModelSection.model_validate(fields).resolved()


def counted_flops(model: ReverseGPT, lengths: Sequence[int]) -> float:
    """FLOPs of a forward and backward pass on documents, as PyTorch counts matrix products.

    Its math kernel computes the whole square of a document's scores; entries above the diagonal, 12
    FLOPs per dimension, head and layer, are subtracted.
    """
    shape, tokens = model.shape, sum(lengths)
    ids_T = torch.randint(0, VOCAB_SIZE, (tokens,), generator=torch.manual_seed(0))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    segments = Segments.from_lengths(tuple(lengths), CPU)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids_T, ids_T, positions_T, segments).sum().backward()
    above = sum(length * (length - 1) / 2 for length in lengths)
    return counter.get_total_flops() - 12 * shape.num_layers * shape.query_width * above


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(None, None), (2, 24)])
@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("lengths", [(128,), (5, 100, 1, 60)], ids=["one", "packed"])
def test_flops_per_token_equal_those_that_pytorch_counts(
    lengths: tuple[int, ...], tie_embeddings: bool, num_kv_heads: int | None, head_dim: int | None
) -> None:
    changes = {"num_kv_heads": num_kv_heads, "head_dim": head_dim}
    shape = shape_of(tie_embeddings=tie_embeddings, **changes)
    model = ReverseGPT(shape, VOCAB_SIZE).train()
    tokens = sum(lengths)
    attended = sum(length * (length + 1) / 2 for length in lengths) / tokens

    expected = tokens * flops_per_token(shape, VOCAB_SIZE, attended)

    assert counted_flops(model, lengths) == pytest.approx(expected, rel=0.001)


def test_flops_of_lora_have_no_gradients_of_frozen_weights() -> None:
    shape = shape_of(num_layers=6)
    targets = ("q_proj", "k_proj", "v_proj", "down_proj")
    lora = LoraSection(rank=8, target_modules=targets)
    model = ReverseGPT(shape, VOCAB_SIZE).train()
    add_adapters(model, lora)

    counted = counted_flops(model, (128,))

    # The input of the first adapters needs no gradient, which the plan counts.
    first = 2 * shape.width * (shape.query_width + 2 * shape.kv_width + 3 * 8)
    planned = flops_per_token(shape, VOCAB_SIZE, 64.5, lora)
    assert counted == pytest.approx(128 * (planned - first), rel=0.001)
    assert planned < 0.8 * flops_per_token(shape, VOCAB_SIZE, 64.5)


def batches_of(
    shards: Path, folder: Path, context_tokens: int, rows: str
) -> tuple[list[Batch], float]:
    """An epoch of rows, and the run's mean number of attended tokens."""
    fields = {
        "run": str(folder / "run"),
        "data": {"shards": str(shards), "threads": 0, "rows": rows},
        "model": {"num_layers": 1, "width": 8, "num_heads": 1},
        "batch": {
            "context_tokens": context_tokens,
            "global_batch_rows": 4,
            "micro_batch_rows": 4,
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {"epochs": 1},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    data = open_data(load_config(path), 0, 1)
    batches = [batch for step in range(data.total_steps) for batch in data.training.at(step)]
    return batches, data.attended_tokens()


@pytest.mark.parametrize(
    ("context_tokens", "rows"), [(64, "stream"), (512, "stream"), (64, "documents")]
)
def test_a_runs_flops_are_within_2_percent_of_those_of_its_rows(
    context_tokens: int, rows: str, tiny_shards: Path, tmp_path: Path
) -> None:
    batches, attended = batches_of(tiny_shards, tmp_path, context_tokens, rows)
    lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in batches]).astype(float)
    found = float((lengths * (lengths + 1) / 2).sum() / lengths.sum())
    shape = shape_of(width=256)

    assert flops_per_token(shape, 8_888, attended) == pytest.approx(
        flops_per_token(shape, 8_888, found), rel=0.02
    )


@given(length=st.integers(1, 40), context_tokens=st.integers(1, 24))
def test_attended_tokens_are_the_mean_over_all_positions_of_a_row_boundary(
    length: int, context_tokens: int
) -> None:
    total = 0
    for offset in range(context_tokens):  # of the document's first token in its row
        place = 0
        for token in range(length):
            is_edge = (offset + token) % context_tokens == 0
            place = 1 if is_edge else place + 1
            total += place

    expected = total / (length * context_tokens)
    assert attended_tokens(length, context_tokens) == pytest.approx(expected)


def test_tokens_of_an_infinite_document_attend_to_half_a_row() -> None:
    assert attended_tokens(1e12, 1024) == pytest.approx(512.5)


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1, "head_dim": 24}, {"qk_norm": False}])
@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_parameter_counts_equal_the_models(
    tie_embeddings: bool, changes: dict[str, object]
) -> None:
    shape = shape_of(tie_embeddings=tie_embeddings, **changes)
    model = ReverseGPT(shape, VOCAB_SIZE)
    matrices = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim == 2 and "layers" in name
    )

    size = ModelSize.of(shape, VOCAB_SIZE)

    assert (size.total, size.matrices) == (model.num_parameters(), matrices)
