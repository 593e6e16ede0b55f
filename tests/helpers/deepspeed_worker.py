"""One rank that trains transformers' Qwen3 under plain DeepSpeed, as others do, and saves it.

    python -m tests.helpers.deepspeed_worker FOLDER VOCAB_SIZE

For each of `CASES`: a checkpoint of DeepSpeed in FOLDER/NAME, and in NAME/expected.safetensors the
weights that DeepSpeed's own zero_to_fp32 has of it; of some, also a universal checkpoint.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from megaback.distributed.world import end_rank, start_world

CASES: dict[str, dict[str, Any]] = {
    "stage-1": {"stage": 1, "is_bf16": True},
    "stage-2": {"stage": 2, "is_frozen": True},
    "stage-3": {"stage": 3, "is_bf16": True, "is_frozen": True},
    "universal-2": {"stage": 2, "is_universal": True},
    "universal-3": {"stage": 3, "is_universal": True},
}
# An odd width makes ZeRO pad the ranks' parts.
SHAPE = {"hidden_size": 31, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


def main(folder: Path, vocab_size: int) -> None:
    """Train, save and record each case."""
    world = start_world("cpu", 60)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for name, case in CASES.items():
        engine = trained(vocab_size, world.rank, **case)
        saved = folder / f"{name}-saved" if case.get("is_universal") else folder / name
        engine.save_checkpoint(str(saved))
        engine.destroy()
        if world.is_first:
            weights = get_fp32_state_dict_from_zero_checkpoint(str(saved))
            if case.get("is_universal"):
                to_universal(saved / "global_step2", folder / name)
            whole = {key: weight.clone().contiguous() for key, weight in weights.items()}
            save_file(whole, folder / name / "expected.safetensors")
    end_rank()


def trained(
    vocab_size: int,
    rank: int,
    stage: int,
    is_bf16: bool = False,
    is_frozen: bool = False,
    is_universal: bool = False,
) -> Any:
    """DeepSpeed's engine after two steps."""
    import deepspeed
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    context = {"vocab_size": vocab_size, "max_position_embeddings": 64}
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS, **context))
    model.model.embed_tokens.weight.requires_grad_(not is_frozen)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "bf16": {"enabled": is_bf16},
    }
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=config)
    ids = torch.randint(0, vocab_size, (1, 32), generator=torch.Generator().manual_seed(rank))
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    return engine


def to_universal(saved: Path, out: Path) -> None:
    """Convert a checkpoint by DeepSpeed's ds_to_universal."""
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        SimpleNamespace(
            input_folder=str(saved),
            output_folder=str(out),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


if __name__ == "__main__":
    os.environ["PYTHONWARNINGS"] = "ignore"
    main(Path(sys.argv[1]), int(sys.argv[2]))
