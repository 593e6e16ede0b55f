"""Scaling rules: against the small configs, against published models, and a count of FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megaback.config_file import load_config
from megaback.optim.muon import orthogonalized
from megaback.planning import scaling_rules as rules
from megaback.planning.flops import ModelSize, flops_per_token
from megaback.planning.matrix_shares import matrices_of
from tests.helpers.paths import ROOT


@pytest.mark.parametrize(
    ("path", "vocab_size"),
    [("configs/demo.yaml", 2048), ("configs/arrow.yaml", 4096)],
)
def test_rates_are_those_of_the_small_configs(path: str, vocab_size: int) -> None:
    config = load_config(ROOT / path)
    parameters = rules.scaling_parameters(config.model, vocab_size)

    assert rules.learning_rate(parameters) == pytest.approx(config.optimizer.learning_rate, rel=0.2)


@pytest.mark.parametrize(("width", "depth", "head"), [(128, 4, 32), (768, 12, 64), (4096, 32, 128)])
def test_shapes_are_those_of_known_models(width: int, depth: int, head: int) -> None:
    assert width in rules.widths()
    assert rules.usual_depth(width) == pytest.approx(depth)
    assert rules.num_heads(width) == width // head


def test_depth_grows_with_width_and_heads_fit() -> None:
    depths = [rules.usual_depth(width) for width in rules.widths()]
    assert depths == sorted(depths)
    heads = {width: width / rules.num_heads(width) for width in rules.widths()}
    assert all(not size % 2 for size in heads.values())
    assert all(20 < size < 50 for width, size in heads.items() if width < 256)
    assert {size for width, size in heads.items() if width >= 256} == {64, 128}


def test_embeddings_are_tied_where_they_would_be_most_of_the_model() -> None:
    small, large = rules.shape_of(128, 4, 4096), rules.shape_of(1024, 13, 4096)
    assert (small.tie_embeddings, large.tie_embeddings) == (True, False)
    for shape in (small, large):
        size = ModelSize.of(shape, 4096)
        assert rules.scaling_parameters(shape, 4096) == size.matrices + size.embedding


def test_the_flops_of_muon_are_those_of_its_matrix_products() -> None:
    shape = rules.shape_of(48, 1, 512)
    matrices = [torch.ones(size) for size in matrices_of(shape)]
    with FlopCounterMode(display=False) as counter:
        orthogonalized(matrices)

    assert rules.muon_flops(shape) == counter.get_total_flops()


def test_the_smallest_batch_leaves_muon_a_third_of_a_step() -> None:
    shape = rules.shape_of(320, 6, 4096)
    per_token = flops_per_token(shape, 4096, 256.5)

    update, passes = rules.muon_flops(shape), rules.min_batch_tokens(shape, per_token) * per_token

    assert update / (update + passes) == pytest.approx(1 / 3)


def test_batches_grow_and_rates_fall_with_size() -> None:
    assert rules.batch_tokens(8e6) == pytest.approx(4 * rules.batch_tokens(1e6))
    assert rules.learning_rate(8e6) == pytest.approx(rules.learning_rate(1e6) / 2)
    contexts = [rules.context_tokens(parameters) for parameters in (1e6, 1e7, 1e8, 5e8, 1e9)]
    assert contexts == [256, 512, 1024, 2048, 4096]
