"""Models that nobody has trained, as folders."""

from pathlib import Path

import torch

from data_pipeline.chat_format import STOP_PIECE
from data_pipeline.text import TextCodec
from megaback.config import ModelSection
from megaback.model import ReverseGPT
from megaback.model_folder import ModelDescription, write_model_folder

_SHAPE = ModelSection(num_layers=1, width=16, num_heads=2).resolved()


def write_chat_model(folder: Path, codec: TextCodec, context_tokens: int, seed: int = 0) -> Path:
    """One that is sure of something, and ends what it writes sooner or later."""
    model = ReverseGPT(_SHAPE, codec.vocab_size)
    model.initialize(seed)
    with torch.no_grad():
        model.lm_head.weight *= 20
        model.lm_head.weight[codec.chat_ids[STOP_PIECE]] *= 3
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    specs = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    description = ModelDescription(_SHAPE, codec.vocab_size, context_tokens, codec.format, 1, None)
    folder.mkdir(parents=True, exist_ok=True)
    write_model_folder(folder, description, specs, weights.__getitem__, codec.model_bytes, 1 << 30)
    return folder
