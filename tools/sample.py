"""`megaback sample`: generates text before an ending, or after a beginning (forward model)."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.number_ranges import MANY, REPETITION_PENALTY
from data_pipeline.errors import ConfigError, DirectionMismatchError, PromptError
from data_pipeline.text.codec import Direction
from tools.model_options import (
    cuda_graphs_option,
    device_option,
    direction_option,
    dtype_option,
    max_new_tokens_option,
    min_p_option,
    num_samples_option,
    seed_option,
    temperature_option,
    top_k_option,
    top_p_option,
)

if TYPE_CHECKING:
    from megaback.inference.sampling import SamplingOptions
    from megaback.inference.text_writer import Writer

_BETWEEN_SAMPLES = "\n\n---\n\n"
_FRAME_INTERVAL_S = 0.05
_PROMPT_OPTION = {Direction.BACKWARD: "--ending", Direction.FORWARD: "--beginning"}


def require_direction(folder: Path, actual: Direction, given: Direction) -> None:
    """Raises DirectionMismatchError if a prompt is for a model of the other direction."""
    if actual is not given:
        raise DirectionMismatchError(
            f"{_PROMPT_OPTION[given]} needs a model that writes {given.value}, and {folder} writes "
            f"{actual.value}; use {_PROMPT_OPTION[actual]}, or another model"
        )


def apply_command(options: "SamplingOptions", line: str) -> "SamplingOptions | None":
    """Options changed by `temp=X`, `top_k=X` or `tokens=X`; None if the line is not a command.

    Raises PromptError for an invalid value.
    """
    name, separator, text = (part.strip() for part in line.partition("="))
    if not separator or name not in ("temp", "top_k", "tokens"):
        return None
    try:
        if name == "temp":
            return replace(options, temperature=float(text))
        if name == "top_k":
            return replace(options, top_k=int(text))
        return replace(options, max_new_tokens=int(text))
    except (ValueError, ConfigError):
        raise PromptError(
            f"{line.strip()[:80]!r} is not a value for {name}; write for example temp=0.8"
        ) from None


def write_samples(
    writer: "Writer", given: str, num_samples: int, options: "SamplingOptions"
) -> None:
    """Print samples for one text; on a terminal, while they are generated."""
    stream = writer.stream([given] * num_samples, options)
    texts = [given] * num_samples
    if sys.stdout.isatty():
        from rich.text import Text

        from data_pipeline.common.rich_console import SafeConsole, SafeLive

        # A backward sample changes at its beginning, so every frame redraws all text.
        with SafeLive(
            console=SafeConsole(),
            transient=True,
            auto_refresh=False,
            vertical_overflow="ellipsis",
        ) as live:
            last_shown_s = 0.0
            for texts in stream:
                if time.monotonic() - last_shown_s > _FRAME_INTERVAL_S:
                    live.update(Text(_joined(texts)), refresh=True)
                    last_shown_s = time.monotonic()
    else:
        texts = writer.complete_many([given] * num_samples, options)
    click.echo(_joined(texts))


def _joined(texts: Sequence[str]) -> str:
    return _BETWEEN_SAMPLES.join(texts)


@click.command(
    cls=Command,
    name="sample",
    epilog=examples(
        "megaback sample runs/xcoax_100bt",
        'megaback sample models/xcoax --ending "and they lived happily ever after."',
        'megaback sample models/xcoax --ending "the end." -n 4 --max-new-tokens 200 '
        "--temperature 0.7 --top-p 0.95",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--ending", help="Ending of the text; a backward model generates what precedes it.")
@click.option("--beginning", help="Beginning of the text; a forward model continues it.")
@direction_option
@num_samples_option(
    1, "Number of samples, generated as one batch, with seeds SEED, SEED + 1, ...", MANY
)
@max_new_tokens_option(500, "sample")
@temperature_option
@top_k_option
@top_p_option
@min_p_option
@click.option(
    "--repetition-penalty",
    type=REPETITION_PENALTY.option,
    default=1.0,
    show_default=True,
    help="Penalty on tokens of the prompt and the sample; above 1, they become less likely.",
)
@seed_option
@device_option
@dtype_option
@cuda_graphs_option
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the model with torch.compile; the first sample is slow.",
)
def main(
    folder: Path,
    ending: str | None,
    beginning: str | None,
    direction: Direction | None,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int,
    device: str | None,
    dtype: str,
    cuda_graphs: bool,
    compiled: bool,
) -> None:
    """Generate text with the model in DIR: a converted model, a run or a checkpoint.

    A model of both directions takes either text. Without one, the command is interactive: type a
    text, or temp=X, top_k=X or tokens=X; an empty line or the end of input exits.
    """
    from megaback.inference.sampling import SamplingOptions
    from megaback.inference.text_writer import load
    from megaback.weights.converted import model_folder
    from megaback.weights.model_folder import read_description

    folder = model_folder(folder)
    if ending is not None and beginning is not None:
        raise PromptError("give either --ending or --beginning, not both")
    text_format = read_description(folder).text_format
    if ending is not None or beginning is not None:
        needed = Direction.BACKWARD if ending is not None else Direction.FORWARD
        if not text_format.both:
            require_direction(folder, text_format.direction, needed)
        if direction not in (None, needed):
            raise PromptError(
                f"{_PROMPT_OPTION[needed]} is continued {needed.value}; omit --direction"
            )
        direction = needed
    writer = load(
        folder,
        device=device,
        dtype=dtype,
        usual_rows=num_samples,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        direction=direction,
    )
    direction = writer.description.text_format.direction
    options = SamplingOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    given = ending if ending is not None else beginning
    if given is not None:
        write_samples(writer, given, num_samples, options)
        return
    label = "Ending" if direction is Direction.BACKWARD else "Beginning"
    click.echo(f"{label}s of a text, or temp=X, top_k=X, tokens=X; an empty line exits.")
    while True:
        try:
            line = input(f"{label}: ")
        except EOFError:
            click.echo()
            return
        if not line.strip():
            return
        try:
            changed = apply_command(options, line)
            if changed is not None:
                options = changed
                continue
            write_samples(writer, line, num_samples, options)
        except PromptError as error:
            click.echo(f"megaback: {error}", err=True)
        options = replace(options, seed=options.seed + num_samples)


if __name__ == "__main__":
    main()
