"""Rate of training steps on this machine's CPU, measured on the model that is planned."""

from collections.abc import Callable
from statistics import median
from time import monotonic

import torch

from megaback.config import ModelSection, OptimizerSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import build_optimizer
from megaback.planning.flops import flops_per_token
from megaback.planning.scaling_rules import muon_flops

_MAX_TOKENS = 4_096
_MAX_FLOPS = 2e11
"""FLOPs of a measured step: some seconds on a core."""
_MIN_STEPS = 2
_MAX_STEPS = 20
_DURATION_S = 3.0


def measured_flops(
    shape: ModelSection,
    vocab_size: int,
    context_tokens: int,
    batch_rows: int,
    threads: int,
    clock: Callable[[], float] = monotonic,
) -> float:
    """FLOP/s of steps in fp32 with random tokens: of the model, and of Muon's matrix products.

    Rows are single documents. Of large batches and models, a part of the rows and tokens is
    measured, and of models whose update alone would take long, no update. Sets the number of
    PyTorch's threads. `clock`: in seconds.
    """
    torch.set_num_threads(threads)
    flops = flops_per_token(shape, vocab_size, (context_tokens + 1) / 2)
    context_tokens = min(context_tokens, max(int(_MAX_FLOPS / flops), 2))
    rows = max(min(batch_rows, min(_MAX_TOKENS, int(_MAX_FLOPS / flops)) // context_tokens), 1)
    tokens = rows * context_tokens
    does_update = muon_flops(shape) <= _MAX_FLOPS
    model = ReverseGPT(shape, vocab_size)
    model.initialize(0)
    section = OptimizerSection(name="muon", learning_rate=1e-3)
    optimizer = build_optimizer(model.named_parameters(), shape, section)
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(0, vocab_size, (tokens,), generator=generator)
    positions_T = torch.arange(context_tokens).repeat(rows)
    segments = Segments.from_lengths((context_tokens,) * rows, ids_T.device)

    def step_s() -> float:
        start = clock()
        model(ids_T, ids_T, positions_T, segments).mean().backward()
        if does_update:
            optimizer.step()
        optimizer.zero_grad()
        return clock() - start

    step_s()  # allocates
    durations: list[float] = []
    while len(durations) < _MIN_STEPS or (
        sum(durations) < _DURATION_S and len(durations) < _MAX_STEPS
    ):
        durations.append(step_s())
    step_flops = tokens * flops_per_token(shape, vocab_size, (context_tokens + 1) / 2)
    if does_update:
        step_flops += muon_flops(shape)
    return step_flops / median(durations)
