"""Published gaps between backward and forward models, for comparison."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Gap in percent of the forward loss; both ranges may be single numbers."""

    name: str
    num_parameters: tuple[float, float]
    percent: tuple[float, float]


# GPT-2 on neuroscience, each direction with its own tokenizer: Luo, Ramscar and Love, "Beyond
# Human-Like Processing" (2024), https://arxiv.org/abs/2411.11061; models of 2 to 8 billion
# parameters: "Reversal Blessing" (2025), https://arxiv.org/abs/2502.18435.
PUBLISHED = (
    Published("GPT-2 on neuroscience", (124e6, 124e6), (1.22, 1.22)),
    Published("GPT-2 on neuroscience", (355e6, 355e6), (1.87, 1.87)),
    Published("GPT-2 on neuroscience", (774e6, 774e6), (2.16, 2.16)),
    Published("Reversal Blessing", (2e9, 8e9), (2.1, 2.4)),
)
