"""Parameters of `model.ReverseGPT` and the optimizer's groups of them. Loads no torch.

ZeRO buckets and shards them in these orders; tests compare them with the model and the optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

from megaback.config import ModelSection, OptimizerSection
from megaback.config_finetune import LoraSection
from megaback.planning.flops import ModelSize
from megaback.planning.matrix_shares import matrices_of

_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Parameter:
    """A weight of the model."""

    name: str
    elements: int
    kind: Literal["embedding", "head", "matrix", "norm", "factor"]
    is_trained: bool = True


@dataclass(frozen=True)
class Parameters:
    """All weights; a tied head is the embedding."""

    embedding: Parameter
    blocks: tuple[dict[str, Parameter], ...]
    """Weights of each block by module, in the model's order."""
    norm: Parameter
    head: Parameter

    @classmethod
    def of(
        cls, shape: ModelSection, vocab_size: int, lora: LoraSection | None = None
    ) -> "Parameters":
        size, is_trained = ModelSize.of(shape, vocab_size), lora is None
        embedding = Parameter("embed_tokens", size.embedding, "embedding", is_trained)
        matrices = dict(zip(_MATRICES, matrices_of(shape)[: len(_MATRICES)], strict=True))
        adapted, rank = ((), 0) if lora is None else (lora.target_modules, lora.rank or 0)

        def block(layer: int) -> dict[str, Parameter]:
            def norm(name: str, elements: int) -> Parameter:
                return Parameter(f"{layer}.{name}", elements, "norm", is_trained)

            by_name = {
                name: Parameter(f"{layer}.{name}", rows * columns, "matrix", is_trained)
                for name, (rows, columns) in matrices.items()
            }
            for module in adapted:
                rows, columns = matrices[module]
                for factor, length in zip(factors_of(module), (columns, rows), strict=True):
                    by_name[factor] = Parameter(f"{layer}.{factor}", rank * length, "factor")
            if shape.qk_norm:
                by_name |= {name: norm(name, shape.head_size) for name in ("q_norm", "k_norm")}
            for name in ("input_layernorm", "post_attention_layernorm"):
                by_name[name] = norm(name, shape.width)
            order: tuple[str, ...] = ("input_layernorm", *_MATRICES[:4], "q_norm", "k_norm")
            order += ("post_attention_layernorm", *_MATRICES[4:])
            names = [one for name in order for one in (name, *factors_of(name))]
            return {name: by_name[name] for name in names if name in by_name}

        head = Parameter("lm_head", size.head, "head", is_trained)
        return cls(
            embedding,
            tuple(block(layer) for layer in range(shape.num_layers)),
            Parameter("norm", shape.width, "norm", is_trained),
            embedding if shape.tie_embeddings else head,
        )

    @property
    def in_order(self) -> list[Parameter]:
        """In the model's order."""
        of_blocks = [one for block in self.blocks for one in block.values()]
        head = [] if self.head is self.embedding else [self.head]
        return [self.embedding, *of_blocks, self.norm, *head]

    @property
    def trained(self) -> list[Parameter]:
        """Weights with gradients, in the model's order."""
        return [one for one in self.in_order if one.is_trained]

    @property
    def in_backward_order(self) -> list[Parameter]:
        """Weights with gradients, in the order in which an uncompiled backward pass ends."""
        head = [] if self.head is self.embedding else [self.head]
        of_blocks = [
            block[name]
            for block in reversed(self.blocks)
            for module in BACKWARD_MODULES
            for name in (*reversed(factors_of(module)), module)
            if name in block
        ]
        every = [*head, self.norm, *of_blocks, self.embedding]
        return [one for one in every if one.is_trained]

    def groups(self, shape: ModelSection, section: OptimizerSection) -> list[list[Parameter]]:
        """Groups of the optimizer, as of `optim.build_optimizer`, by `mup.parameter_rule`."""
        ratio = shape.width / (shape.base_width or shape.width)
        rate, decay = section.learning_rate, section.weight_decay
        scaled = (rate / ratio, decay * ratio, False)
        rules = {
            "norm": (rate, 0.0, False),
            "embedding": (rate, decay, False),
            "head": scaled,
            "matrix": scaled,
            "factor": (rate, decay, False),
        }
        if section.name == "muon":
            root, of_matrices = sqrt(ratio), section.matrix_learning_rate or rate
            rules["matrix"] = (of_matrices / root, decay * root, True)
        found: dict[tuple[float, float, bool], list[Parameter]] = {}
        for one in self.trained:
            found.setdefault(rules[one.kind], []).append(one)
        return list(found.values())


def factors_of(module: str) -> tuple[str, str]:
    """Names of LoRA's factors of a module of a block, in the model's order."""
    return f"{module}.lora_A", f"{module}.lora_B"


BACKWARD_MODULES: Sequence[str] = (
    "down_proj",
    "up_proj",
    "gate_proj",
    "post_attention_layernorm",
    "o_proj",
    "k_norm",
    "q_norm",
    "v_proj",
    "k_proj",
    "q_proj",
    "input_layernorm",
)
"""Modules of a block with weights, in the order in which its backward pass reaches them."""
