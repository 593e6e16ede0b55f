"""Memory of a rank's gradients, as DeepSpeed's ZeRO stages 1 to 3 hold them. Loads no torch.

"Flat" are slices in fp32 that are made for fp32 gradients at stages 1 and 2: reduced buckets are
added to them, and the optimizer gets them as they are.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GradientSetting:
    """Settings that determine the memory of gradients."""

    stage: int
    weight_bytes: int
    accumulator_bytes: int
    """Bytes per element of a gradient that is accumulated."""
    accumulates: bool
    """Whether a step has several micro-batches."""
    reduces_once: bool
    """Whether reductions at stages 2 and 3 are postponed to the step's end."""
    overlaps: bool
    """Whether reductions overlap with the backward pass."""
    is_offloaded: bool
    """Whether the optimizer is in host memory."""
    ranks: int

    @property
    def is_flat(self) -> bool:
        return self.stage in (1, 2) and self.accumulator_bytes != self.weight_bytes

    @property
    def is_whole(self) -> bool:
        """Whether a step's gradients are whole on every rank until its end."""
        return self.stage < 2 or self.reduces_once


@dataclass(frozen=True)
class GradientMemory:
    """Bytes at the peaks of a step, besides those that stage 3 always holds."""

    earlier: float
    """Gradients of earlier micro-batches."""
    last: float
    """Gradients at the end of the last backward pass, before a reduction of whole ones."""
    bucket: float
    """Buckets during the last backward pass, and copies of them while they are reduced."""
    reduced: float
    """Results of a reduction of whole gradients."""
    averaged: float
    """Gradients that the optimizer gets."""
    update_bytes: int
    """Bytes per element of a parameter group's copies for its update: a flat one, then in fp32."""


def gradient_memory(
    setting: GradientSetting, total: int, kept: int, bucket_elements: int, matrix: int
) -> GradientMemory:
    """Memory of the gradients of `total` parameters, at stages 1 to 3 or without sharding.

    `kept`: elements of the parameters that reach into the rank's slice (`gradient_buffer`);
    `matrix`: those of the largest matrix, which is reduced alone if a bucket is smaller.
    """
    stage, low, high = setting.stage, setting.weight_bytes, setting.accumulator_bytes
    share = total / setting.ranks
    flat = high * share if setting.is_flat else 0.0
    # What is reduced is cut by the ranks that keep it, and joined to be sent.
    joined = max(bucket_elements, matrix) if setting.ranks > 1 else 0
    if setting.is_whole:
        last = float(high * total)
        earlier = last if setting.accumulates else 0.0
        bucket = float(high * bucket_elements) if stage in (1, 2) else 0.0
    elif setting.is_flat:
        last = flat
        earlier = last if setting.accumulates else 0.0
        # A bucket, its parts joined, and these in fp32.
        bucket = float((2 * low + high) * bucket_elements)
    elif stage == 2 and not setting.is_offloaded:
        earlier = float(low * kept) if setting.accumulates else 0.0
        last = low * kept + earlier  # a micro-batch's are added to those of the previous ones
        bucket = float(low * (bucket_elements + joined))
    else:
        earlier = last = 0.0
        bucket = float(low * (bucket_elements + joined)) if stage == 2 else 0.0
    if setting.overlaps and stage in (1, 2):
        bucket += (high if setting.is_whole else low) * bucket_elements
    copies = 4 if low == 2 and high == 2 else 0
    return GradientMemory(
        earlier=earlier,
        last=last,
        bucket=bucket,
        reduced=flat if setting.is_whole else 0.0,
        averaged=flat or (0.0 if stage in (0, 3) or setting.is_offloaded else low * kept),
        update_bytes=0 if setting.is_flat else high + copies,
    )
