"""What devices and their hosts can do: peak arithmetic, precisions, memory."""

import psutil
import torch

from data_pipeline.errors import BackendError

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets.
_BF16_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
}


def device_peak_flops(device: torch.device) -> float | None:
    """The bf16 peak of a known GPU, else None. Longer names are tried first."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known in sorted(_BF16_PEAK_FLOPS, key=len, reverse=True):
        if known in name:
            return _BF16_PEAK_FLOPS[known]
    return None


def require_precision(precision: str, device: torch.device) -> None:
    """Raises BackendError for a precision that the device lacks."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise BackendError(
            f"training.precision is bf16, which {torch.cuda.get_device_name(device)} does not "
            "compute in; use fp32"
        )


_OPTIMIZER_BYTES = 16  # fp32 weight, gradient and two moments
_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


def require_host_memory(
    offload: str, num_parameters: int, precision: str, ranks_here: int, world_size: int
) -> None:
    """See that what is offloaded by this host's ranks fits into its memory.

    Raises BackendError with both numbers.
    """
    if offload == "none":
        return
    bytes_a_parameter = _OPTIMIZER_BYTES
    if offload == "parameters":
        bytes_a_parameter += _WEIGHT_BYTES[precision]
    needed = num_parameters * bytes_a_parameter * ranks_here / world_size
    available = psutil.virtual_memory().available
    if needed > available:
        raise BackendError(
            f"zero.offload {offload} keeps {needed / 1e9:.1f} GB in this host's memory, of which "
            f"{available / 1e9:.1f} GB are free; use more hosts, or zero.offload=none"
        )
