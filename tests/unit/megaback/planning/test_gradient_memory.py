"""Memory of gradients by stage, precision and number of reductions."""

from dataclasses import replace

import pytest

from megaback.planning.gradient_memory import GradientMemory, GradientSetting, gradient_memory

TOTAL, KEPT, BUCKET, MATRIX, RANKS = 1_000, 300, 100, 80, 4
BF16 = GradientSetting(
    stage=2,
    weight_bytes=2,
    accumulator_bytes=2,
    accumulates=True,
    reduces_once=False,
    overlaps=False,
    is_offloaded=False,
    ranks=RANKS,
)


def memory(**changes: object) -> GradientMemory:
    return memory_of(MATRIX, **changes)


def memory_of(matrix: int, **changes: object) -> GradientMemory:
    setting = replace(BF16, **changes)  # type: ignore[arg-type]
    return gradient_memory(setting, TOTAL, KEPT, BUCKET, matrix)


@pytest.mark.parametrize(
    ("stage", "last_bytes"), [(1, 4 * TOTAL), (2, 4 * TOTAL / RANKS), (3, 0)], ids=str
)
def test_fp32_gradients_are_whole_at_stage_1_and_a_share_at_the_others(
    stage: int, last_bytes: float
) -> None:
    found = memory(stage=stage, accumulator_bytes=4)

    assert found.last == found.earlier == last_bytes  # those of stage 3 are always allocated
    assert memory(stage=stage, accumulator_bytes=4, accumulates=False).earlier == 0


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("accumulator_bytes", [2, 4])
def test_a_single_reduction_needs_a_whole_gradient(stage: int, accumulator_bytes: int) -> None:
    found = memory(stage=stage, accumulator_bytes=accumulator_bytes, reduces_once=True)

    assert found.last == found.earlier == accumulator_bytes * TOTAL


def test_bf16_gradients_of_stage_2_are_added_to_those_of_earlier_micro_batches() -> None:
    found = memory()

    assert (found.earlier, found.last) == (2 * KEPT, 4 * KEPT)


def test_the_optimizer_gets_fp32_gradients_without_a_copy() -> None:
    assert memory(accumulator_bytes=4).update_bytes == 0
    assert memory(accumulator_bytes=4, stage=3).update_bytes == 4
    assert memory().update_bytes == memory(stage=3).update_bytes == 2 + 4


@pytest.mark.parametrize("stage", [1, 2])
def test_overlap_needs_a_second_bucket(stage: int) -> None:
    assert memory(stage=stage, overlaps=True).bucket == memory(stage=stage).bucket + 2 * BUCKET


def test_what_is_reduced_at_stage_2_is_joined_a_bucket_or_a_larger_matrix() -> None:
    assert memory().bucket == 2 * (BUCKET + BUCKET)
    assert memory_of(3 * BUCKET).bucket == 2 * (BUCKET + 3 * BUCKET)
    assert memory_of(3 * BUCKET, ranks=1).bucket == 2 * BUCKET


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_gradients_in_bf16_are_not_on_the_device(stage: int) -> None:
    assert memory(stage=stage, is_offloaded=True).last == 0
