"""Settings that `megaback plan --choose` finds for three models on 1 to 512 H100s.

    python benchmarks/choices.py

Prints the table of docs/scale.md: the fastest settings that fit, and the time by part. Batches are
of 512 rows, so that 512 ranks divide them; of 64 with rows of 131,072 tokens.
"""

from pathlib import Path

import click
from smoke import Benchmark

from data_pipeline.errors import NotEnoughMemoryError
from megaback.config_file import load_config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import find_device
from megaback.planning.plan import plan_run
from megaback.planning.run_settings import Cluster, batch_of
from megaback.planning.search import Candidate, search

_CONFIGS = Path(__file__).parents[1] / "configs"
_MODELS = {
    "124M": ("xcoax_100bt", 50_304, ("model.width=768", "model.num_heads=12")),
    "1B": ("reverse_1b", 32_000, ()),
    "7B": ("reverse_7b", 32_000, ()),
    "7B, 131,072": (
        "reverse_7b",
        32_000,
        ("batch.context_tokens=131072", "batch.global_batch_rows=64"),
    ),
}
"""Config, vocabulary and overrides of each model."""
_COMMON = ("batch.global_batch_rows=512", "training.epochs=null", "training.steps=10000")
_CLUSTERS = ((1, 1), (1, 8), (8, 8), (64, 8))
"""Nodes, and devices of each."""


def _settings(best: Candidate, cluster: Cluster) -> str:
    config = best.config
    rows, _ = batch_of(config, cluster)
    words = [f"ZeRO {config.zero.stage}", config.training.activation_checkpointing]
    words.append(f"{rows} row{'s' * (rows > 1)}")
    if config.batch.sequence_parallel > 1:
        words.append(f"{config.batch.sequence_parallel} ranks per row")
    if config.zero.hierarchical and config.zero.stage:
        words.append("hierarchical")
    if config.zero.offload != "none":
        words.append(f"offload {config.zero.offload}")
    if config.zero.reduce_once and config.zero.stage > 1:
        words.append("reduce once")
    if config.zero.reduction == "reduce":
        words.append("reduce")
    return ", ".join(words)


def _days(days: float) -> str:
    return f"{days:.2g} days" if days < 99 else f"{days:,.0f} days"


@click.command(cls=Benchmark, smoke="")
def main() -> None:
    """Print the table of docs/scale.md."""
    click.echo(
        "| model | H100s | settings | GB | s per step | arithmetic | memory | network | hidden | "
        "host | MFU | 100 billion tokens |"
    )
    click.echo("|---" * 12 + "|")
    for model, (name, vocab_size, overrides) in _MODELS.items():
        for nodes, per_node in _CLUSTERS:
            config = load_config(_CONFIGS / f"{name}.yaml", (*_COMMON, *overrides))
            facts = run_facts(config, vocab_size, 1e11)
            cluster = Cluster(nodes, per_node, find_device("h100-80gb"))
            line = f"| {model} | {cluster.ranks} |"
            try:
                best = search(config, facts, cluster, count=1).fastest[0]
            except NotEnoughMemoryError:
                click.echo(f"{line} none fit |{' |' * 9}")
                continue
            time = best.time
            duration = plan_run(best.config, facts, cluster).duration
            assert duration is not None
            assert duration.days is not None
            parts = (
                *(time.total_s, time.arithmetic_s, time.memory_s, time.network_s),
                *(time.hidden_network_s, time.host_s),
            )
            cells = " | ".join(f"{part:.2g}" if part < 99 else f"{part:,.0f}" for part in parts)
            click.echo(
                f"{line} {_settings(best, cluster)} | "
                f"{best.memory.parts.total / 1e9:.0f} | {cells} | {duration.mfu:.0%} | "
                f"{_days(duration.days)} |"
            )


if __name__ == "__main__":
    main()
