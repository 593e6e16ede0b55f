"""Folders of untrained models, which are fast to make."""

from pathlib import Path

import torch

from data_pipeline.text.chat_format import STOP_PIECE
from data_pipeline.text.codec import TextCodec
from megaback.config import ModelSection
from megaback.model.gpt import ReverseGPT
from megaback.weights.model_folder import ModelDescription, write_model_folder

CONTEXT_TOKENS = 64
SHAPE = ModelSection(num_layers=2, width=16, num_heads=2).resolved()


def random_model(seed: int = 1, vocab_size: int = 600) -> ReverseGPT:
    """A model of larger weights than usual, so that its probabilities are not all alike."""
    model = ReverseGPT(SHAPE, vocab_size)
    model.initialize(seed)
    with torch.no_grad():
        model.lm_head.weight *= 20
    return model.eval()


def write_model(
    folder: Path,
    model: ReverseGPT,
    codec: TextCodec,
    context_tokens: int = CONTEXT_TOKENS,
    *,
    on_examples: bool = False,
    max_file_bytes: int = 1 << 30,
) -> Path:
    """Write a folder as `megaback convert --to full` does."""
    folder.mkdir(parents=True, exist_ok=True)
    description = ModelDescription(
        shape=model.shape,
        vocab_size=codec.vocab_size,
        context_tokens=context_tokens,
        text_format=codec.format,
        step=1,
        val_loss=None,
        on_examples=on_examples,
    )
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    specs = {name: (weight.dtype, tuple(weight.shape)) for name, weight in weights.items()}
    read, tokenizer = weights.__getitem__, codec.model_bytes
    write_model_folder(folder, description, specs, read, tokenizer, max_file_bytes)
    return folder


def write_chat_model(
    folder: Path,
    codec: TextCodec,
    context_tokens: int = CONTEXT_TOKENS,
    seed: int = 0,
    *,
    on_examples: bool = False,
) -> Path:
    """Write a model whose samples end eventually."""
    model = random_model(seed, codec.vocab_size)
    with torch.no_grad():
        model.lm_head.weight[codec.chat_ids[STOP_PIECE]] *= 3
    return write_model(folder, model, codec, context_tokens, on_examples=on_examples)
