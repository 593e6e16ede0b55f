"""BackChat recipe on two CPU cores: fine-tuning with and without pretraining.

    python benchmarks/backchat.py --prose "prose/train-*.parquet" \\
        --prose-val prose/val-00000.parquet --rows instruct-train.jsonl.gz \\
        --rows-val instruct-val.jsonl.gz --out runs/backchat_recipe

Two base models of 4.2 million parameters are pretrained on prose, one backward, one forward on the
same rows. The backward base and a randomly initialized model are then fine-tuned on instruction
rows for the same number of steps. All are evaluated by `megaback eval` on held-out data. Every
stage is a command that is printed; finished stages are not repeated, so the same command resumes
after an interruption. Printed at the end are the tables of docs/results.md, and the first ten
held-out rows with the model's instructions.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from smoke import Benchmark

from data_pipeline.common.number_ranges import COUNT
from megaback.config_file import load_config
from megaback.faults.exit_record import read_exit
from tools.demo import run

CONFIG = Path(__file__).with_name("backchat.yaml")
_EXAMPLES = 10
_RECALL = ("--suite", "instruction-recall", "--suite", "reverse-dictionary")


def build(
    out: Path, prose: str, rows: str, rows_val: str, vocab_size: int, context_tokens: int
) -> None:
    """A tokenizer, shards of prose, shards of instructions."""
    tokenizer = out / "tokenizer" / "tokenizer.model"
    if not tokenizer.exists():
        words = ("--source", prose, "--out", str(tokenizer.parent), "--vocab-size", str(vocab_size))
        run("tokenizer", "train", *words)
    given = ("--tokenizer", str(tokenizer))
    if not (out / "prose" / "manifest.json").exists():
        run("shards", "build", "--source", prose, *given, "--out", str(out / "prose"))
    if not (out / "instruct" / "manifest.json").exists():
        run(
            *("instruct", "build", "--source", rows, "--val-source", rows_val, *given),
            *("--context-tokens", str(context_tokens), "--out", str(out / "instruct")),
        )


def train(out: Path, config: Path, steps: int | None) -> None:
    """Two bases, and the two models that are fine-tuned; `steps` of each, or the config's."""
    length = () if steps is None else (f"training.steps={steps}",)
    prose, instruct = f"data.shards={out / 'prose'}", f"data.shards={out / 'instruct'}"
    for name, *words in (
        ("backward", prose),
        ("untaught", instruct),
        ("tuned", instruct, f"init_from={out / 'backward'}"),
        ("forward", prose, "data.direction=forward"),
    ):
        if (read_exit(out / name) or {}).get("code") != 0:
            run("train", str(config), f"run={out / name}", *length, *words)


def evaluate(out: Path, rows_val: str, prose_val: str) -> dict[str, dict[str, Any]]:
    """The suites of each model, as `megaback eval` writes them."""
    rows = ("--rows", rows_val)
    suites = {
        "tuned": (*_RECALL, *rows, "--suite", "bits-per-byte", "--shards", out / "instruct"),
        "untaught": (*_RECALL, *rows, "--suite", "bits-per-byte", "--shards", out / "instruct"),
        "backward": (
            *("--suite", "passage-choice", "--passages", prose_val),
            *("--forward", out / "forward"),
            *("--suite", "bits-per-byte", "--shards", out / "prose"),
        ),
        "forward": ("--suite", "bits-per-byte", "--shards", out / "prose"),
    }
    found = {}
    for name, words in suites.items():
        results = out / f"{name}.json"
        if not results.exists():
            written = ("--predictions", out / f"{name}.jsonl", "--out", results)
            run("eval", *map(str, (out / name, *words, *written)))
        found[name] = json.loads(results.read_text())["suites"]
    return found


def _cell(metric: dict[str, float]) -> str:
    return f"{metric['value']:.3f} ({metric['low']:.3f} to {metric['high']:.3f})"


