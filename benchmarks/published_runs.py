"""Published runs: device-hours predicted at the plan's default MFU, and those reported.

    python benchmarks/published_runs.py

The prediction is FLOPs per token of the model's shape, times tokens, over the peak. Every row
counts as one document, as these runs packed them or do not report it. `MFU` is that of the reported
hours, counted in the same way.
"""

from dataclasses import dataclass

import click
from smoke import Benchmark

from megaback.config import ModelSection
from megaback.planning.devices import find_device
from megaback.planning.flops import ModelSize, flops_per_token
from megaback.planning.plan import DEFAULT_MFU


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run as reported by its authors."""

    name: str
    shape: ModelSection
    vocab_size: int
    context_tokens: int
    tokens: float
    device: str
    device_hours: float


def _shape(
    layers: int, width: int, heads: int, kv_heads: int, mlp_width: int, *, tied: bool = False
) -> ModelSection:
    return ModelSection(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_width=mlp_width,
        qk_norm=False,
        tie_embeddings=tied,
    )


# LEDOM's shapes are not Llama's; configs/reverse_2b.yaml and reverse_7b.yaml approximate them.
# GPT-2's MLP has two matrices of 4 x width, with the FLOPs of three of 8/3 x width.
PUBLISHED = (
    Published(
        name="LEDOM 7B",
        shape=_shape(32, 4096, 32, 8, 14336),
        vocab_size=32_000,
        context_tokens=4096,
        tokens=435e9,
        device="a100-80gb",
        device_hours=64 * 628,
    ),
    Published(
        name="LEDOM 2B",
        shape=_shape(24, 2560, 20, 4, 8704),
        vocab_size=32_000,
        context_tokens=4096,
        tokens=435e9,
        device="a100-80gb",
        device_hours=64 * 307,
    ),
    Published(
        name="TinyLlama 1.1B",
        shape=_shape(22, 2048, 32, 4, 5632),
        vocab_size=32_000,
        context_tokens=2048,
        tokens=22e9,
        device="a100-40gb",
        device_hours=8 * 32,
    ),
    Published(
        name="LLaMA 13B",
        shape=_shape(40, 5120, 40, 40, 13824),
        vocab_size=32_000,
        context_tokens=2048,
        tokens=1e12,
        device="a100-80gb",
        device_hours=135_168,
    ),
    Published(
        name="Llama 2 7B",
        shape=_shape(32, 4096, 32, 32, 11008),
        vocab_size=32_000,
        context_tokens=4096,
        tokens=2e12,
        device="a100-80gb",
        device_hours=184_320,
    ),
    Published(
        name="Llama 2 70B",
        shape=_shape(80, 8192, 64, 8, 28672),
        vocab_size=32_000,
        context_tokens=4096,
        tokens=2e12,
        device="a100-80gb",
        device_hours=1_720_320,
    ),
    Published(
        name="Llama 3 8B",
        shape=_shape(32, 4096, 32, 8, 14336),
        vocab_size=128_256,
        context_tokens=8192,
        tokens=15e12,
        device="h100-80gb",
        device_hours=1.3e6,
    ),
    Published(
        name="GPT-2 124M, llm.c",
        shape=_shape(12, 768, 12, 12, 2048, tied=True),
        vocab_size=50_304,
        context_tokens=1024,
        tokens=10e9,
        device="a100-80gb",
        device_hours=8 * 1.5,
    ),
)


@click.command(cls=Benchmark, smoke="")
def main() -> None:
    """Print the table of docs/scale.md."""
    click.echo(
        f"| run | weights | GFLOP a token | tokens | reported | at {DEFAULT_MFU:.0%} | MFU |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for run in PUBLISHED:
        flops = flops_per_token(run.shape, run.vocab_size, (run.context_tokens + 1) / 2)
        peak = find_device(run.device).peak_flops("bf16")
        assert peak is not None
        hours = run.tokens * flops / peak / 3600
        size = ModelSize.of(run.shape, run.vocab_size).total
        kind = run.device.split("-")[0].upper()
        click.echo(
            f"| {run.name} | {size / 1e9:.3g} billion | {flops / 1e9:.3g} | {run.tokens:.3g} | "
            f"{run.device_hours:,.0f} {kind}-hours | {hours / DEFAULT_MFU:,.0f} | "
            f"{hours / run.device_hours:.0%} |"
        )


if __name__ == "__main__":
    main()
