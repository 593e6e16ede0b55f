"""Published speeds of training on GPUs, beside those that the plan's time by part predicts.

    python benchmarks/published_speeds.py

Tokens per second and GPU. Rows marked `fitted` gave the fitted values of
`megaback/planning/rates.py`; the others were held out. Full sharding (FSDP) is planned as ZeRO 3,
whole rows as one document each. Sources:

- torchtitan: pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3 (H100s
  of 500 W with 2.4 TB/s), and docs/performance.md at 0413364, "Llama 2" and "Llama 3" (A100s).
- OLMo-core: allenai/OLMo-core, README.md, "Official training scripts", and src/scripts/train/
  (rows per micro-batch; the number of GPUs is not stated, and 64 are assumed).
- nanochat: karpathy/nanochat, runs/run1000.sh, the log of the model of depth 32.
- MPT: mosaicml/llm-foundry, scripts/train/benchmarking/README.md, tables "H100 80GB BF16",
  "A100 80GB" and "A100 40GB" (1,600 Gbit/s between nodes).
"""

from dataclasses import dataclass, replace
from statistics import mean

import click
from smoke import Benchmark

from megaback.config import LOSS_CHUNK_TOKENS, ModelSection, OptimizerSection
from megaback.planning.collectives import step_calls
from megaback.planning.devices import find_device
from megaback.planning.flops import flops_per_token
from megaback.planning.memory import Setting
from megaback.planning.network import step_traffic
from megaback.planning.step_time import StepTime, TimedStep, step_time


