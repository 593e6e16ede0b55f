"""Summary of a finished run from its records, and commands to use next."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.checked_json import read_json
from data_pipeline.common.durations import duration
from data_pipeline.common.next_command import command, free_path, show_next
from data_pipeline.common.terminal import echo, table_lines
from data_pipeline.text.codec import Directions
from megaback.config import Config
from megaback.run_folder import (
    BEST_NAME,
    CHECKPOINTS_FOLDER,
    META_NAME,
    meant_by,
    newest_checkpoint_step,
    step_name,
)
from megaback.use_commands import use_commands

MODELS_FOLDER = Path("models")


def show_result(config: Config, took_s: float) -> None:
    """Print a finished run's folder, steps, time, val loss and the next commands."""
    path, meta = _checkpoint(config)
    if meta is None:
        return
    echo(f"{config.run}: {meta['step']:,} steps, {duration(took_s)} in this session")
    val_loss = meta.get("val_loss")
    if val_loss is not None:
        is_finite = math.isfinite(float(val_loss))
        shown = f"{val_loss:.4f} nats/token" if is_finite else "non-finite"
        best = "the lowest, at" if path != config.run else "at"
        echo(f"val loss {shown}, {best} step {meta['step']:,}")
    use = use_commands(
        path,
        Directions(meta["text_format"]["direction"]),
        on_examples=bool(meta.get("on_examples")),
    )
    out = free_path(MODELS_FOLDER / (config.run.resolve().name or "model"))
    convert = command("convert", path, "--to", "full", "--out", out)
    show_next({**use, convert: "export the model"})


def show_branches(configs: Sequence[Config]) -> None:
    """Print steps, tokens and val loss of finished branches, one line each."""
    rows = []
    for config in configs:
        _, meta = _checkpoint(config)
        loss = None if meta is None else meta.get("val_loss")
        steps = config.training.steps or 0
        tokens = steps * config.batch.global_batch_rows * config.batch.context_tokens
        shown = "" if loss is None else f"{float(loss):.4f}"
        rows.append([str(config.run), f"{steps:,}", f"{tokens:,}", shown])
    if rows:
        titles = ["branch", "steps", "tokens", "val loss"]
        for line in table_lines(titles, rows, right=range(1, len(titles))):
            click.echo(line)


def _checkpoint(config: Config) -> tuple[Path, dict[str, Any] | None]:
    """Path of the run or its best checkpoint, and the checkpoint's description."""
    checkpoints = config.run / CHECKPOINTS_FOLDER
    best = checkpoints / BEST_NAME
    step = step_name(newest_checkpoint_step(config.run))
    path = config.run
    if config.validation.patience is not None and best.is_file():
        path, step = best, meant_by(best).name
    try:
        meta: dict[str, Any] = read_json(checkpoints / step / META_NAME)
    except (OSError, ValueError):
        return path, None
    return path, meta
