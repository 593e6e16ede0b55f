"""One rank that trains three steps, saves a checkpoint, and records its logits; see test_export.py.

    python -m tests.helpers.export_worker CONFIG FOLDER

For each ZeRO stage, with tied embeddings (a Qwen3 with wide heads) and without (a Llama with scaled
rotary positions): a run's checkpoint in FOLDER/NAME, and ids
with the engine's logits in FOLDER/NAME.safetensors.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.checkpoints.saver import CheckpointSaver
from megaback.checkpoints.state import named_state, num_updates
from megaback.config import Config
from megaback.config_file import load_config
from megaback.config_operation import CheckpointSection
from megaback.data import open_data
from megaback.distributed.versions import library_versions
from megaback.distributed.world import World, end_rank, start_world
from megaback.model.attention import Segments
from tests.helpers.exports import NUM_IDS, STAGES, TIED
from tests.helpers.reshard_worker import STEPS, new_engine, train

SHAPES = {
    "tied": ("model.qk_norm=true", "model.head_dim=16"),
    "untied": (
        *("model.qk_norm=false", "model.rope_theta=500"),
        *("model.rope_scaling_factor=8", "model.rope_original_context_tokens=32"),
    ),
}


def main(path: Path, folder: Path) -> None:
    """Train, save and record at each stage."""
    world = start_world("cpu", 60)
    for stage in STAGES:
        for is_tied, name in TIED.items():
            overrides = (f"zero.stage={stage}", f"model.tie_embeddings={is_tied}")
            config = load_config(path, (*overrides, *SHAPES[name]))
            engine = new_engine(config, world)
            train(engine, config, world, 0)
            save(engine, folder / f"{name}-{stage}", config, world)
            ids_T, logits_TV = logits_of(engine, engine.module.vocab_size)
            if world.is_first:
                tensors = {"ids": ids_T, "logits": logits_TV}
                save_file(tensors, folder / f"{name}-{stage}.safetensors")
    end_rank()


def save(engine: Any, run: Path, config: Config, world: World) -> None:
    """Save a checkpoint, as `megaback train` does."""
    data = open_data(config, world.rank, world.size)
    saver = CheckpointSaver(run, data.codec.model_bytes, CheckpointSection(), world)
    meta = CheckpointMeta(
        step=STEPS,
        updates=num_updates(engine),
        world_size=world.size,
        zero_stage=config.zero.stage,
        precision="fp32",
        vocab_size=data.codec.vocab_size,
        text_format=data.text_format.to_dict(),
        data_fingerprint=data.fingerprint,
        config=config.model_dump(mode="json"),
        val_loss=None,
        versions=library_versions(),
        files={},
    )
    saver.begin(named_state(engine, world.rank, world.size), meta)
    saver.finish()


@torch.no_grad()
def logits_of(engine: Any, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids, and the engine's logits for them."""
    ids_T = torch.randint(0, vocab_size, (NUM_IDS,), generator=torch.manual_seed(0))
    seen: list[Tensor] = []
    # Before the call, when ZeRO has gathered the weight: the call computes losses.
    hook = engine.module.lm_head.register_forward_pre_hook(
        lambda head, given: seen.append((given[0] @ head.weight.t()).float().cpu())
    )
    engine.eval()
    segments = Segments.from_lengths((NUM_IDS,), ids_T.device)
    engine(ids_T, ids_T, torch.arange(NUM_IDS), segments)
    hook.remove()
    return ids_T, seen[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
