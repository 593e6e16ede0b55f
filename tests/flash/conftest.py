"""Makes flash-attn accept CPU tensors, for interpreted Triton kernels."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def kernels_on_cpu() -> None:
    """Register flash-attn's operators, which it registers for CUDA only, for the CPU."""
    from flash_attn import flash_attn_interface

    for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
        operator = getattr(flash_attn_interface, name)
        operator.register_kernel("cpu")(operator._init_fn)