@dataclass(frozen=True, kw_only=True)
class Published:
    """A measured speed, and the settings of its run."""

    name: str
    shape: ModelSection
    vocab_size: int
    context_tokens: int
    micro_batch_rows: int
    micro_batches: int = 1
    device: str
    memory_rate: float | None = None
    """Bandwidth of the device's memory, if it is not the usual one."""
    devices: int
    stage: int = 3
    checkpointing: str = "none"
    optimizer: str = "adamw"
    is_compiled: bool = False
    tokens_per_s: float
    """Tokens per second and device."""
    is_fitted: bool = False

    def predicted(self) -> StepTime:
        device = find_device(self.device)
        if self.memory_rate is not None:
            device = replace(device, memory_rate=self.memory_rate)
        per_node = min(self.devices, 8)
        traffic = step_traffic(
            self.shape,
            self.vocab_size,
            ranks=self.devices,
            accumulation_steps=self.micro_batches,
            stage=self.stage,
            precision="bf16",
            optimizer=self.optimizer,
        )
        setting = Setting(
            shape=self.shape,
            vocab_size=self.vocab_size,
            micro_batch_tokens=self.micro_batch_rows * self.context_tokens,
            accumulates=self.micro_batches > 1,
            ranks=self.devices,
            ranks_per_node=per_node,
            stage=self.stage,
            precision="bf16",
            checkpointing=self.checkpointing,
            optimizer=self.optimizer,
            offload="none",
            loss_chunk_tokens=max(LOSS_CHUNK_TOKENS, self.context_tokens),
            attention="flash_attn",
            saves_while_training=False,
            is_cpu=False,
            overlaps=self.stage == 3,
        )
        assert device.bf16_flops is not None
        section = OptimizerSection(name=self.optimizer, learning_rate=1e-3)
        found = step_time(
            TimedStep(
                setting=setting,
                traffic=traffic,
                calls=step_calls(setting, section, self.micro_batches, "all_reduce"),
                nodes=self.devices // per_node,
                micro_batches=self.micro_batches,
                attended_tokens=(self.context_tokens + 1) / 2,
                is_compiled=self.is_compiled,
                peak_flops=device.bf16_flops,
            ),
            device,
        )
        assert found is not None
        return found

    @property
    def predicted_tokens_per_s(self) -> float:
        tokens = self.micro_batches * self.micro_batch_rows * self.context_tokens
        return tokens / self.predicted().total_s

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization, with attention counted as causal."""
        flops = flops_per_token(self.shape, self.vocab_size, (self.context_tokens + 1) / 2)
        peak = find_device(self.device).bf16_flops
        assert peak is not None
        return self.tokens_per_s * flops / peak


def _shape(
    layers: int,
    width: int,
    heads: int,
    kv_heads: int | None = None,
    mlp_width: int | None = None,
    *,
    qk_norm: bool = False,
    tied: bool = False,
) -> ModelSection:
    """A model; an MLP of two matrices of 4 x width is taken for three of 8/3 x width."""
    return ModelSection(
        num_layers=layers,
        width=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_width=mlp_width or 8 * width // 3,
        qk_norm=qk_norm,
        tie_embeddings=tied,
    )


_LLAMA_8B = _shape(32, 4096, 32, 8, 14336)
_LLAMA_70B = _shape(80, 8192, 64, 8, 28672)


def _titan_h100(devices: int, tokens_per_s: float, *, is_compiled: bool = False) -> Published:
    return Published(
        name="torchtitan, Llama 3.1 8B",
        shape=_LLAMA_8B,
        vocab_size=128_256,
        context_tokens=8192,
        micro_batch_rows=2,
        device="h100-80gb",
        memory_rate=2.4e12,
        devices=devices,
        checkpointing="selective",
        tokens_per_s=tokens_per_s,
        is_compiled=is_compiled,
    )


def _titan_a100(
    name: str,
    shape: ModelSection,
    rows: int,
    checkpointing: str,
    tokens_per_s: float,
) -> Published:
    is_llama3 = "Llama 3" in name
    return Published(
        name=f"torchtitan, {name}",
        shape=shape,
        vocab_size=128_256 if is_llama3 else 32_000,
        context_tokens=8192 if is_llama3 else 4096,
        micro_batch_rows=rows,
        device="a100-80gb",
        devices=64,
        checkpointing=checkpointing,
        tokens_per_s=tokens_per_s,
    )


def _olmo(
    name: str,
    shape: ModelSection,
    rows: int,
    tokens_per_s: float,
    *,
    is_fitted: bool = False,
) -> Published:
    return Published(
        name=f"OLMo-core, {name}",
        shape=shape,
        vocab_size=100_352,
        context_tokens=4096,
        micro_batch_rows=rows,
        micro_batches=8,
        device="h100-80gb",
        devices=64,
        is_compiled=True,
        tokens_per_s=tokens_per_s,
        is_fitted=is_fitted,
    )


_MPT = {
    "125m": _shape(12, 768, 12, tied=True),
    "350m": _shape(24, 1024, 16, tied=True),
    "760m": _shape(24, 1536, 12, tied=True),
    "1b": _shape(24, 2048, 16, tied=True),
    "3b": _shape(32, 2560, 20, tied=True),
    "7b": _shape(32, 4096, 32, tied=True),
    "13b": _shape(40, 5120, 40, tied=True),
    "30b": _shape(48, 7168, 56, tied=True),
    "70b": _shape(80, 8192, 64, tied=True),
}
"""Shapes of scripts/train/yamls/pretrain/mpt-*.yaml."""


def _mpt(
    size: str,
    context_tokens: int,
    devices: int,
    rows: int,
    micro_batches: int,
    checkpointing: str,
    tokens_per_s: float,
    device: str = "h100-80gb",
    *,
    is_fitted: bool = False,
) -> Published:
    return Published(
        name=f"MPT {size}",
        shape=_MPT[size],
        vocab_size=50_368,
        context_tokens=context_tokens,
        micro_batch_rows=rows,
        micro_batches=micro_batches,
        device=device,
        devices=devices,
        checkpointing=checkpointing,
        tokens_per_s=tokens_per_s,
        is_fitted=is_fitted,
    )


PUBLISHED = (
    _titan_h100(8, 5762),
    _titan_h100(8, 6667, is_compiled=True),
    _titan_h100(128, 5605),
    _titan_h100(128, 6514, is_compiled=True),
    _titan_a100("Llama 3 8B", _LLAMA_8B, 1, "selective", 2973),
    _titan_a100("Llama 3 70B", _LLAMA_70B, 1, "block", 331),
    _titan_a100("Llama 2 13B", _shape(40, 5120, 40, 40, 13824), 2, "none", 2162),
    _titan_a100("Llama 2 70B", _LLAMA_70B, 2, "block", 353),
    _olmo("OLMo 2 7B", _shape(32, 4096, 32, 32, 11008, qk_norm=True), 2, 10_000, is_fitted=True),
    _olmo("Llama 3 8B", _LLAMA_8B, 2, 9_500),
    _olmo("OLMo 2 13B", _shape(40, 5120, 40, 40, 13824, qk_norm=True), 1, 4_600),
    Published(
        name="nanochat, depth 32",
        shape=_shape(32, 2048, 16, qk_norm=True),
        vocab_size=65_536,
        context_tokens=2048,
        micro_batch_rows=8,
        micro_batches=4,
        device="h100-80gb",
        devices=8,
        stage=1,
        optimizer="muon",
        is_compiled=True,
        tokens_per_s=83_385 * 4 / 8,
    ),
    _mpt("1b", 2048, 8, 14, 1, "none", 45_455, is_fitted=True),
    _mpt("760m", 2048, 32, 24, 1, "none", 67_971),
    _mpt("1b", 2048, 64, 20, 1, "none", 44_402),
    _mpt("3b", 2048, 64, 6, 3, "none", 22_525),
    _mpt("7b", 2048, 8, 6, 1, "none", 10_643),
    _mpt("7b", 4096, 8, 16, 2, "block", 8_611),
    _mpt("7b", 32_768, 8, 2, 2, "block", 3_318, is_fitted=True),
    _mpt("13b", 2048, 8, 2, 1, "none", 4_792),
    _mpt("13b", 2048, 64, 2, 1, "none", 4_800),
    _mpt("30b", 2048, 32, 14, 3, "block", 2_308, is_fitted=True),
    _mpt("70b", 2048, 64, 8, 4, "block", 1_039),
    _mpt("125m", 2048, 8, 32, 2, "none", 141_737, "a100-80gb"),
    _mpt("1b", 2048, 8, 14, 4, "none", 20_513, "a100-80gb", is_fitted=True),
    _mpt("7b", 2048, 8, 6, 2, "none", 4_641, "a100-80gb", is_fitted=True),
    _mpt("7b", 32_768, 8, 2, 2, "block", 1_672, "a100-80gb", is_fitted=True),
    _mpt("13b", 2048, 128, 16, 1, "block", 1_972, "a100-40gb", is_fitted=True),
    _mpt("70b", 2048, 64, 8, 4, "block", 410, "a100-80gb"),
)


def errors(*, is_fitted: bool) -> list[float]:
    """Relative differences of the predicted speeds from the published ones."""
    return [
        run.predicted_tokens_per_s / run.tokens_per_s - 1
        for run in PUBLISHED
        if run.is_fitted == is_fitted
    ]


@click.command(cls=Benchmark, smoke="")
def main() -> None:
    """Print the table of docs/scale.md."""
    click.echo(
        "| run | GPUs | rows x tokens | recomputed | compiled | MFU | published | predicted | "
        "error | arithmetic, memory, network, host |"
    )
    click.echo("|---|---|---|---|---|---|---|---|---|---|")
    for run in PUBLISHED:
        time = run.predicted()
        parts = (time.arithmetic_s, time.memory_s, time.network_s, time.host_s)
        shares = ", ".join(f"{part / time.total_s:.0%}" for part in parts)
        error = run.predicted_tokens_per_s / run.tokens_per_s - 1
        kind = run.device.split("-")[0].upper()
        click.echo(
            f"| {run.name} | {run.devices} {kind}s | {run.micro_batch_rows} x "
            f"{run.context_tokens:,} | {run.checkpointing} | "
            f"{'yes' if run.is_compiled else 'no'} | {run.mfu:.0%} | {run.tokens_per_s:,.0f} | "
            f"{run.predicted_tokens_per_s:,.0f} | {error:+.0%}{' (fitted)' * run.is_fitted} | "
            f"{shares} |"
        )
    for is_fitted, name in ((True, "fitted"), (False, "held out")):
        found = errors(is_fitted=is_fitted)
        click.echo(f"\n{name}: mean absolute error {mean(map(abs, found)):.1%} of {len(found)}")


if __name__ == "__main__":
    main()
