"""Sampling of next ids: its options, and the choice for many rows at once.

Every row has its own stream of uniform numbers, made on the CPU from its seed: its choices depend
neither on other rows nor on the device.

Shapes: B rows, V vocabulary, C candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.common.number_ranges import (
    COUNT,
    COUNT_OR_ZERO,
    REPETITION_PENALTY,
    SHARE,
    SOME_SHARE,
    TEMPERATURE,
    TOP_K,
)
from data_pipeline.errors import ConfigError, NonFiniteError

MIN_TEMPERATURE = 1e-5
_ALLOWED = {
    "max_new_tokens": COUNT,
    "temperature": TEMPERATURE,
    "top_k": TOP_K,
    "min_new_tokens": COUNT_OR_ZERO,
    "seed": COUNT_OR_ZERO,  # of a later sample, whose first has a `SEED`
    "top_p": SOME_SHARE,
    "min_p": SHARE,
    "repetition_penalty": REPETITION_PENALTY,
}


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters; the first three defaults are the BackGPT experiment's.

    They apply in this order: repetition penalty, temperature, top_k, top_p, min_p.
    """

    max_new_tokens: int = 500
    """Maximum number of tokens of a sample."""
    temperature: float = 0.8
    """Sampling temperature; 0 takes the most likely token, as does anything below 1e-5: logits
    divided by less are non-finite."""
    top_k: int = 200
    """Number of most likely tokens to sample from; 0: all."""
    seed: int = 0
    """Seed of the first sample; the next ones have the next numbers."""
    top_p: float = 1.0
    """Total probability of the smallest set of tokens to sample from: Holtzman et al., "The
    Curious Case of Neural Text Degeneration" (2020)."""
    min_p: float = 0.0
    """Minimum probability of a token, relative to that of the most likely one."""
    repetition_penalty: float = 1.0
    """Divisor of the logits above 0 of ids that were read or written, and factor of those below:
    Keskar et al., "CTRL" (2019)."""
    stop_ids: tuple[int, ...] = ()
    """Ids that end a sample, beside the document's end marker."""
    min_new_tokens: int = 0
    """Minimum number of tokens: ids that end a sample are masked before it."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name, allowed in _ALLOWED.items():
            if (problem := allowed.problem(getattr(self, name))) is not None:
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}, {problem}")

    def require_ids(self, vocab_size: int) -> None:
        """Raises ConfigError if the vocabulary does not have an id of `stop_ids`."""
        for stop_id in self.stop_ids:
            if not 0 <= stop_id < vocab_size:
                raise ConfigError(
                    f"`stop_ids` has {stop_id}, and the model has the ids 0 to {vocab_size - 1:,}; "
                    "give some of these"
                )


def choose(logits_BV: Tensor, options: SamplingOptions, draws_B: Tensor) -> Tensor:
    """An id for each row, -1 for a row without a finite maximum: shape (B,).

    `draws_B`: a uniform number for each row, in fp64 and on the device of the logits, which may be
    -inf. The host does not wait for the device.
    """
    if options.temperature < MIN_TEMPERATURE:
        return torch.where(logits_BV.amax(-1).isfinite(), logits_BV.argmax(-1), -1)
    probabilities_BC, ids_BC = candidates(logits_BV, options)
    # In float64 and with draws of 24 bits, a product below the sum stays below it.
    sums_BC = probabilities_BC.double().cumsum(-1)
    places_B1 = torch.searchsorted(sums_BC, draws_B[:, None] * sums_BC[:, -1:], right=True)
    places_B1 = places_B1.clamp_(max=sums_BC.shape[-1] - 1)  # past the end for a row of NaN
    if ids_BC is not None:
        places_B1 = ids_BC.gather(-1, places_B1)
    return torch.where(sums_BC[:, -1] > 0, places_B1[:, 0], -1)


def fetched(chosen_B: Tensor) -> list[int]:
    """The chosen ids, fetched from the device once. Raises NonFiniteError if a row has none."""
    ids: list[int] = chosen_B.tolist()
    if -1 in ids:
        raise NonFiniteError(
            "the model's logits are non-finite: its weights are damaged or too large for this "
            "precision; use an earlier checkpoint, or fp32"
        )
    return ids


def candidates(logits_BV: Tensor, options: SamplingOptions) -> tuple[Tensor, Tensor | None]:
    """Relative probabilities, 0 for excluded ids, and their ids: each of shape (B, C).

    Ids are None if the probabilities are of the whole vocabulary, in order.
    """
    logits_BC, ids_BC = logits_BV / options.temperature, None
    vocab_size = logits_BV.shape[-1]
    maximum = min(options.top_k, vocab_size) or vocab_size
    if maximum < vocab_size or options.top_p < 1:
        logits_BC, ids_BC = logits_BC.topk(maximum)
    probabilities_BC = logits_BC.softmax(-1)
    if options.top_p < 1:
        before_BC = probabilities_BC.cumsum(-1) - probabilities_BC
        before_BC[:, 0] = -1  # keep the likeliest, even if top_p underflows in fp32
        probabilities_BC = probabilities_BC.masked_fill(before_BC >= options.top_p, 0)
    if options.min_p > 0:
        min_B1 = options.min_p * probabilities_BC.amax(-1, keepdim=True)
        probabilities_BC = probabilities_BC.masked_fill(probabilities_BC < min_B1, 0)
    return probabilities_BC, ids_BC


def penalized(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Logits with a penalty on the ids that a row has seen."""
    less_likely_BV = torch.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return torch.where(seen_BV, less_likely_BV, logits_BV)
