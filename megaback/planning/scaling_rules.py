"""Scaling rules: shape, tokens, batch and learning rate of a model from its size. Loads no torch.

Sources, by the names under which choices cite them:

- OLMo-core: its model ladder with Muon, whose updates are scaled to AdamW's as here
  (allenai/OLMo-core, model_ladder): batch, learning rate, warmup, weight decay. The exponents are
  those of Porian et al. (2024), arXiv:2406.19146.
- nanochat: scripts/base_train.py of karpathy/nanochat: tokens per parameter, with Muon.
- Chinchilla: Hoffmann et al. (2022), arXiv:2203.15556: a compute-optimal model has a fixed ratio.
- Muennighoff et al. (2023), arXiv:2305.16264: up to four epochs are nearly as good as new text.

docs/decisions/0071-one-dial-for-size.md has the choice between them, and our measurements.
Parameters are those that multiply a token, `ModelSize.matrices` and the head: the count for which
OLMo-core and nanochat state their rules.
"""

import math
from functools import cache
from itertools import pairwise

from megaback.config import ModelSection
from megaback.planning.flops import ModelSize, orthogonalization_flops
from megaback.planning.matrix_shares import matrices_of

TOKENS_PER_PARAMETER = 12
MAX_EPOCHS = 4
MIN_STEPS = 20
WEIGHT_DECAY = 0.1
MAX_WARMUP_SHARE = 0.05
_LADDER_PARAMETERS = 108e6
_LADDER_TOKENS = 20 * _LADDER_PARAMETERS
_LADDER_BATCH_TOKENS = 160 * 2048
_LADDER_LEARNING_RATE = 0.0047 / 2
_MAX_TIED_SHARE = 1 / 3
_MAX_MUON_SHARE = 1 / 3
_ASPECTS = ((128, 32.0), (768, 64.0), (2048, 128.0))
"""Width and ratio of width to depth: configs/demo.yaml, OLMo-core's 190M and its 1B."""
_HEADS = ((256, 32), (1536, 64), (1 << 31, 128))
"""Width below which heads have a size, as in configs/, OLMo-core's 190M and its 1B."""
_CONTEXTS = ((8e6, 256), (50e6, 512), (300e6, 1024), (800e6, 2048), (math.inf, 4096))
"""Parameters below which rows have a length, in tokens, as in configs/."""
_MAX_WIDTH = 16_384


@cache
def num_heads(width: int) -> int:
    """Number of heads, of an even size near the usual one."""
    usual = next(size for limit, size in _HEADS if width < limit)
    fitting = [heads for heads in range(1, width // 16 + 1) if not width % (2 * heads)]
    return min(fitting, key=lambda heads: abs(math.log(width / heads / usual)))


def widths() -> list[int]:
    """Widths of models, ascending, in steps that grow with the size of heads."""
    return [*range(32, 256, 16), *range(256, 1536, 64), *range(1536, _MAX_WIDTH + 1, 128)]


def usual_depth(width: int) -> float:
    """Number of layers for a width, interpolated between known models."""
    points = [(math.log(at), math.log(aspect)) for at, aspect in _ASPECTS]
    place = math.log(width)
    if place <= points[0][0] or place >= points[-1][0]:
        aspect = points[0][1] if place <= points[0][0] else points[-1][1]
    else:
        aspect = next(
            low + (place - x) / (above - x) * (high - low)
            for (x, low), (above, high) in pairwise(points)
            if place <= above
        )
    return width / math.exp(aspect)


def shape_of(width: int, num_layers: int, vocab_size: int) -> ModelSection:
    """A model; embeddings are tied if they would otherwise be over a third of all parameters."""
    fields = {"num_layers": num_layers, "width": width, "num_heads": num_heads(width)}
    shape = ModelSection.model_validate(fields)
    size = ModelSize.of(shape, vocab_size)
    if size.embedding + size.head > _MAX_TIED_SHARE * size.total:
        return ModelSection.model_validate({**fields, "tie_embeddings": True})
    return shape


def scaling_parameters(shape: ModelSection, vocab_size: int) -> int:
    """Parameters that multiply a token: the matrices of the blocks, and the head, tied or not."""
    return ModelSize.of(shape, vocab_size).matrices + vocab_size * shape.width


def batch_tokens(training_tokens: float) -> float:
    """Tokens per step for a length of training.

    OLMo-core states it by parameters, at 20 tokens each; the batch size beyond which steps stop
    saving tokens grows with the length of training, not with the model (Zhang et al., 2024,
    arXiv:2410.21676).
    """
    return _LADDER_BATCH_TOKENS * math.pow(training_tokens / _LADDER_TOKENS, 2 / 3)


def min_batch_tokens(shape: ModelSection, flops_per_token: float) -> float:
    """Tokens per step below which Muon's update takes over a third of a step's FLOPs."""
    return muon_flops(shape) / flops_per_token * (1 - _MAX_MUON_SHARE) / _MAX_MUON_SHARE


def learning_rate(parameters: float) -> float:
    """Peak learning rate at the batch size of `batch_tokens`."""
    return _LADDER_LEARNING_RATE * math.pow(parameters / _LADDER_PARAMETERS, -1 / 3)


def context_tokens(parameters: float) -> int:
    """Row length in tokens."""
    return next(context for limit, context in _CONTEXTS if parameters < limit)


def muon_flops(shape: ModelSection) -> float:
    """FLOPs of Muon's orthogonalization per step, over all ranks at ZeRO stages 1 to 3."""
    return orthogonalization_flops(matrices_of(shape))
