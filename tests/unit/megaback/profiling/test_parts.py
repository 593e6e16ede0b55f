"""Operations belong to a part of a step by their names."""

import pytest

from megaback.profiling.parts import OTHER, part_of


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::mm", "matrix products"),
        ("nvjet_tst_128x256_64x4", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("c10d::allreduce_", "communication"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("megaback:communication", "communication"),
        ("cudaStreamSynchronize", "host waits"),
        ("aten::nll_loss_forward", "head and loss"),
        ("triton_poi_fused_mul_silu_0", "compiled elementwise"),
        ("CompiledFunctionBackward", "compiled elementwise"),  # and the next, of a trace on a CPU
        ("Torch-Compiled Region: 14/0", "compiled elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "copies and casts"),
        ("aten::mul", "elementwise"),
        ("megaback:forward", OTHER),
    ],
)
def test_an_operation_belongs_to_a_part(operation: str, part: str) -> None:
    assert part_of(operation) == part
