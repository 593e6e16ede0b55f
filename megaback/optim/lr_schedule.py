"""Learning-rate schedules, as pure functions of the step, so that a resume needs no state."""

import math

from megaback.config import OptimizerSection


def rate_factor_at(step: int, total_steps: int, section: OptimizerSection) -> float:
    """Learning rate of a step, counted from 0, as a fraction of the peak.

    A linear warmup, then decay to `final_learning_rate_ratio` on the last step: cosine (Loshchilov
    & Hutter, "SGDR", 2017), linear, or, with `wsd`, linear in the last `decay_fraction` of the
    steps only (Hu et al., "MiniCPM", 2024). A run with horizons stays at the peak.
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    first = section.warmup_steps
    if section.schedule == "wsd":
        decay_steps = 0 if section.decay_at is not None else section.decay_steps(total_steps)
        first = max(first, total_steps - 1 - decay_steps)
    progress = min(max(step - first, 0) / max(total_steps - 1 - first, 1), 1.0)
    left = (
        0.5 * (1 + math.cos(math.pi * progress)) if section.schedule == "cosine" else 1 - progress
    )
    floor = section.final_learning_rate_ratio
    return floor + (1 - floor) * left
