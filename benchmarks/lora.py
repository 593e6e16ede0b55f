"""LoRA beside full fine-tuning of one base: val loss by learning rate, memory, CPU time, disk.

    python benchmarks/lora.py --base runs/base --shards data/instruct --out runs/lora [OVERRIDES]

Fine-tunes the base with all weights and with LoRA of `--ranks` on all matrices, with AdamW, at each
learning rate with the first seed, and at the best one with the others: runs of one process, whose
base and shards are made as in benchmarks/backchat.py. Memory is the peak resident memory of a run
without libraries; CPU time per step is that of ten more steps, in a run of its own. Finished runs
are not repeated. OVERRIDES of the config hold for all runs. Printed is a table in Markdown.
"""

import gc
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, stdev

import click
from memory import status_bytes
from smoke import Benchmark

from data_pipeline.common.number_ranges import COUNT
from launcher.ranks.local import rank_names
from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.data_facts import run_facts
from megaback.planning.flops import ModelSize
from megaback.run_folder import FROZEN_NAME, complete_checkpoints

_MEASURED_STEPS = (2, 12)


@dataclass(frozen=True)
class Setting:
    """Full fine-tuning (rank 0) or LoRA, at one rate, with one seed."""

    rank: int
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.rank or 'full'}-{self.rate:g}-{self.seed}"


@dataclass(frozen=True)
class Inputs:
    """Files and settings of all runs."""

    base: Path
    shards: Path
    out: Path
    steps: int
    overrides: tuple[str, ...]

    def config(self, setting: Setting, steps: int, run: Path) -> Config:
        lora = {"rank": setting.rank, "target_modules": "all-linear"} if setting.rank else {}
        fields = {
            "run": str(run),
            "init_from": str(self.base),
            "data": {"shards": str(self.shards)},
            "batch": {"context_tokens": 256, "global_batch_rows": 8, "micro_batch_rows": 8},
            "optimizer": {
                "learning_rate": setting.rate,
                "schedule": "linear",
                "final_learning_rate_ratio": 0.0,
                "warmup_steps": steps // 10,
                "weight_decay": 0.0,
            },
            "finetune": {"lora": lora},
            "training": {"steps": steps, "precision": "fp32", "seed": setting.seed},
            "validation": {"every_steps": steps},
            "checkpoint": {"every_steps": steps},
            "zero": {"stage": 1},
            "hardware": {"device": "cpu", "processes": 1, "preflight": "off"},
            "logging": {"tensorboard": "off"},
        }
        path = self.out / "config.yaml"
        path.write_text(json.dumps(fields), encoding="utf-8")  # which YAML holds
        return load_config(path, self.overrides)


def _train(config: Config, answer: Connection) -> None:
    """A forked rank: trains, and answers with its CPU seconds and its bytes of memory."""
    from megaback.distributed.world import start_world
    from megaback.faults.stop_request import StopRequest
    from megaback.faults.watchdog import Watchdog
    from megaback.train import train_run

    os.environ |= rank_names(1)[0]
    world = start_world("cpu", 300)
    gc.collect()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    started_s = time.process_time()
    train_run(config, world, StopRequest(None), Watchdog(config.run, config.hardware, world))
    answer.send((time.process_time() - started_s, status_bytes("VmHWM") - before))
    answer.close()
    os._exit(0)  # without this process's own handlers of its end


def _forked(config: Config) -> tuple[float, int]:
    """CPU seconds and bytes of a run. Raises SystemExit if it fails."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_train, args=(config, sending))
    process.start()
    sending.close()
    try:
        found: tuple[float, int] = receiving.recv()
    except EOFError:
        raise SystemExit(f"the run {config.run} failed; see above") from None
    finally:
        process.join()
    return found


def _val_bits(run: Path) -> list[float]:
    """Val losses in bits per byte, at the start and at the end."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line).get("val_bits_per_byte") for line in lines]
    return [bits for bits in found if bits is not None]


def trained(inputs: Inputs, setting: Setting) -> float:
    """Val bits per byte at a run's end; it is trained unless it is finished."""
    run = inputs.out / setting.name
    if len(_val_bits(run)) < 2:
        _forked(inputs.config(setting, inputs.steps, run))
        click.echo(f"{setting.name}: {_val_bits(run)[-1]:.4f} bits/byte")
    return _val_bits(run)[-1]


