"""First exchange of the ranks over the backend of the gradients: which of them can connect."""

from collections.abc import Sequence
from threading import Thread

import torch
import torch.distributed as dist

from megaback.distributed.world import World

TIMEOUT_S = 120.0
"""Maximum time to connect. NCCL itself would wait for ever."""


def unconnected_ranks(world: World, ranks_per_node: int) -> list[int]:
    """Ranks whose exchange with their neighbors did not end in time. Collective.

    The neighbors are the next rank and the one of the same place on the next node. A broken link
    stops the ranks at its two ends, whereas a collective would stop all ranks.
    """
    distances = sorted({distance for distance in (1, ranks_per_node) if distance < world.size})
    connected: list[bool] = []
    # NCCL connects without a timeout of its own, so that this rank must not wait for it itself.
    thread = Thread(target=_exchange, args=(world, distances, connected), name="links", daemon=True)
    thread.start()
    thread.join(TIMEOUT_S)
    everyone = world.gather(bool(connected), bool)
    return [rank for rank, is_connected in enumerate(everyone) if not is_connected]


def _exchange(world: World, distances: Sequence[int], connected: list[bool]) -> None:
    """Send a number to a neighbor and receive one from the opposite neighbor, for each distance."""
    try:
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # of this thread
        for distance in distances:
            sent = torch.ones(1, device=world.device)
            received = torch.empty_like(sent)
            exchange(
                dist.P2POp(dist.isend, sent, (world.rank + distance) % world.size),
                dist.P2POp(dist.irecv, received, (world.rank - distance) % world.size),
            )
            if world.device.type == "cuda":
                torch.cuda.synchronize(world.device)
        connected.append(True)
    except RuntimeError:  # not connected: reported with its neighbors
        return


def exchange(*operations: dist.P2POp) -> None:
    """Run sends and receives together, and wait for them."""
    for work in dist.batch_isend_irecv(list(operations)):
        work.wait()
