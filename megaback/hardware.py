"""Peak arithmetic of devices, for the model FLOPs utilisation."""

import torch

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
