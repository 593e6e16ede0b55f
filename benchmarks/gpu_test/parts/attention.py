"""Every attention backend against the definition in fp32, forward and gradients, in bf16."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import ATTENTION, DETERMINISTIC
from megaback.model.attention import (
    AttentionBackend,
    Segments,
    padded_boundaries,
    sdpa_attention,
)
from megaback.model.attention_choice import (
    choose_attention,
    definition,
    why_unusable,
    with_gradients,
)
from megaback.model.flash_attention import KERNELS

_MAX_MEAN_ERROR = 0.01
"""Root mean square of the difference, relative to that of the exact values. Rounding to bf16, of 8
bits, gives 0.002 to 0.005."""
_MAX_ERROR = 0.05
"""Maximum difference, relative to the largest value."""


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int


def _cases(bench: Bench) -> tuple[Case, ...]:
    uneven = (1, 7, 128, 300, 2, 64, 129)
    cases = (
        Case("uneven documents", uneven, 8, 8, 64),
        Case("4 heads per key head", uneven, 8, 2, 64),
        Case("one key head", uneven, 8, 1, 64),
        Case("heads of 128", uneven, 8, 4, 128),
        Case("one document", (bench.sized(4096, 700, 100),), 8, 2, 64),
        Case("only documents of one token", (1,) * 33, 4, 4, 64),
    )
    return cases[: bench.sized(6, 6, 2)]


def run(bench: Bench) -> None:
    for kernel in KERNELS:
        reason = why_unusable(kernel, bench.device, torch.bfloat16, 64)
        if reason is None:
            _check_backend(bench, kernel.name, kernel.load())
        else:
            bench.skip(kernel.name, reason, ATTENTION)
    _check_backend(bench, "sdpa", sdpa_attention)
    chosen = choose_attention("auto", bench.device, torch.bfloat16, 64)
    bench.measured("auto", ATTENTION, backend=chosen.name, rejected="; ".join(chosen.rejected))


def _check_backend(bench: Bench, name: str, backend: AttentionBackend) -> None:
    for case in _cases(bench):
        with bench.attempt(f"{name}, {case.name}", ATTENTION):
            inputs, direction_THE, segments = _inputs(case, bench.device)
            found = with_gradients(backend, inputs, direction_THE, segments)
            exact = with_gradients(
                definition, tuple(one.float() for one in inputs), direction_THE.float(), segments
            )
            errors = [_errors(one, other) for one, other in zip(found, exact, strict=True)]
            mean, largest = (max(values) for values in zip(*errors, strict=True))
            bench.require(
                f"{name}, {case.name}",
                # A NaN is not at most a bound.
                all(one <= _MAX_MEAN_ERROR and other <= _MAX_ERROR for one, other in errors),
                f"outputs and gradients of the definition, at most {_MAX_MEAN_ERROR} in the mean "
                f"and {_MAX_ERROR} at most off",
                ATTENTION,
                mean_error=mean,
                max_error=largest,
            )
    with bench.attempt(f"{name}, repeated", DETERMINISTIC):
        inputs, direction_THE, segments = _inputs(_cases(bench)[1], bench.device)
        torch.use_deterministic_algorithms(True)
        try:
            both = [with_gradients(backend, inputs, direction_THE, segments) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        bench.require(
            f"{name}, repeated",
            all(torch.equal(one, other) for one, other in zip(*both, strict=True)),
            "bit for bit the same with deterministic algorithms",
            DETERMINISTIC,
        )


def _inputs(case: Case, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor, Segments]:
    """Queries, keys and values, the gradient of the output, and segments with empty ones."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = sum(case.lengths)
    query_THE, key_TKE, value_TKE, direction_THE = (
        torch.randn(num_tokens, heads, case.head_dim, generator=generator).to(
            device, torch.bfloat16
        )
        for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
    )
    edges = Segments.from_lengths(case.lengths, torch.device("cpu")).cu_seqlens
    padded = torch.from_numpy(padded_boundaries(torch.cat((edges, edges[-1:])).numpy()))
    segments = Segments(padded.to(device), case.lengths, 2 * max(case.lengths))
    return (query_THE, key_TKE, value_TKE), direction_THE, segments


def _errors(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root mean square and maximum of a difference, relative to those of the exact values.

    Gradients of documents of one token are zeros; there the difference itself counts.
    """
    difference = found.float() - exact
    scale = exact.square().mean().sqrt().clamp(min=1e-3)
    largest = exact.abs().max().clamp(min=1e-3)
    return (
        float(difference.square().mean().sqrt() / scale),
        float(difference.abs().max() / largest),
    )
