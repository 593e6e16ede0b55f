"""A checkpoint of several ranks, made without training, and the formats of exports."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from data_pipeline.text.codec import Direction, TextCodec, Unit
from megaback.checkpoints.checkpoint import FORMAT_NAME, FORMAT_VERSION, CheckpointMeta
from megaback.checkpoints.safetensors_file import write_tensors
from megaback.config import Config
from megaback.model.gpt import ReverseGPT
from megaback.run_folder import META_NAME

STEP = 30
STAGES = (1, 2, 3)
TIED = {True: "tied", False: "untied"}
NUM_IDS = 40
"""Stages, embeddings and ids of the checkpoints that `export_worker` writes."""
_FORMATS = [(direction, unit) for direction in Direction for unit in Unit]
of_formats = pytest.mark.parametrize(
    ("direction", "unit"), _FORMATS, ids=[f"{one.value}-{two.value}" for one, two in _FORMATS]
)


def write_checkpoint(
    run: Path,
    codec: TextCodec,
    ranks: int = 3,
    context_tokens: int = 64,
    step: int = STEP,
    seed: int = 5,
    shards: Path = Path("unused"),
    on_examples: bool = False,
    init_from: str | None = None,
    **model: object,
) -> tuple[Path, ReverseGPT]:
    """Write a run with one checkpoint, sharded over the ranks. Returns the run and its model."""
    fields = {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2, **model}
    config = Config.model_validate(
        {
            "run": run,
            "init_from": init_from,
            "data": {"shards": f"{shards}", "direction": codec.format.direction.value},
            "model": fields,
            "batch": {
                "context_tokens": context_tokens,
                "global_batch_rows": ranks,
                "micro_batch_rows": 1,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 1, "precision": "fp32"},
            "zero": {"stage": 2},
        }
    )
    made = ReverseGPT(config.model, codec.vocab_size)
    made.initialize(seed)
    target = run / "checkpoints" / f"step-{step:08d}"
    target.mkdir(parents=True)
    files = {}
    for rank in range(ranks):
        runs = {}
        for name, weight in made.named_parameters():
            flat = weight.detach().view(-1)
            edges = [len(flat) * part // ranks for part in range(ranks + 1)]
            runs[f"weight:{name}:{edges[rank]}"] = flat[edges[rank] : edges[rank + 1]]
        name = f"weights-{rank:05d}.safetensors"
        specs = {key: (torch.float32, part.shape) for key, part in runs.items()}
        files[name] = write_tensors(target / name, specs, runs.__getitem__)
    (target / codec.file_name).write_bytes(codec.model_bytes)
    meta = CheckpointMeta(
        step=step,
        updates=step,
        world_size=ranks,
        zero_stage=2,
        precision="fp32",
        vocab_size=codec.vocab_size,
        text_format=codec.format.to_dict(),
        data_fingerprint="",
        config=config.model_dump(mode="json"),
        val_loss=2.5,
        versions={},
        files=files,
        on_examples=on_examples,
    )
    described = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **asdict(meta)}
    (target / META_NAME).write_text(json.dumps(described))
    return target, made
