"""Assumed rates of GPUs and hosts: the share of a data sheet's rate that training reaches.

Every assumption of `planning.step_time` is a row of `ASSUMPTIONS`, with its source. Loads no torch.
"""

from dataclasses import dataclass

from megaback.planning.devices import Device


@dataclass(frozen=True)
class Assumption:
    """An assumed number."""

    what: str
    value: float
    source: str


_FITTED = "fitted: docs/scale.md, published speeds"

ASSUMPTIONS = {
    "MATMUL_SHARE": Assumption(
        "share of the peak FLOP/s that large matrix products reach", 0.74, _FITTED
    ),
    "HOPPER_MATMUL_SHARE": Assumption(
        "the same on H100, H200 and B200, which their power limits", 0.6, _FITTED
    ),
    "ATTENTION_SHARE": Assumption(
        "share of the peak that attention reaches, counted without masked pairs", 0.35, _FITTED
    ),
    "HOPPER_ATTENTION_SHARE": Assumption("the same on H100, H200 and B200", 0.2, _FITTED),
    "MEMORY_SHARE": Assumption(
        "share of the memory's bandwidth that operations bound by it reach", 0.8, "not measured"
    ),
    "EAGER_PASSES": Assumption(
        "ratio of the bytes that such operations move without and with torch.compile",
        2.0,
        _FITTED,
    ),
    "LINK_SHARE": Assumption(
        "share of the bandwidth within a node that NCCL reaches: 370 of 450 GB/s",
        0.82,
        "NVIDIA/nccl-tests#212, a maintainer of NCCL",
    ),
    "NETWORK_SHARE": Assumption(
        "share of the bandwidth between nodes that NCCL reaches: 46 to 48 of 50 GB/s",
        0.94,
        "NVIDIA/nccl-tests#290, a maintainer of NCCL",
    ),
    "CALL_LATENCY_S": Assumption(
        "seconds that a collective takes besides, per doubling of the ranks", 1e-5, "not measured"
    ),
    "OVERLAP_SHARE": Assumption(
        "share of a pass that can hide communication, which begins after the first layer",
        0.9,
        "not measured",
    ),
    "HOST_LINK_BYTES": Assumption(
        "bytes per second between a device and its host: PCIe 4.0 x16, at 80%",
        25e9,
        "PCI-SIG's 32 GB/s",
    ),
    "HOST_MEMORY_BYTES": Assumption(
        "bytes per second of a node's host memory, for an offloaded optimizer",
        200e9,
        "not measured",
    ),
    "LAUNCH_S": Assumption(
        "seconds of the host to launch a kernel from Python", 8e-6, "not measured"
    ),
    "STAGE3_HOST_S": Assumption(
        "seconds of the host per layer and micro-batch for the hooks of ZeRO 3",
        7e-3,
        "measured on one core of a CPU by megaback rehearse, 12 layers without arithmetic",
    ),
    "STEP_HOST_S": Assumption(
        "seconds of a step in which the device waits for the host", 5e-3, "not measured"
    ),
}


def assumed(name: str) -> float:
    """Value of an assumption."""
    return ASSUMPTIONS[name].value


def matmul_share(device: Device) -> float:
    """Share of the peak that large matrix products reach on a device."""
    return assumed("HOPPER_MATMUL_SHARE" if _is_hopper(device) else "MATMUL_SHARE")


def attention_share(device: Device) -> float:
    """Share of the peak that attention reaches on a device."""
    return assumed("HOPPER_ATTENTION_SHARE" if _is_hopper(device) else "ATTENTION_SHARE")


def _is_hopper(device: Device) -> bool:
    """Whether a device is of Hopper's generation or newer."""
    return device.name.startswith(("h100", "h200", "b200"))
