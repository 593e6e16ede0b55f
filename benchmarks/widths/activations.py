"""Coordinate check: how much a few updates change the activations of models of several widths.

Yang et al., "Tensor Programs V" (2022), appendix D.1. With muP the change is the same at every
width; otherwise it grows, and so does the loss of a learning rate that was tuned for another width.
Shapes: T tokens, D channels, V pieces.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from megaback.config import ModelSection, OptimizerSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import build_optimizer

VOCAB_SIZE = 128
_TOKENS = 64


def changes(
    shape: ModelSection, section: OptimizerSection, num_steps: int, seed: int
) -> dict[str, float]:
    """RMS change of activations in `num_steps` updates on one batch of random ids.

    By place: outputs of the last block's attention and MLP, its residual stream, and the logits.
    """
    model = ReverseGPT(shape, VOCAB_SIZE)
    model.initialize(seed)
    model.train()
    optimizer = build_optimizer(model.named_parameters(), shape, section)
    generator = torch.Generator().manual_seed(seed)
    ids_T = torch.randint(VOCAB_SIZE, (_TOKENS,), generator=generator)
    positions_T = torch.arange(_TOKENS)
    segments = Segments.from_lengths((_TOKENS,), torch.device("cpu"))

    def activations() -> dict[str, Tensor]:
        with torch.no_grad(), _outputs(model) as found:
            logits_TV = model.logits(ids_T, positions_T, segments)
        return {**found, "logits": logits_TV}

    before = activations()
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(ids_T, ids_T.roll(-1), positions_T, segments).mean().backward()
        optimizer.step()
    return {
        place: (after - before[place]).square().mean().sqrt().item()
        for place, after in activations().items()
    }


@contextmanager
def _outputs(model: ReverseGPT) -> Iterator[dict[str, Tensor]]:
    """Outputs of the last block and its parts in a forward pass, by place."""
    found: dict[str, Tensor] = {}
    block = model.model.layers[-1]
    places = {
        "attention": block.get_submodule("self_attn"),
        "MLP": block.get_submodule("mlp"),
        "residual": block,
    }

    def keep(place: str) -> "torch.utils.hooks.RemovableHandle":
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            found[place] = output

        return places[place].register_forward_hook(hook)

    handles = [keep(place) for place in places]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def exponent(by_width: Mapping[int, float]) -> float:
    """Exponent of the power of the width by which a value grows; 0: it does not."""
    slope, _ = np.polyfit(np.log(list(by_width)), np.log(list(by_width.values())), 1)
    return float(slope)
