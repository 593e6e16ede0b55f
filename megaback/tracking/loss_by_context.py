"""Loss over all targets, and by length of context. Loads no torch.

A target's context is the tokens before it within its segment: a document, or a row's part of one.
Buckets end at powers of two: 1, 2, 3-4, 5-8, and so on.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.text.codec import Direction


@dataclass(frozen=True)
class Loss:
    """Mean loss of a set of targets, per token and per byte of the text that they encode."""

    nats_per_token: float
    bits_per_byte: float | None
    """None if the targets encode no text, such as end markers alone."""
    num_targets: int

    @classmethod
    def of_sums(cls, nats: float, num_targets: float, num_bytes: float) -> "Loss":
        bits = nats / math.log(2) / num_bytes if num_bytes else None
        return cls(nats / max(num_targets, 1), bits, int(num_targets))


@dataclass(frozen=True)
class ContextLoss:
    """The loss over a whole set, and of each non-empty bucket by its name."""

    whole: Loss
    by_context: dict[str, Loss]
    by_direction: dict[str, Loss] = field(default_factory=dict)
    """The loss of each direction of a model of both."""

    @classmethod
    def of_sums(cls, sums_D3B: npt.NDArray[np.float64]) -> "ContextLoss":
        """From nats, targets and bytes of text of each bucket: shape (directions, 3, buckets).

        Of a model of both directions, the first is backward.
        """
        sums_3B = sums_D3B.sum(axis=0)
        of_directions_D3 = sums_D3B.sum(axis=2).tolist() if len(sums_D3B) > 1 else []
        return cls(
            Loss.of_sums(*sums_3B.sum(axis=1).tolist()),
            {
                bucket_name(number): Loss.of_sums(*sums.tolist())
                for number, sums in enumerate(sums_3B.T)
                if sums[1]
            },
            {
                direction.value: Loss.of_sums(*sums)
                for direction, sums in zip(Direction, of_directions_D3, strict=False)
            },
        )


def num_buckets(context_tokens: int) -> int:
    """Number of buckets of a context of `context_tokens`."""
    return (context_tokens - 1).bit_length() + 1


def bucket_of(context: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The bucket of each length of context in tokens, at least 1."""
    bucket: npt.NDArray[np.int32] = np.frexp(context - 1)[1]
    return bucket


def bucket_name(bucket: int) -> str:
    first, last = (1 << bucket >> 1) + 1, 1 << bucket
    return str(first) if first == last else f"{first}-{last}"
