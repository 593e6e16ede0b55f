"""`make demo`: the whole path on this machine, from text to backward samples, in minutes.

Runs the commands that a person would type and shows them, then the samples, wrapped, and a table
of figures. Started again after an interruption, it resumes.
"""

import json
import shlex
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.control_characters import escaped
from data_pipeline.common.import_path import module_command
from data_pipeline.common.next_command import command, show_next
from data_pipeline.common.number_ranges import VOCABULARY
from data_pipeline.common.source_type import SOURCE
from data_pipeline.common.terminal import table_lines, terminal_width
from data_pipeline.errors import LaunchError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.inspection import unigram_entropy
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from megaback.run_folder import METRICS_NAME, MODEL_CONFIG_NAME

_CONFIG = Path("configs/demo.yaml")
_VOCAB_SIZE = 2048
_SAMPLE_TOKENS = 100
_TEMPERATURE = "0.8"
_MIN_P = "0.1"  # the tail of a model this small is mostly misspelled words
_ENDINGS = (  # a space first: the text before them ends with a word
    " said Mr. Darcy, with a smile.",
    " said she, and burst into tears.",
    " cried Ahab, and the boat was gone.",
)
_MAX_COLUMNS = 80


def run(*words: str, shows_output: bool = True) -> str:
    """Run a megaback command as a person would; returns its standard output.

    The commands that it suggests next are not shown.
    """
    click.echo(f"\n$ megaback {shlex.join(words)}")
    process = subprocess.Popen(
        module_command("megaback", *words), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        shows_output = shows_output and not line.startswith("next: megaback ")
        if shows_output:
            click.echo(line, nl=False)
        lines.append(line)
    code = process.wait()
    if code:
        raise LaunchError(f"`megaback {shlex.join(words)}` ended with code {code}; see above")
    return "".join(lines)


def show_sample(model: Path, ending: str, seed: int) -> None:
    """Write before an ending and print the text wrapped, from its first whole word."""
    text = run(
        *("sample", str(model), "--ending", ending, "--max-new-tokens", str(_SAMPLE_TOKENS)),
        *("--temperature", _TEMPERATURE, "--min-p", _MIN_P, "--seed", str(seed)),
        shows_output=False,
    )
    whole_words = text.partition(" ")[2] or text
    for paragraph in f"…{escaped(whole_words).strip()}".split("\n"):
        click.echo(
            textwrap.fill(paragraph, _columns(), initial_indent="  ", subsequent_indent="  ")
        )


def show_figures(folder: Path, minutes: float) -> None:
    """Print the figures of a demo's run as a table."""
    lines = [json.loads(line) for line in (folder / "run" / METRICS_NAME).open(encoding="utf-8")]
    val: list[dict[str, Any]] = [line for line in lines if "val_loss" in line]
    steps: list[dict[str, Any]] = [line for line in lines if "loss" in line]
    entropy = unigram_entropy(DataSet.open(folder / "shards"), "val")
    tokens = steps[-1]["tokens_seen"]
    seconds = sum(line["step_s"] for line in steps)
    rows = [("unigram entropy of the val set", f"{entropy:.3f} nats/token")]
    for name, line in (("start", val[0]), ("end", val[-1])):
        figures = f"{line['val_loss']:.3f} nats/token, {line['val_bits_per_byte']:.3f} bits/byte"
        rows.append((f"val loss at the {name}", figures))
    rows += [
        ("trained on", f"{tokens:,} tokens in {seconds:.0f} s of steps"),
        ("speed", f"{tokens / seconds:,.0f} tokens/s"),
        ("the whole demo", f"{minutes:.1f} minutes"),
    ]
    click.echo("\n".join(table_lines(("A GPT that writes backwards", ""), rows)))


def _columns() -> int:
    return min(terminal_width() or _MAX_COLUMNS, _MAX_COLUMNS)


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
    default="novels",
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
    """From text to shards to training to backward samples.

    OVERRIDES, as training.steps=100, change keys of configs/demo.yaml.
    """
    started = time.monotonic()
    tokenizer = out / "tokenizer" / TOKENIZER_NAME
    model = out / "model"
    if not tokenizer.exists():
        run(
            *("tokenizer", "train", "--source", source, "--out", str(tokenizer.parent)),
            *("--vocab-size", str(vocab_size)),
        )
    run(
        *("shards", "build", "--source", source, "--tokenizer", str(tokenizer)),
        *("--out", str(out / "shards"), "--val-fraction", "0.03"),
    )
    run("shards", "verify", str(out / "shards"))
    run("train", str(_CONFIG), f"run={out / 'run'}", f"data.shards={out / 'shards'}", *overrides)
    if not (model / MODEL_CONFIG_NAME).exists():
        run("convert", str(out / "run"), "--to", "full", "--out", str(model))
    for seed, ending in enumerate(_ENDINGS):
        show_sample(model, ending, seed)
    click.echo()
    show_figures(out, (time.monotonic() - started) / 60)
    click.echo()
    show_next({command("sample", model, "--ending", "the end."): "or another ending"})


if __name__ == "__main__":
    main()
