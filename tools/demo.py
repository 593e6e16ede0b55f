"""`make demo`: the whole path on this machine, from text to a backward sample, in minutes.

Runs the commands that a person would type, shows them, and ends with a table of what came out.
Started again after an interruption, it goes on where it stopped.
"""

import json
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.import_path import module_command
from data_pipeline.common.number_ranges import VOCABULARY
from data_pipeline.common.rich_console import SafeConsole
from data_pipeline.common.source_type import SOURCE
from data_pipeline.errors import LaunchError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.inspection import unigram_entropy
from data_pipeline.shards.manifest import TOKENIZER_NAME
from megaback.run_folder import METRICS_NAME, MODEL_CONFIG_NAME

_CONFIG = Path("configs/demo.yaml")
_VOCAB_SIZE = 2048
_SAMPLE_TOKENS = 60
_TEMPERATURE = "0.5"  # of a model this small, the surest words are the most readable
_ENDINGS = (
    "and returns the number of bytes written.",
    "otherwise an exception is raised.",
    "is not supported on this platform.",
)


def run(*words: str) -> str:
    """Run a megaback command as a person would, its output shown; returns what it printed."""
    click.echo(f"\n$ megaback {shlex.join(words)}")
    process = subprocess.Popen(
        module_command("megaback", *words), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        click.echo(line, nl=False)
        lines.append(line)
    code = process.wait()
    if code:
        raise LaunchError(f"`megaback {shlex.join(words)}` ended with code {code}; see above")
    return "".join(lines)


def summarize(folder: Path, samples: dict[str, str], minutes: float) -> None:
    """Print the table."""
    lines = [json.loads(line) for line in (folder / "run" / METRICS_NAME).open(encoding="utf-8")]
    val: list[dict[str, Any]] = [line for line in lines if "val_loss" in line]
    steps: list[dict[str, Any]] = [line for line in lines if "loss" in line]
    entropy = unigram_entropy(DataSet.open(folder / "shards"), "val")
    tokens = steps[-1]["tokens_seen"]
    seconds = sum(line["step_s"] for line in steps)
    table = Table(title="A GPT that writes backwards", show_header=False, title_justify="left")
    table.add_row("unigram entropy of the val set", f"{entropy:.3f} nats/token")
    for name, line in (("start", val[0]), ("end", val[-1])):
        table.add_row(
            f"val loss at the {name}",
            f"{line['val_loss']:.3f} nats/token, {line['val_bits_per_byte']:.3f} bits/byte",
        )
    table.add_row("below the unigram entropy", f"{entropy - val[-1]['val_loss']:.3f} nats/token")
    table.add_row("trained on", f"{tokens:,} tokens in {seconds:.0f} s of steps")
    table.add_row("speed", f"{tokens / seconds:,.0f} tokens/s")
    table.add_row("the whole demo", f"{minutes:.1f} minutes")
    for ending, text in samples.items():
        table.add_section()
        table.add_row(f"what came before\n“{ending}”", text.strip())
    SafeConsole(soft_wrap=False, width=100).print(table, highlight=False)


@click.command(
    cls=ResumableCommand,
    name="demo",
    epilog=examples(
        "python -m tools.demo",
        "python -m tools.demo --source 'books/*.txt' --out demo-books training.steps=100",
    ),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Folder of everything that the demo writes.",
)
@click.option(
    "--source",
    type=SOURCE,
    default="pydocs",
    show_default=True,
    help="Source to train on, as of `megaback shards build`.",
)
@click.option(
    "--vocab-size",
    type=VOCABULARY.option,
    default=_VOCAB_SIZE,
    show_default=True,
    help="Number of tokens of the vocabulary.",
)
@click.argument("overrides", nargs=-1)
def main(out: Path, source: str, vocab_size: int, overrides: tuple[str, ...]) -> None:
    """From text to shards to training to a backward sample.

    OVERRIDES, as training.steps=100, change keys of configs/demo.yaml.
    """
    started = time.monotonic()
    tokenizer = out / "tokenizer" / TOKENIZER_NAME
    if not tokenizer.exists():
        run(
            *("tokenizer", "train", "--source", source, "--out", str(tokenizer.parent)),
            *("--vocab-size", str(vocab_size)),
        )
    run(
        *("shards", "build", "--source", source, "--tokenizer", str(tokenizer)),
        *("--out", str(out / "shards"), "--val-fraction", "0.02"),
    )
    run("shards", "verify", str(out / "shards"))
    run("train", str(_CONFIG), f"run={out / 'run'}", f"data.shards={out / 'shards'}", *overrides)
    if not (out / "model" / MODEL_CONFIG_NAME).exists():
        run("convert", str(out / "run"), "--to", "full", "--out", str(out / "model"))
    samples = {
        ending: run(
            *("sample", str(out / "model"), "--ending", ending),
            *(
                "--max-new-tokens",
                str(_SAMPLE_TOKENS),
                "--seed",
                str(seed),
                "--temperature",
                _TEMPERATURE,
            ),
        )
        for seed, ending in enumerate(_ENDINGS)
    }
    click.echo()
    summarize(out, samples, (time.monotonic() - started) / 60)


if __name__ == "__main__":
    main()
