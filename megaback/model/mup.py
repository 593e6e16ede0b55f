"""muP: initial weights and learning rates as a function of a model's width.

With `model.base_width`, a learning rate tuned at that width transfers to any other: the maximal
update parametrization of Yang et al., "Tensor Programs V" (2022), table 8, with
m = width / base_width. It changes only initial values, learning rates and weight decay, so that the
architecture stays stock. Without it, m is 1.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megaback.config import ModelSection, OptimizerSection

_INITIAL_STD = 0.02


@dataclass(frozen=True)
class ParameterRule:
    """Optimizer settings of one parameter."""

    learning_rate: float
    """Peak learning rate."""
    weight_decay: float
    is_orthogonalized: bool
    """Whether Muon updates it."""


def initial_std(name: str, shape: ModelSection) -> float:
    """Initial standard deviation of a matrix of ReverseGPT, by parameter name.

    Matrices that write to the residual stream are scaled by depth, as in GPT-2.
    """
    ratio = _width_ratio(shape)
    if "embed_tokens" in name:
        return _INITIAL_STD
    if "lm_head" in name:
        return 0.0 if shape.zero_head else _INITIAL_STD / ratio
    std = _INITIAL_STD / math.sqrt(ratio)
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return 0.0 if shape.zero_output_projections else std / math.sqrt(2 * shape.num_layers)
    return std


def initial_weights(
    shape: ModelSection, shapes: Mapping[str, tuple[int, ...]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Initial weights of ReverseGPT in fp32: of matrices by `initial_std`, of norms ones.

    `shapes`: of the parameters, in their order. The same seed gives the same weights everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, size in shapes.items():
        if len(size) < 2:
            yield name, torch.ones(size)
        else:
            yield (
                name,
                torch.empty(size).normal_(0.0, initial_std(name, shape), generator=generator),
            )


def parameter_rule(
    name: str, parameter: nn.Parameter, shape: ModelSection, section: OptimizerSection
) -> ParameterRule:
    """Rule of a parameter of ReverseGPT, by parameter name; no weight decay on norms.

    Learning rates of LoRA's matrices do not depend on the width.
    """
    ratio, rate = _width_ratio(shape), section.learning_rate
    if parameter.ndim < 2:
        return ParameterRule(rate, 0.0, False)
    if ".lora_" in name:
        return ParameterRule(rate, section.weight_decay, False)
    if "embed_tokens" in name:
        return ParameterRule(rate, section.weight_decay, False)
    if section.name == "muon" and "lm_head" not in name:
        # An orthogonal matrix with entries as large as AdamW's updates has a spectral norm that
        # grows with the square root of the width.
        ratio, rate = math.sqrt(ratio), section.matrix_learning_rate or rate
        return ParameterRule(rate / ratio, section.weight_decay * ratio, True)
    # The decay per step, learning rate times weight decay, stays the same.
    return ParameterRule(rate / ratio, section.weight_decay * ratio, False)


def _width_ratio(shape: ModelSection) -> float:
    return shape.width / (shape.base_width or shape.width)
