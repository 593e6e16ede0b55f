"""A tiny run: its config, its metrics, and the same training as a plain PyTorch loop."""

import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import ShardReader
from megaback.config import Config
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import build_optimizer
from megaback.optim.lr_schedule import rate_factor_at
from megaback.tracking.metrics import MACHINE_FIELDS
from tests.helpers.whole_loss import whole_loss

TOTAL_STEPS = 100
FORWARD = ("data.direction=forward", "training.steps=null", "training.epochs=1.5")
"""Overrides of a forward run."""


def tiny_config(shards: Path) -> dict[str, Any]:
    """Two ranks that accumulate twice and whose gradients are clipped."""
    return {
        "run": "run",
        "data": {"shards": str(shards)},
        "model": {"num_layers": 2, "width": 32, "num_heads": 4, "num_kv_heads": 2},
        "batch": {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 10, "gradient_clip": 0.5},
        "training": {"steps": TOTAL_STEPS, "precision": "fp32", "seed": 3},
        "zero": {"stage": 1},
        "hardware": {"device": "cpu", "processes": 2, "collective_timeout_s": 60},
        "validation": {"every_steps": 50},
        "checkpoint": {"every_steps": 25},
        "logging": {"every_steps": 50, "tensorboard": "off"},
    }


def training_environment() -> dict[str, str]:
    """The environment without variables of another run's rank; one thread per rank."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_", "SLURM_", "WANDB_")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    # Inductor would start a pool of processes that import torch, for a few small kernels.
    return {**ours, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in MACHINE_FIELDS}
        for line in lines
    ]


def curve_of(run: Path, name: str = "loss") -> list[float]:
    """One value per training step."""
    return [line[name] for line in metrics_of(run) if name in line]


def val_losses_of(run: Path) -> dict[int, float]:
    """Val loss by number of completed steps."""
    return {line["step"]: line["val_loss"] for line in metrics_of(run) if "val_loss" in line}


def wait_for_step(
    process: "subprocess.Popen[str]", run: Path, step: int, output: Path | None = None
) -> None:
    """Wait until the metrics have this many training steps.

    `output` is the file that the process prints to. Raises AssertionError if it ends before.
    """
    give_up = time.monotonic() + 120
    path = run / "metrics.jsonl"
    while time.monotonic() < give_up:
        if path.exists() and path.read_text().count('"learning_rate"') >= step:
            return
        assert process.poll() is None, (output or run / "output.txt").read_text()
        time.sleep(0.01)
    raise TimeoutError(f"no step {step} in {path}")


@dataclass(frozen=True)
class PlainResult:
    """Results of plain training, one entry per step."""

    losses: list[float]
    gradient_norms: list[float]
    learning_rates: list[float]
    model: ReverseGPT


def train_plainly(config: Config, model: ReverseGPT | None = None) -> PlainResult:
    """Train in this process: no ranks, no accumulation, no DeepSpeed, whole logits.

    `model`: its initial state, by default that of the config's seed.

    bf16 is autocast's. AdamW is written out here; Muon is ours, on whole matrices (its update is
    compared with PyTorch's own Muon elsewhere).
    """
    torch.set_num_threads(1)  # fastest for a model this small
    data = open_data(config, 0, 1)
    section = config.optimizer
    if model is None:
        model = ReverseGPT(config.model, data.codec.vocab_size)
        model.initialize(config.training.seed)
    model.train()
    optimizer = _plain_optimizer(model, config)
    is_bf16 = config.training.precision == "bf16"
    result = PlainResult([], [], [], model)
    for step in range(data.total_steps):
        batch = join(data.training.at(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            ids_T, targets_T, *places = batch
            hidden_TD = model.hidden(ids_T, *places)
            nats_T = whole_loss(hidden_TD, model.lm_head.weight, targets_T, section.z_loss)
            loss = nats_T.sum() / (targets_T != IGNORED_TARGET).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.gradient_clip)
        factor = rate_factor_at(step, data.total_steps, section)
        for group in optimizer.param_groups:
            group["lr"] = group.get("peak_learning_rate", section.learning_rate) * factor
        optimizer.step()
        result.losses.append(loss.item())
        result.gradient_norms.append(norm.item())
        result.learning_rates.append(section.learning_rate * factor)
    return result


def _plain_optimizer(model: ReverseGPT, config: Config) -> torch.optim.Optimizer:
    section = config.optimizer
    if section.name == "muon":
        return build_optimizer(model.named_parameters(), config.model, section)
    names = dict(model.named_parameters())
    return torch.optim.AdamW(
        [
            {
                "params": [weight for name, weight in names.items() if "norm" not in name],
                "weight_decay": section.weight_decay,
            },
            {
                "params": [weight for name, weight in names.items() if "norm" in name],
                "weight_decay": 0.0,
            },
        ],
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
    )


def join(batches: Iterable[Batch]) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Micro-batches joined into one."""
    batches = list(batches)
    ids_T, targets_T, positions_T = (
        torch.from_numpy(np.concatenate([getattr(batch, name) for batch in batches]))
        for name in ("ids_T", "targets_T", "positions_T")
    )
    lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in batches])
    segments = Segments.from_lengths(tuple(lengths.tolist()), torch.device("cpu"))
    return ids_T, targets_T, positions_T, segments


