"""Lets flash-attn take tensors on a CPU, as it can where its Triton kernels are interpreted."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def kernels_on_cpu() -> None:
    """flash-attn registers its operators for CUDA alone, whatever runs them."""
    from flash_attn import flash_attn_interface

    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        operator = getattr(flash_attn_interface, name)
        operator.register_kernel("cpu")(operator._init_fn)
