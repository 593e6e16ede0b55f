"""Preflight: checks of every node before the first step.

All ranks measure, gather the same facts and reach the same verdict. A problem that makes a run
wrong or impossible stops it with an error that names the node; one that makes it slow is a warning,
or an error if `hardware.preflight` is `strict`. `preflight.json` in the run's folder has all
measurements, `bad_nodes.txt` the nodes that prevented a start.
"""

import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from data_pipeline.common.atomic import write_text
from data_pipeline.errors import LaunchError, MegabackError, PreflightError, StorageError
from data_pipeline.loading.frame_store import FrameStore
from megaback.config import Config
from megaback.data import Data
from megaback.distributed.links import TIMEOUT_S, unconnected_ranks
from megaback.distributed.world import World
from megaback.faults.exit_record import read_bad_nodes
from megaback.faults.node_facts import RankFacts, rank_facts
from megaback.faults.shared_disk import DiskFacts, check_shared_disk
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.run_folder import BAD_NODES_NAME, PREFLIGHT_NAME

_LOG = logging.getLogger("megaback.faults")
# The cores of a CPU are shared with other processes; a GPU belongs to one rank.
_MIN_SPEED_RATIO = {"cuda": 0.8, "cpu": 0.4}
_MIN_MEMORY_RATIO = 0.7
_CLOCK_ROUNDS = 3
_ALL_REDUCE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
_ALL_REDUCE_TRIES = 3
_EXCHANGE = f"exchange data with its neighbors within {TIMEOUT_S:g} s"
_NCCL_ADVICE = (
    "NCCL_DEBUG=INFO prints the reason, NCCL_SOCKET_IFNAME and NCCL_IB_HCA select the network"
)


@dataclass(frozen=True)
class Finding:
    """A problem of a node."""

    check: str
    node: str
    stops: bool
    message: str


def preflight(config: Config, data: Data, world: World, fence: Fence = NO_FENCE) -> None:
    """Check all nodes, if the config enables it. Collective; the run's folder must be ours.

    Raises CollectiveExit on every rank: of a PreflightError, of a StorageError if no node can
    write, or of the error of a damaged shard.
    """
    wanted = config.hardware.preflight
    if wanted == "off" or (wanted == "auto" and world.size == 1):
        return
    started = time.monotonic()
    mine = rank_facts(world.rank, world.device)
    everyone = world.gather(mine, RankFacts)
    offsets_s = clock_offsets(world)
    fence.check()
    everyone = [replace(f, clock_offset_s=offsets_s[f.rank]) for f in everyone]
    disks = check_shared_disk(config.run, mine.node, world)
    refused = [disk.problem for disk in disks if disk.problem is not None]
    if len(refused) == len(disks):  # a problem of the disk, not of a node
        world.stop_if_any(StorageError(refused[0]))
    findings = compare_ranks(everyone, world.device.type, config.hardware.heartbeat_s)
    all_reduce_gb_s = None
    # A device that cannot multiply, a shared one or a broken link would hang in a collective.
    if world.size > 1 and not any(item.stops for item in findings):
        ranks_per_node = [facts.node for facts in everyone].count(everyone[0].node)
        unconnected = unconnected_ranks(world, ranks_per_node)
        if len(unconnected) == world.size:  # a fault of no node
            world.stop_if_any(LaunchError(f"no rank could {_EXCHANGE}; {_NCCL_ADVICE}"))
        findings += find_broken_links(everyone, unconnected)
        all_reduce_gb_s = None if unconnected else _all_reduce_gb_s(world)
    findings += compare_disks(disks)
    findings.sort(key=lambda item: not item.stops)
    stopping = [item for item in findings if item.stops or wanted == "strict"]
    world.run_collectively(
        _record,
        world,
        config.run,
        {
            "time": time.time(),
            "duration_s": time.monotonic() - started,
            "stops": bool(stopping),
            "findings": [asdict(item) for item in findings],
            "all_reduce_gb_s": all_reduce_gb_s,
            "disks": [asdict(disk) for disk in disks],
            "ranks": [asdict(facts) for facts in everyone],
        },
        sorted({item.node for item in stopping}),
        fence,
    )
    world.stop_if_any(_error_of(stopping))
    if world.is_first:
        for item in findings:
            _LOG.warning(item.message)
    _check_shards(data, config, world)


