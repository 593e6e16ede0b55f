"""Matrices of LoRA's adapters, named as peft names them. Loads no torch."""

from collections.abc import Iterator

from megaback.config import ModelSection
from megaback.config_finetune import MATRIX_MODULES, LoraSection
from megaback.planning.matrix_shares import MatrixShape, matrices_of

_ADAPTER = "default"
"""The name that peft gives to a model's only adapter."""


def adapter_shapes(shape: ModelSection, section: LoraSection) -> dict[str, MatrixShape]:
    """Shapes of all trained parameters by name, in the model's order."""
    assert section.rank is not None
    sizes: dict[str, MatrixShape] = {}
    for module, (rows, columns) in _adapted(shape, section):
        first, second = _factors(module)
        sizes |= {first: (section.rank, columns), second: (rows, section.rank)}
    return sizes


def factors_of_matrices(shape: ModelSection, section: LoraSection) -> dict[str, tuple[str, str]]:
    """Names of both factors, of which the second times the first is the update, by the name of
    their matrix in a model without adapters."""
    return {f"{module}.weight": _factors(module) for module, _ in _adapted(shape, section)}


def num_trained(shape: ModelSection, section: LoraSection) -> int:
    """Number of trained parameters."""
    return sum(rows * columns for rows, columns in adapter_shapes(shape, section).values())


def _factors(module: str) -> tuple[str, str]:
    return f"{module}.lora_A.{_ADAPTER}.weight", f"{module}.lora_B.{_ADAPTER}.weight"


def _adapted(shape: ModelSection, section: LoraSection) -> Iterator[tuple[str, MatrixShape]]:
    """Module and shape of the matrices that are updated, in the model's order."""
    for number, size in enumerate(matrices_of(shape)):
        layer, place = divmod(number, len(MATRIX_MODULES))
        name = MATRIX_MODULES[place]
        if name in section.target_modules:
            part = "self_attn" if place < MATRIX_MODULES.index("gate_proj") else "mlp"
            yield f"model.layers.{layer}.{part}.{name}", size
