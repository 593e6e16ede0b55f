"""A small model of random weights, as a folder: quick to make, and sure of nothing."""

from pathlib import Path

import torch

from data_pipeline.text import TextCodec
from megaback.config import ModelSection
from megaback.model import ReverseGPT
from megaback.model_folder import ModelDescription, write_model_folder

CONTEXT_TOKENS = 64
SHAPE = ModelSection(num_layers=2, width=16, num_heads=2).resolved()


def random_model(seed: int = 1) -> ReverseGPT:
    """Weights larger than usual, so that it is not equally sure of everything."""
    model = ReverseGPT(SHAPE, 600)
    model.initialize(seed)
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model.eval()


def write_model(folder: Path, model: ReverseGPT, codec: TextCodec) -> Path:
    """A folder as `megaback convert --to full` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    description = ModelDescription(SHAPE, 600, CONTEXT_TOKENS, codec.format, step=1, val_loss=None)
    weights = dict(model.named_parameters())
    specs = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    write_model_folder(
        folder,
        description,
        specs,
        lambda name: weights[name].detach(),
        codec.model_bytes,
        1 << 30,
    )
    return folder