def cost(inputs: Inputs, setting: Setting) -> dict[str, float]:
    """CPU seconds per step, peak bytes, and bytes of a checkpoint without its frozen weights."""
    path = inputs.out / f"cost-{setting.rank or 'full'}.json"
    if not path.exists():
        ends = []
        for steps in _MEASURED_STEPS:
            run = inputs.out / f"cost-{setting.rank or 'full'}-{steps}"
            ends.append(_forked(inputs.config(setting, steps, run)))
        last = complete_checkpoints(run)[-1]
        sizes = [one.stat().st_size for one in last.iterdir() if one.name != FROZEN_NAME]
        cpu_s = (ends[1][0] - ends[0][0]) / (_MEASURED_STEPS[1] - _MEASURED_STEPS[0])
        found = {"cpu_s": cpu_s, "peak_bytes": ends[0][1], "checkpoint_bytes": sum(sizes)}
        path.write_text(json.dumps(found), encoding="utf-8")
    result: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return result


def row(inputs: Inputs, rank: int, rates: list[float], seeds: int) -> Iterator[str]:
    """Cells of the table for full fine-tuning or a rank."""
    found = {rate: trained(inputs, Setting(rank, rate, 0)) for rate in rates}
    best = min(found, key=lambda rate: found[rate])
    chosen = [found[best], *(trained(inputs, Setting(rank, best, n)) for n in range(1, seeds))]
    costs = cost(inputs, Setting(rank, best, 0))
    config = inputs.config(Setting(rank, best, 0), inputs.steps, inputs.out)
    vocab_size = run_facts(config, None, None).vocab_size
    size = ModelSize.of(config.model, vocab_size, config.finetune.adapters)
    yield f"LoRA, rank {rank}" if rank else "all weights"
    yield f"{size.trained:,}"
    yield "; ".join(f"{rate:g}: {bits:.3f}" for rate, bits in found.items())
    spread = f" ± {stdev(chosen) / len(chosen) ** 0.5:.3f}" if len(chosen) > 1 else ""
    yield f"{mean(chosen):.3f}{spread}"
    yield f"{costs['peak_bytes'] / 1e6:.0f}"
    yield f"{costs['cpu_s']:.2f}"
    yield f"{costs['checkpoint_bytes'] / 1e6:.1f}"


def _numbers(_context: click.Context, _option: click.Parameter, text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


@click.command(
    cls=Benchmark,
    smoke="--base {backward} --shards {shards} --out {out} --steps 2 --ranks 2 --rates 1e-3"
    " --lora-rates 1e-3 --seeds 1",
)
@click.option("--base", required=True, type=click.Path(path_type=Path), help="Base to fine-tune.")
@click.option("--shards", required=True, type=click.Path(path_type=Path), help="Data set.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the runs.")
@click.option("--steps", type=COUNT.option, default=60, show_default=True, help="Steps of a run.")
@click.option("--ranks", callback=_numbers, default="4,16,64", show_default=True, help="Of LoRA.")
@click.option(
    "--rates",
    callback=_numbers,
    default="5e-4,1.5e-3,5e-3",
    show_default=True,
    help="Learning rates of full fine-tuning.",
)
@click.option(
    "--lora-rates",
    callback=_numbers,
    default="3e-3,1e-2,3e-2",
    show_default=True,
    help="Learning rates of LoRA.",
)
@click.option(
    "--seeds", type=COUNT.option, default=3, show_default=True, help="Runs at the best rate."
)
@click.argument("overrides", nargs=-1)
def main(
    base: Path,
    shards: Path,
    out: Path,
    steps: int,
    ranks: list[float],
    rates: list[float],
    lora_rates: list[float],
    seeds: int,
    overrides: tuple[str, ...],
) -> None:
    """Train what is missing, and print the table."""
    import torch

    import megaback.train  # noqa: F401 - before the forks, which share it
    from megaback.model.lora import require_peft

    require_peft()
    torch.set_num_threads(1)
    inputs = Inputs(base.absolute(), shards.absolute(), out.absolute(), steps, overrides)
    inputs.out.mkdir(parents=True, exist_ok=True)
    rows = [
        " | ".join(row(inputs, int(rank), lora_rates if rank else rates, seeds))
        for rank in (0, *ranks)
    ]
    start = _val_bits(inputs.out / Setting(0, rates[0], 0).name)[0]
    click.echo(f"\nval bits/byte of the base: {start:.3f}\n")
    click.echo(
        "| trained | weights | val bits/byte by learning rate, one seed | best rate, "
        f"{seeds} seeds | peak MB | CPU-s per step | checkpoint MB |"
    )
    click.echo("|---" * 7 + "|")
    for line in rows:
        click.echo(f"| {line} |")


if __name__ == "__main__":
    main()
