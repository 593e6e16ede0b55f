"""Models and packed documents for tests of the forward pass: tiny and random."""

import torch
from torch import Tensor

from megaback.config import ModelSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT

VOCAB_SIZE = 97
CPU = torch.device("cpu")


def section(**changes: object) -> ModelSection:
    fields = {"num_layers": 2, "width": 48, "num_heads": 4, "num_kv_heads": 2, "rope_theta": 500.0}
    return ModelSection.model_validate({**fields, **changes})


def make_model(seed: int = 1, **changes: object) -> ReverseGPT:
    """A model with norms that are not all ones and logits that are not all alike."""
    model = ReverseGPT(section(**changes), VOCAB_SIZE)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.mul_(6)
    return model.eval()


def random_ids(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (num_tokens,), generator=torch.manual_seed(seed))


def packed(*lengths: int) -> tuple[Tensor, Segments]:
    """Positions and segments of packed documents of these lengths."""
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    return positions_T, Segments.from_lengths(lengths, CPU)
