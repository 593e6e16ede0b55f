"""Known devices: peak FLOP/s, memory and bandwidth, by name. Loads no torch.

Figures are from the vendors' data sheets: dense arithmetic without sparsity, nominal memory (GB of
10**9 bytes) and its bandwidth, links in one direction. The network between nodes is that of the
vendor's eight-GPU server (DGX H100: 400 Gbit/s per GPU, DGX A100: 200), or 100 Gbit/s if there is
none; clusters differ.
"""

import difflib
import re
from dataclasses import dataclass, replace

from data_pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device. Rates are per second."""

    name: str
    memory_bytes: float
    bf16_flops: float | None
    fp32_flops: float | None
    """Peak outside tensor cores, where fp32 is computed here."""
    link_bytes: float
    """Bandwidth to the other devices of its node, in one direction."""
    network_bytes: float
    """Bandwidth to other nodes, in one direction: the device's share of the node's network."""
    memory_rate: float | None = None
    """Bandwidth of its memory, in bytes; None: unknown."""

    def peak_flops(self, precision: str) -> float | None:
        return self.bf16_flops if precision == "bf16" else self.fp32_flops

    def with_network(self, network_bytes: float) -> "Device":
        """The same device with another network."""
        return replace(self, network_bytes=network_bytes)

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU


CPU = "cpu"


def _gpu(
    name: str,
    memory_gb: float,
    memory_gb_per_s: float,
    bf16: float,
    fp32: float,
    link_gb: float,
    network_gbit: float = 100,
) -> Device:
    return Device(
        name=name,
        memory_bytes=memory_gb * 1e9,
        bf16_flops=bf16 * 1e12,
        fp32_flops=fp32 * 1e12,
        link_bytes=link_gb * 1e9,
        network_bytes=network_gbit * 1e9 / 8,
        memory_rate=memory_gb_per_s * 1e9,
    )


_GPUS = (
    _gpu("b200-180gb", 180, 8000, 2250, 75, 900, 400),
    _gpu("h200-141gb", 141, 4800, 989, 67, 450, 400),
    _gpu("h100-80gb", 80, 3350, 989, 67, 450, 400),
    _gpu("h100-nvl-94gb", 94, 3900, 835, 60, 300, 200),
    _gpu("h100-pcie-80gb", 80, 2000, 756, 51, 64, 200),
    _gpu("a100-80gb", 80, 2039, 312, 19.5, 300, 200),
    _gpu("a100-40gb", 40, 1555, 312, 19.5, 300, 200),
    _gpu("l40s-48gb", 48, 864, 362, 91.6, 32),
    _gpu("a10-24gb", 24, 600, 125, 31.2, 32),
    _gpu("l4-24gb", 24, 300, 121, 30.3, 32),
)
# V100s have no bf16: only fp32 runs can be planned for them.
_V100S = tuple(
    Device(
        name=f"v100-{memory_gb}gb",
        memory_bytes=memory_gb * 1e9,
        bf16_flops=None,
        fp32_flops=15.7e12,
        link_bytes=150e9,
        network_bytes=12.5e9,
        memory_rate=900e9,
    )
    for memory_gb in (32, 16)
)
DEVICES = {device.name: device for device in (*_GPUS, *_V100S)}


def find_device(name: str, memory_bytes: float | None = None) -> Device:
    """The device of a name such as `h100-80gb`, with another memory size if one is given.

    Raises ConfigError with the closest name.
    """
    device = DEVICES.get(name.lower())
    if device is None:
        close = difflib.get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? Known are" if close else "known are"
        raise ConfigError(f"unknown device {name!r}; {hint} {', '.join(DEVICES)} and {CPU}")
    return device if memory_bytes is None else replace(device, memory_bytes=memory_bytes)


def cpu_device(memory_bytes: float, peak_flops: float | None) -> Device:
    """A process's share of a machine without GPUs, whose links are the machine's memory."""
    return Device(
        name=CPU,
        memory_bytes=memory_bytes,
        bf16_flops=peak_flops,
        fp32_flops=peak_flops,
        link_bytes=10e9,
        network_bytes=1.25e9,
    )


def devices_named_like(kind: str) -> list[Device]:
    """Devices that a scheduler's name (`h100`, `nvidia_a100-sxm4-80gb`) may mean.

    All memory sizes are returned if the name does not have one.
    """
    words = re.split(r"[-_ ]+", kind.lower())
    families = {device.name.split("-")[0] for device in DEVICES.values()}
    family = next((word for word in words if word in families), None)
    if family is None:
        return []
    found = [device for device in DEVICES.values() if device.name.split("-")[0] == family]
    sized = [device for device in found if device.name.split("-")[-1] in words]
    for form in ("pcie", "nvl"):
        formed = [device for device in sized or found if form in device.name.split("-")]
        if form in words and formed:
            return formed
    return sized or found
