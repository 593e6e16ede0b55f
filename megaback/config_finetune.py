"""The config's `finetune` section: fine-tuning of few weights instead of all. Loads no torch."""

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from data_pipeline.common import number_ranges as ranges
from megaback.config_section import Section

TargetModule = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"
]
MATRIX_MODULES: tuple[TargetModule, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""Matrices of a block, in the model's order."""


class LoraSection(Section):
    rank: Annotated[int, ranges.SIZE] | None = None
    """Rank of LoRA's updates of matrices: only these are trained, on frozen weights of init_from.
    Needs peft. Default: all weights are trained."""
    alpha: Annotated[float, ranges.POSITIVE] | None = None
    """Scale of the updates, which are multiplied by alpha / rank. Default: twice the rank."""
    target_modules: tuple[TargetModule, ...] = ("q_proj", "v_proj")
    """Matrices of each block that are updated; all-linear: all seven. Embeddings and lm_head are
    frozen."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _as_list(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @field_validator("target_modules")
    @classmethod
    def _in_order(cls, names: tuple[TargetModule, ...]) -> tuple[TargetModule, ...]:
        if not names:
            raise ValueError("give at least one module, or all-linear")
        is_all = "all-linear" in names
        return tuple(name for name in MATRIX_MODULES if is_all or name in names)

    @model_validator(mode="after")
    def _is_on(self) -> "LoraSection":
        default = type(self).model_fields["target_modules"].default
        for key, is_set in (
            ("alpha", self.alpha is not None),
            ("target_modules", self.target_modules != default),
        ):
            if self.rank is None and is_set:
                raise ValueError(f"{key} is for LoRA, which needs a rank; set rank or remove {key}")
        return self

    @property
    def scale(self) -> float:
        """Factor of the updates. Only with a rank."""
        assert self.rank is not None
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


class FinetuneSection(Section):
    lora: LoraSection = LoraSection()
    """Low-rank adaptation: Hu et al., "LoRA" (2021)."""

    @property
    def adapters(self) -> LoraSection | None:
        """LoRA's settings, if it is on."""
        return None if self.lora.rank is None else self.lora
