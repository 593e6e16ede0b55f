"""`megaback convert`: from a checkpoint of any ZeRO stage to something that runs on one device."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipeline.command import Command
from data_pipeline.errors import OutputExistsError
from megaback.config import Config

if TYPE_CHECKING:
    from torch import Tensor

    from megaback.checkpoint import CheckpointMeta


def convert_full(checkpoint: Path, out: Path, dtype: str) -> None:
    """Gather a checkpoint's weights into a model folder that appears whole or not at all.

    `checkpoint` is a run, or one of its checkpoints. Raises CheckpointMissingError,
    CheckpointCorruptError, OutputExistsError.
    """
    import torch

    from data_pipeline.manifest import TOKENIZER_NAME
    from megaback.checkpoint import find_checkpoint
    from megaback.model_folder import ModelDescription, save_model_folder

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} already holds something; choose another --out")
    target, meta = find_checkpoint(checkpoint)
    config = Config.model_validate(meta.config)
    description = ModelDescription(
        shape=config.model,
        vocab_size=meta.vocab_size,
        context_tokens=config.batch.context_tokens,
        text_format=meta.format,
        step=meta.step,
        val_loss=meta.val_loss,
    )
    weights = gather_weights(target, meta)
    weights = {
        name: weight.to(getattr(torch, dtype)).contiguous() for name, weight in weights.items()
    }
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        tokenizer = (target / TOKENIZER_NAME).read_bytes()
        save_model_folder(partial, description, weights, tokenizer)
        if out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def gather_weights(target: Path, meta: "CheckpointMeta") -> "dict[str, Tensor]":
    """The full fp32 weights of a verified checkpoint, by parameter name."""
    import torch

    from megaback.checkpoint import WEIGHTS_PREFIX, saved_state
    from megaback.engine_state import WEIGHT
    from megaback.model import ReverseGPT

    config = Config.model_validate(meta.config)
    with torch.device("meta"):
        model = ReverseGPT(config.model, meta.vocab_size)
    saved = saved_state(target, meta, WEIGHTS_PREFIX)
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = torch.empty(parameter.shape)
        saved.read(WEIGHT, name, 0, weights[name].view(-1))
    return weights


@click.command(cls=Command, name="convert")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--to", "kind", type=click.Choice(["full"]), default="full", show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True
)
def main(checkpoint: Path, kind: str, out: Path, dtype: str) -> None:
    """Turn CHECKPOINT (a run, or one of its checkpoints) into a folder that samples anywhere."""
    assert kind == "full"
    convert_full(checkpoint, out, dtype)
    click.echo(f"wrote {out}")
    click.echo(f'next: megaback sample {out} --ending "the end."')


if __name__ == "__main__":
    main()