@dataclass(frozen=True)
class PlainMeasure:
    """Losses over a val set."""

    loss: float
    bits_per_byte: float
    num_targets: int
    nats_of_context: dict[int, list[float]]
    """Losses of targets by the number of tokens before them."""


@torch.no_grad()
def measure_plainly(model: ReverseGPT, shards: Path, context_tokens: int) -> PlainMeasure:
    """Loss over a stored val set, one piece of a document at a time: no packing, no batches."""
    manifest = Manifest.load(shards)
    piece_num_bytes = DataSet.open(shards).codec().piece_num_bytes()
    nats_of_context: dict[int, list[float]] = defaultdict(list)
    targets = []
    for entry in manifest.split("val"):
        reader = ShardReader(shards / entry.file)
        for frame in range(reader.num_frames):
            frame_ids = reader.frame(frame).astype(np.int64)
            for start in range(0, len(frame_ids), context_tokens):
                window = torch.from_numpy(frame_ids[start : start + context_tokens + 1])
                for piece in _pieces(window, manifest.begin_id):
                    inputs_T, targets_T = piece[:-1], piece[1:]
                    segments = Segments.from_lengths((len(inputs_T),), torch.device("cpu"))
                    positions_T = torch.arange(len(inputs_T))
                    nats_T = model(inputs_T, targets_T, positions_T, segments)
                    for context, nats in enumerate(nats_T.tolist(), start=1):
                        nats_of_context[context].append(nats)
                    targets.append(targets_T)
        reader.close()
    all_targets = torch.cat(targets).numpy()
    num_bytes = int(piece_num_bytes[all_targets].sum())
    nats = sum(map(sum, nats_of_context.values()))
    return PlainMeasure(
        nats / len(all_targets),
        nats / np.log(2) / num_bytes,
        len(all_targets),
        dict(nats_of_context),
    )


def _pieces(window_T: Tensor, begin_id: int) -> list[Tensor]:
    """A window cut before every begin marker; pieces of one token have no targets."""
    inner = (window_T[1:] == begin_id).nonzero().flatten() + 1
    edges = [0, *inner.tolist(), len(window_T)]
    pieces = [window_T[left:right] for left, right in pairwise(edges)]
    return [piece for piece in pieces if len(piece) > 1]


def read_run_config(shards: Path, *overrides: str) -> Config:
    """The tiny config as an object."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.yaml"
        path.write_text(yaml.safe_dump(tiny_config(shards)))
        return load_config(path, overrides)