def compare_ranks(
    everyone: Sequence[RankFacts], device_type: str, max_skew_s: float
) -> list[Finding]:
    """Problems of the nodes, from the facts of all ranks."""
    findings = [
        Finding("device", facts.node, True, f"{_name(facts)}: its device {facts.problem}")
        for facts in everyone
        if facts.problem is not None
    ]
    owners: dict[tuple[str, str], RankFacts] = {}
    for facts in everyone:
        if facts.device_id is None:
            continue
        owner = owners.setdefault((facts.node, facts.device_id), facts)
        if owner is not facts:
            message = (
                f"{_name(facts)} has the GPU of rank {owner.rank}, {facts.device_id}; start one "
                "rank per GPU"
            )
            findings.append(Finding("device", facts.node, True, message))
    nodes = list({facts.node: facts for facts in reversed(everyone)}.values())[::-1]
    for library in nodes[0].versions:
        findings += _odd_ones(
            nodes,
            lambda facts, library=library: facts.versions.get(library, "none"),  # type: ignore[misc]
            "versions",
            True,
            f"has {library} {{}}, but the other nodes have {{}}; install the same on all nodes",
        )
    findings += _odd_ones(
        nodes,
        lambda facts: facts.device,
        "device",
        False,
        "has the device {}, but the other nodes have {}",
    )
    findings += _odd_ones(
        nodes,
        lambda facts: str(facts.num_devices),
        "device",
        False,
        "has {} "
        + ("GPUs" if device_type == "cuda" else "cores")
        + ", but the other nodes have {}",
    )
    usual_flops = statistics.median([facts.multiply_flops for facts in everyone])
    usual_bytes = statistics.median([facts.memory_free_bytes for facts in everyone])
    for facts in everyone:
        if facts.multiply_flops < _MIN_SPEED_RATIO[device_type] * usual_flops:
            message = (
                f"{_name(facts)} multiplies at {facts.multiply_flops / 1e9:,.1f} GFLOP/s, the "
                f"median rank at {usual_flops / 1e9:,.1f}, and every step waits for the slowest; "
                "check its other processes, temperature and clocks"
            )
            if facts.problem is None:
                findings.append(Finding("speed", facts.node, False, message))
        owns_memory = device_type == "cuda" or facts in nodes  # a host's is counted once
        if owns_memory and facts.memory_free_bytes < _MIN_MEMORY_RATIO * usual_bytes:
            message = (
                f"{_name(facts)} has {facts.memory_free_bytes / 1e9:,.1f} GB of memory free, the "
                f"median rank {usual_bytes / 1e9:,.1f} GB; check which other processes use it"
            )
            findings.append(Finding("memory", facts.node, False, message))
        if abs(facts.clock_offset_s) > max_skew_s:
            ahead = "ahead of" if facts.clock_offset_s > 0 else "behind"
            message = (
                f"the clock of {_name(facts)} is {abs(facts.clock_offset_s):,.1f} s {ahead} the "
                f"others', more than the heartbeat interval of {max_skew_s:g} s; synchronize the "
                "nodes' clocks by NTP"
            )
            findings.append(Finding("clock", facts.node, False, message))
    return findings


def compare_disks(disks: Sequence[DiskFacts]) -> list[Finding]:
    """Nodes that cannot use the run's folder, or have another folder at its path."""
    first, *others = disks
    unread = [(disk.node, disk.unread) for disk in others if disk.unread is not None]
    if len(unread) == len(others) > 1:
        unread = [
            (
                first.node,
                "writes files to the run's folder that no other node sees; `run` must be on a "
                "disk that all nodes share",
            )
        ]
    if not unread and first.unread is not None:
        unread = [(first.node, first.unread)]
    unwritten = [(disk.node, disk.problem) for disk in disks if disk.problem is not None]
    return [
        Finding("disk", node, True, f"node {node} {'cannot use the run: ' * is_write}{problem}")
        for is_write, found in ((True, unwritten), (False, unread))
        for node, problem in found
    ]