def metrics_of(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def table(out: Path, found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Tables of the results as Markdown."""
    yield "| held-out instruction rows | with pretraining | without | chance |"
    yield "|---|---|---|---|"
    for suite in ("instruction-recall", "reverse-dictionary"):
        for metric, tuned in found["tuned"][suite]["metrics"].items():
            untaught = found["untaught"][suite]["metrics"][metric]
            yield (
                f"| {suite.replace('-', ' ')}: {metric} | {_cell(tuned)} | {_cell(untaught)} "
                f"| {tuned['chance']:.3f} |"
            )
    bits = [found[name]["bits-per-byte"]["metrics"]["bits/byte"] for name in ("tuned", "untaught")]
    yield (
        f"| val bits/byte of instructions | {_cell(bits[0])} | {_cell(bits[1])} "
        f"| {_at_start(out / 'untaught')} (random weights) |"
    )
    yield ""
    yield "| held-out prose | value | chance |"
    yield "|---|---|---|"
    for metric, value in found["backward"]["passage-choice"]["metrics"].items():
        yield f"| the preceding passage among 10: {metric} | {_cell(value)} | {value['chance']} |"
    for name in ("backward", "forward"):
        value = found[name]["bits-per-byte"]["metrics"]["bits/byte"]
        start = _at_start(out / name)
        yield f"| val bits/byte, {name} | {_cell(value)} | {start} (random weights) |"
    yield ""
    yield "| stage | steps | tokens read | seconds of steps |"
    yield "|---|---|---|---|"
    for name in ("backward", "forward", "tuned", "untaught"):
        steps = [line for line in metrics_of(out / name) if "step_s" in line]
        seconds = sum(line["step_s"] for line in steps)
        yield f"| {name} | {len(steps):,} | {steps[-1]['tokens_seen']:,} | {seconds:.0f} |"


def _at_start(run_folder: Path) -> str:
    first = next(line for line in metrics_of(run_folder) if "val_bits_per_byte" in line)
    assert first["step"] == 0
    return f"{first['val_bits_per_byte']:.3f}"


def examples(out: Path) -> Iterator[str]:
    """The first held-out rows and their samples, unselected, as Markdown."""
    yield "| response | instruction | written, with pretraining | written, without |"
    yield "|---|---|---|---|"
    lines = [(out / f"{name}.jsonl").read_text().splitlines() for name in ("tuned", "untaught")]
    for tuned, untaught in list(zip(*lines, strict=True))[:_EXAMPLES]:
        one, other = json.loads(tuned), json.loads(untaught)
        cells = (one["response"], one["instruction"], one["written"], other["written"])
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


@click.command(
    cls=Benchmark,
    smoke="--prose {text} --prose-val {text} --rows {rows} --rows-val {rows_val}"
    " --out {out} --config {config} --vocab-size 600 --steps 1",
)
@click.option("--prose", required=True, help="Source of documents to pretrain on.")
@click.option("--prose-val", required=True, help="Held-out documents for the passages suite.")
@click.option("--rows", required=True, help="Instruction rows to fine-tune on.")
@click.option("--rows-val", required=True, help="Held-out instruction rows.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--config", type=click.Path(path_type=Path), default=CONFIG, help="Config of the models."
)
@click.option("--steps", type=COUNT.option, help="Steps of each run; default: the config's 500.")
@click.option(
    "--vocab-size",
    type=COUNT.option,
    default=4096,
    show_default=True,
    help="Size of the tokenizer's vocabulary.",
)
def main(
    prose: str,
    prose_val: str,
    rows: str,
    rows_val: str,
    out: Path,
    config: Path,
    steps: int | None,
    vocab_size: int,
) -> None:
    """Build, train, measure, and print the tables."""
    context_tokens = load_config(config).batch.context_tokens
    build(out, prose, rows, rows_val, vocab_size, context_tokens)
    train(out, config, steps)
    found = evaluate(out, rows_val, prose_val)
    for line in (*table(out, found), "", *examples(out)):
        click.echo(line)


if __name__ == "__main__":
    main()
