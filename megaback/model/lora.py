"""LoRA adapters (Hu et al., "LoRA", 2021) in a ReverseGPT, by peft.

The model's weights are frozen. A matrix with an adapter computes x W' + scale x A' B'; B is zero at
first, so that the model starts as its base.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import BackendError
from megaback.config_finetune import LoraSection
from megaback.model.gpt import ReverseGPT


def require_peft() -> None:
    """Raises BackendError if peft is missing. It loads transformers, which takes seconds."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"finetune.lora needs peft, which cannot be imported ({error}); run `pip install "
            "'megaback[lora]'` (in a clone: `pip install -e '.[lora]'`), or remove finetune.lora"
        ) from None


def add_adapters(model: ReverseGPT, section: LoraSection) -> None:
    """Freeze all weights, and add adapters, which are trained. Raises BackendError."""
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    assert section.rank is not None
    settings = LoraConfig(
        r=section.rank,
        lora_alpha=section.scale * section.rank,  # type: ignore[arg-type] # not only integers work
        target_modules=list(section.target_modules),
    )
    inject_adapter_in_model(settings, model)


def initial_adapters(
    shapes: Mapping[str, tuple[int, int]], seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Initial adapters in fp32, distributed as peft's: A uniform, B zero.

    `shapes`: of the factors, in their order. The same seed gives the same weights everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, size in shapes.items():
        if ".lora_B." in name:
            yield name, torch.zeros(size)
        else:
            bound = 1 / math.sqrt(size[1])
            yield name, torch.empty(size).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class LowRankUpdates:
    """Trained factors of a run, and the weights that they are updates of, by name."""

    section: LoraSection
    read_base: Callable[[str], Tensor]
    read_factor: Callable[[str], Tensor]


def with_updates(
    factors_of: Mapping[str, Sequence[str]],
    scale: float,
    read_base: Callable[[str], Tensor],
    read_factor: Callable[[str], Tensor],
) -> Callable[[str], Tensor]:
    """Reader of the weights of a model without adapters: those of the base with their updates.

    Updates are added in fp32. `factors_of`: names of A and B, by the name of their matrix.
    """

    def read(name: str) -> Tensor:
        weight = read_base(name).float()
        if name in factors_of:
            first, second = (read_factor(factor).float() for factor in factors_of[name])
            weight.addmm_(second, first, alpha=scale)
        return weight

    return read
