"""Error of a rank whose device is out of memory, with the keys of the config that need less."""

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import DeviceMemoryError, LaunchError, MegabackError
from data_pipeline.shards.data_set import DataSet
from megaback.config import Config
from megaback.config_batch import split_batch
from megaback.distributed.device_limits import available_memory
from megaback.distributed.rendezvous import ranks_per_node
from megaback.distributed.world import World
from megaback.planning.memory_room import planned_memory
from megaback.planning.run_settings import row_shares


def device_memory_error(
    config: Config, world: World, failed: str, written: Sequence[Path] = ()
) -> DeviceMemoryError:
    """The error of this rank. `failed`: the allocation that failed; `written`: files about it."""
    room = available_memory(world.device)
    rows, _ = split_batch(config.batch, world.size)
    kept = config.training.activation_checkpointing
    less = []
    if rows > 1:
        less.append(f"lower batch.micro_batch_rows (a forward pass has {rows} rows)")
    if kept != "block":
        more = "selective or block" if kept == "none" else "block"
        less.append(f"set training.activation_checkpointing to {more}")
    if rows == 1:
        less += _shared_rows(config, world)
    if config.zero.hierarchical:
        less.append("set zero.hierarchical to false")
    less.append("raise zero.stage" if config.zero.stage < 3 else "use more ranks or zero.offload")
    return DeviceMemoryError(
        f"rank {world.rank} on {room.host} is out of memory: {failed} on {room.device}, which has "
        f"{room.memory_bytes / 1e9:.1f} GB{_planned(config, world, room.device)}; "
        f"{', or '.join(less)}, and run the same command again to resume{_named(config, written)}"
    )


def _shared_rows(config: Config, world: World) -> list[str]:
    """Advice for a row that is too long for a device, if more ranks of the node can share it."""
    try:
        on_node = ranks_per_node()
    except LaunchError:
        return []
    given = config.batch.sequence_parallel
    more = [str(parts) for parts in row_shares(config, world.size, on_node) if parts > given]
    return [f"set batch.sequence_parallel to {' or '.join(more)}"] if more else []


def _named(config: Config, written: Sequence[Path]) -> str:
    """The files about the rank's memory, for the message."""
    if not written:
        return ""
    text = f" ({' and '.join(map(str, written))} have the state of its memory"
    if any(path.suffix == ".pickle" for path in written):
        text += "; pytorch.org/memory_viz shows the snapshot in the browser, without an upload"
        if not config.training.memory_history:
            text += ", and with training.memory_history its history"
    return f"{text})"


def _planned(config: Config, world: World, device: str) -> str:
    try:
        vocab_size = DataSet.open(config.data.shards[0].path).manifest.vocab_size
        nodes = world.size // ranks_per_node() if config.zero.hierarchical else 1
        memory = planned_memory(config, vocab_size, world.size, device, nodes)
    except (MegabackError, OSError):  # the error itself matters more
        return ""
    return (
        f" (`megaback plan` estimates {memory.parts.total / 1e9:.1f} GB for a rank, most of all in "
        f"its moment {memory.moment!r})"
    )