def find_broken_links(everyone: Sequence[RankFacts], unconnected: Sequence[int]) -> list[Finding]:
    """Findings of ranks that could not exchange data with their neighbors: both ends of a link."""
    return [
        Finding(
            "link",
            everyone[rank].node,
            True,
            f"{_name(everyone[rank])} could not {_EXCHANGE}; check the network adapters of this "
            f"node and the next; {_NCCL_ADVICE}",
        )
        for rank in unconnected
    ]


def clock_offsets(world: World) -> list[float]:
    """Offset of each rank's wall clock from the median, in seconds, by rank.

    The smallest of several rounds: ranks that wake late seem ahead.
    """
    rounds = []
    for _ in range(_CLOCK_ROUNDS):
        world.barrier()
        times = world.gather(wall_clock(), float)
        # With two ranks, the earlier clock is the reference.
        middle = statistics.median_low(times)
        rounds.append([moment - middle for moment in times])
    return [min(offsets, key=abs) for offsets in zip(*rounds, strict=True)]


def wall_clock() -> float:
    """Seconds since the epoch, by this node's clock."""
    return time.time()


def _all_reduce_gb_s(world: World) -> float:
    """Bus bandwidth of all-reduce in GB/s, as NVIDIA's nccl-tests define it.

    The bytes that each rank sends and receives, 2 (n - 1) / n of the tensor, per second.
    """
    num_bytes = _ALL_REDUCE_BYTES[world.device.type]
    tensor = torch.zeros(num_bytes // 4, device=world.device)
    seconds = []
    for _ in range(1 + _ALL_REDUCE_TRIES):  # the first one opens connections
        world.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        seconds.append(time.perf_counter() - started)
    moved_bytes = 2 * (world.size - 1) / world.size * num_bytes
    return moved_bytes / max(world.gather(min(seconds[1:]), float)) / 1e9


def _check_shards(data: Data, config: Config, world: World) -> None:
    """Decode one frame of each data set per rank, different ones if there are enough."""
    if config.data.on_bad_frame == "stop":
        world.run_collectively(_read_frames, data, world)


def _read_frames(data: Data, world: World) -> None:
    for stream in data.streams:
        frames = FrameStore(stream.rows.frames.data_set, "train", keep_frames=1)
        frames.frame(world.rank * frames.num_frames // world.size)


def _odd_ones(
    nodes: Sequence[RankFacts],
    value_of: Callable[[RankFacts], str],
    check: str,
    stops: bool,
    message: str,
) -> list[Finding]:
    """Findings of nodes whose value is not the most frequent; at a tie, the first node's is."""
    values = [value_of(facts) for facts in nodes]
    usual = max(values, key=Counter(values).__getitem__)
    return [
        Finding(check, facts.node, stops, f"node {facts.node} {message.format(value, usual)}")
        for facts, value in zip(nodes, values, strict=True)
        if value != usual
    ]


def _name(facts: RankFacts) -> str:
    return f"node {facts.node} (rank {facts.rank})"


def _error_of(stopping: Sequence[Finding]) -> MegabackError | None:
    if not stopping:
        return None
    others = sorted({item.node for item in stopping} - {stopping[0].node})
    more = f"; problems also on {', '.join(others)}" if others else ""
    return PreflightError(
        f"{stopping[0].message}{more} (all measurements: {PREFLIGHT_NAME} in the run's folder)"
    )


def _record(
    world: World, run: Path, report: dict[str, object], bad_nodes: list[str], fence: Fence
) -> None:
    if not world.is_first:
        return
    text = json.dumps({"start": fence.start_id, **report}, indent=2) + "\n"
    write_text(run / PREFLIGHT_NAME, text, fence.replace)
    if bad_nodes:
        path = run / BAD_NODES_NAME
        known = read_bad_nodes(run) if path.exists() else []
        text = "".join(f"{name}\n" for name in dict.fromkeys([*known, *bad_nodes]))
        write_text(path, text, fence.replace)
