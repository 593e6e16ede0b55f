"""Frozen base of a run with LoRA: its weights, loaded into the model and kept with the run."""

from pathlib import Path

import torch

from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.checkpoints.frozen_weights import keep_frozen, open_frozen, write_frozen
from megaback.checkpoints.safetensors_file import SizeAndHash
from megaback.config_finetune import LoraSection
from megaback.distributed.world import World
from megaback.faults.start_fence import Fence
from megaback.model.gpt import ReverseGPT
from megaback.model.lora import add_adapters
from megaback.weights.source import WeightSource


def freeze_base(
    model: ReverseGPT,
    section: LoraSection,
    run: Path,
    world: World,
    fence: Fence,
    base: WeightSource | tuple[Path, CheckpointMeta],
) -> SizeAndHash | None:
    """Load the base's weights into a new model, and add adapters to it. Collective.

    `base`: the weights that the run starts from, or the verified checkpoint that it continues.
    Returns size and hash of the run's own file of these weights, on the first rank.
    """

    def keep() -> SizeAndHash | None:
        if not world.is_first:
            return None
        if isinstance(base, WeightSource):
            return write_frozen(run, base.shapes, base.read, fence)
        open_frozen(*base)
        return keep_frozen(run, *base, fence)

    frozen = world.run_collectively(keep)
    world.run_collectively(_fill, model, base)
    add_adapters(model, section)
    return frozen


@torch.no_grad()
def _fill(model: ReverseGPT, base: WeightSource | tuple[Path, CheckpointMeta]) -> None:
    read = base.read if isinstance(base, WeightSource) else open_frozen(*base).tensor
    for name, weight in model.named_parameters():
        weight.copy_(read(name))
