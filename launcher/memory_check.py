"""Check before a run is queued that it fits into the memory of its devices, if these are known."""

import re
import subprocess

from megaback.config import Config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import Device, devices_named_like, find_device
from megaback.planning.plan import DEFAULT_MFU, plan_run, require_room
from megaback.planning.run_settings import Cluster

_GPUS = re.compile(r"gpu:(?:([^:,()\s]+):)?\d+")


def check_memory(
    config: Config,
    nodes: int,
    ranks_per_node: int,
    *,
    uses_gpus: bool,
    device_name: str | None,
    partition: str | None,
) -> str:
    """Summary of the run's memory on its devices, in one line.

    Raises NotEnoughMemoryError for a run that cannot fit, ConfigError for an unknown device.
    """
    name = device_name or config.hardware.device_name
    if not uses_gpus:
        return "memory: not checked, since the run requests no GPUs"
    if name is not None:
        device, by = find_device(name), "as given"
    else:
        kinds, problem = gpus_of_partition(partition)
        found = largest_device(kinds)
        if found is None:
            return (
                f"memory: not checked, since {problem or unknown_kinds(kinds)}; give --device-name"
            )
        device, by = found, f"the largest that {', '.join(sorted(kinds))} may be in Slurm"
    facts = run_facts(config, None, None)
    cluster = Cluster(nodes, ranks_per_node, device)
    plan = plan_run(config, facts, cluster, DEFAULT_MFU)
    require_room(config, facts, cluster, plan)
    return (
        f"memory: {plan.memory.parts.total / 1e9:.1f} GB of the {device.memory_bytes / 1e9:.0f} of "
        f"{device.name} ({by})"
    )


def gpus_of_partition(partition: str | None) -> tuple[set[str], str | None]:
    """Types of a partition's GPUs in Slurm, empty for unnamed ones; or why there are none."""
    command = ["sinfo", "--noheader", "--format=%P|%G"]
    if partition is not None:
        command.append(f"--partition={partition}")
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return set(), "sinfo is not installed"
    except subprocess.TimeoutExpired:
        return set(), "sinfo timed out"
    if listing.returncode:
        return set(), f"sinfo failed: {' '.join(listing.stderr.split())}"
    lines = [line.split("|", 1) for line in listing.stdout.splitlines() if "|" in line]
    if partition is None:  # the default one has a star
        lines = [line for line in lines if line[0].endswith("*")]
    kinds = {kind for _, resources in lines for kind in _GPUS.findall(resources)}
    return kinds, None if kinds else "Slurm names no GPUs in the partition"


def largest_device(kinds: set[str]) -> Device | None:
    """The device with the most memory that matches one of the types; None if any is unknown."""
    if not kinds or not all(devices_named_like(kind) for kind in kinds):
        return None
    found = [device for kind in kinds for device in devices_named_like(kind)]
    return max(found, key=lambda device: device.memory_bytes)


def unknown_kinds(kinds: set[str]) -> str:
    """Message about unknown types."""
    unknown = sorted(kind for kind in kinds if not devices_named_like(kind))
    if unknown == [""]:
        return "Slurm does not name the type of the partition's GPUs"
    return f"the GPU type {', '.join(filter(None, unknown))} is unknown"
