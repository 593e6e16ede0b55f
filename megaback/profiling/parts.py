"""Parts of a training step, by the names of the operations that a profiler records.

Used by `megaback profile` and benchmarks/train_step.py.
"""

LOSS = "head and loss"
PARTS = (
    ("host waits", ("Synchronize", "aten::item", "aten::_local_scalar_dense", "::wait", "_wait")),
    (
        "communication",
        (
            "megaback:communication",
            "gloo",
            "nccl",
            "c10d",
            "allreduce",
            "all_reduce",
            "allgather",
            "all_gather",
            "reduce_scatter",
            "all_to_all",
            "broadcast",
        ),
    ),
    ("attention", ("scaled_dot_product", "flash", "fmha", "varlen", "efficient_attention")),
    (
        "matrix products",
        (
            "aten::mm",
            "aten::addmm",
            "aten::bmm",
            "mkldnn",
            "aten::linear",
            "gemm",
            "cutlass",
            "nvjet",
            "cublas",
        ),
    ),
    (LOSS, ("log_softmax", "nll_loss", "cross_entropy", "logsumexp")),
    ("optimizer", ("adamw", "adam", "aten::_foreach", "multi_tensor", "lerp", "clip")),
    ("norms", ("rms_norm", "layer_norm", "aten::rsqrt", "linalg_vector_norm", "aten::norm")),
    (
        "compiled elementwise",
        ("graph_", "cpp_fused", "triton_", "CompiledFunction", "Torch-Compiled"),
    ),
    (
        "copies and casts",
        (
            "aten::copy_",
            "aten::cat",
            "aten::fill_",
            "aten::zero_",
            "Memcpy",
            "Memset",
            "aten::empty",
            "aten::clone",
            "aten::to",
        ),
    ),
    (
        "elementwise",
        (
            "aten::mul",
            "aten::add",
            "aten::sub",
            "aten::div",
            "aten::silu",
            "aten::neg",
            "aten::pow",
            "aten::sum",
            "aten::mean",
            "aten::exp",
            "aten::sigmoid",
            "elementwise",
            "reduce_kernel",
            "aten::sqrt",
            "aten::index",
        ),
    ),
)
OTHER = "Python and the rest"


def part_of(operation: str) -> str:
    """The part that an operation belongs to, by its name."""
    return next((name for name, words in PARTS if any(word in operation for word in words)), OTHER)
