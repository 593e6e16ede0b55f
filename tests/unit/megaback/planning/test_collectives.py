"""Number of a step's collectives: bucketing, places, and what they depend on."""

import pytest

from megaback.config import ModelSection, OptimizerSection
from megaback.planning.collectives import StepCalls, step_calls
from megaback.planning.memory import Setting
from megaback.planning.network import Traffic
from megaback.planning.sequence_exchange import SequenceExchange

SHAPE = ModelSection(num_layers=12, width=768, num_heads=12)
VOCAB_SIZE = 50_304
"""The embedding, of 38.6 million weights, is larger than a bucket of an eighth of the model."""


def calls(
    stage: int,
    *,
    ranks: int = 8,
    micro_batches: int = 2,
    reduction: str = "all_reduce",
    **more: object,
) -> StepCalls:
    setting = Setting(
        shape=SHAPE,
        vocab_size=VOCAB_SIZE,
        micro_batch_tokens=1024,
        accumulates=micro_batches > 1,
        ranks=ranks,
        ranks_per_node=8,
        stage=stage,
        precision="bf16",
        checkpointing="none",
        optimizer="adamw",
        offload="none",
        loss_chunk_tokens=1024,
        attention="flash_attn",
        saves_while_training=False,
        is_cpu=False,
        **more,  # type: ignore[arg-type]
    )
    return step_calls(setting, OptimizerSection(learning_rate=1e-3), micro_batches, reduction)


def test_a_rank_alone_makes_none() -> None:
    assert calls(2, ranks=1) == StepCalls()


def test_gradients_of_stages_2_and_3_are_reduced_for_every_micro_batch_unless_once() -> None:
    for stage in (2, 3):
        one, eight = (calls(stage, micro_batches=count).gradients for count in (1, 8))
        assert eight == 8 * one
        assert calls(stage, micro_batches=8, reduces_once=True).gradients <= one + 1
    assert calls(1, micro_batches=8).gradients == calls(1, micro_batches=1).gradients


def test_gradients_larger_than_a_bucket_have_one_of_their_own() -> None:
    """By hand: buckets have 20.3 million weights, and the blocks' matrices 84.9 million."""
    assert calls(1).gradients == 1 + 5 + 1 + 1  # embedding, matrices, head, norms
    # Slices are as long as buckets: each reaches into two, and all ranks have norms.
    assert calls(1, reduction="reduce").gradients == 2 + 5 * 2 + 2 + 8
    assert calls(0).gradients == 1


def test_replicas_are_averaged_once_per_step_in_slices_of_a_node() -> None:
    flat = calls(2, ranks=64)
    by_node = calls(2, ranks=64, is_hierarchical=True)

    assert flat.replicas == 0
    assert by_node.replicas == 2 + 1  # one slice of each group, and the norm
    assert by_node.replicas == calls(2, ranks=64, micro_batches=8, is_hierarchical=True).replicas
    assert calls(2, ranks=8, is_hierarchical=True) == calls(2, ranks=8)


def test_copies_within_a_node_serve_all_micro_batches_but_the_first() -> None:
    flat, by_node = calls(3, ranks=64), calls(3, ranks=64, is_hierarchical=True)

    assert (by_node.weights, by_node.copied_weights) == (flat.weights // 2, flat.weights // 2)
    assert flat.updated_weights == by_node.updated_weights == 2 * 12 + 2 * 12 + 1  # all norms


@pytest.mark.parametrize("nodes", [1, 8])
def test_places_have_all_calls(nodes: int) -> None:
    traffic = Traffic(8.0, 4.0, 2.0, "all-reduce", node=Traffic(6.0, 4.0, 2.0, "all-reduce"))
    exchange = SequenceExchange(1.0, 10, is_within_node=True)
    traffic = Traffic(
        **{**vars(traffic), "node": traffic.node if nodes > 1 else None, "sequence": exchange}
    )
    found = StepCalls(gradients=5, replicas=2, weights=3, exchange=2, norms=3, losses=1)

    places = found.by_place(traffic, nodes)

    between = {"all-reduce": 3} if nodes > 1 else {}
    assert places["between_nodes"] == between
    assert places["within_node"]["all-to-all"] == 2 + 10
    groups = found.by_group(traffic)
    assert sum(sum(numbers.values()) for numbers in places.values()) == sum(groups.values()) == 26
