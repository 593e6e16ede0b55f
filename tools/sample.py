"""`megaback sample`: write what comes before an ending (or, with a forward model, after a text)."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_pipeline.command import Command
from data_pipeline.errors import BackendError, DirectionMismatchError, PromptError
from data_pipeline.text import Direction

if TYPE_CHECKING:
    import torch

    from megaback.generate import SamplingOptions

_PROMPT_OPTION = {Direction.BACKWARD: "--ending", Direction.FORWARD: "--beginning"}


def require_direction(folder: Path, actual: Direction, given: Direction) -> None:
    """Raises DirectionMismatchError when a prompt is for a model of the other direction."""
    if actual is not given:
        raise DirectionMismatchError(
            f"{_PROMPT_OPTION[given]} needs a model that writes {given.value}, and {folder} writes "
            f"{actual.value}; use {_PROMPT_OPTION[actual]}, or another model"
        )


def apply_command(options: "SamplingOptions", line: str) -> "SamplingOptions | None":
    """Options changed by `temp=X`, `top_k=X` or `tokens=X`; None when the line is no command.

    Raises PromptError when the value is not a number that makes sense.
    """
    name, separator, text = (part.strip() for part in line.partition("="))
    if not separator or name not in ("temp", "top_k", "tokens"):
        return None
    try:
        if name == "temp" and float(text) >= 0:
            return replace(options, temperature=float(text))
        if name == "top_k" and int(text) >= 0:
            return replace(options, top_k=int(text))
        if name == "tokens" and int(text) >= 1:
            return replace(options, max_new_tokens=int(text))
    except ValueError:
        pass
    raise PromptError(f"{line.strip()!r} is not a value for {name}; write for example temp=0.8")


def choose_device(name: str | None) -> "torch.device":
    """A device by name, or the first GPU, or the CPU. Raises BackendError when it is not there."""
    import torch

    has_cuda = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if has_cuda else "cpu"))
    except RuntimeError:
        raise BackendError(f"--device {name} is no device; use cpu, cuda or cuda:N") from None
    if device.type != "cpu" and not (
        device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    ):
        raise BackendError(
            f"--device {name} is not there: torch sees {torch.cuda.device_count()} CUDA devices; "
            "use cpu, or a CUDA build of torch on a machine with GPUs"
        )
    return device


@click.command(cls=Command, name="sample")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--ending", help="Text that a backward model writes towards.")
@click.option("--beginning", help="Text that a forward model goes on from.")
@click.option("--tokens", type=click.IntRange(min=1), default=500, show_default=True)
@click.option("--temp", type=click.FloatRange(min=0), default=0.8, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=200, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--device", default=None, help="cpu, cuda, cuda:1, ...; default: cuda if there is one."
)
def main(
    folder: Path,
    ending: str | None,
    beginning: str | None,
    tokens: int,
    temp: float,
    top_k: int,
    seed: int,
    device: str | None,
) -> None:
    """Generate with the model in DIR on one device.

    Without a text, an interactive prompt: type one, or temp=X, top_k=X, tokens=X; an empty line or
    end of input leaves.
    """
    from megaback.generate import SamplingOptions, complete
    from megaback.model_folder import load_model_folder, read_description

    direction = read_description(folder).text_format.direction
    if ending is not None and beginning is not None:
        raise PromptError("give either --ending or --beginning, not both")
    if ending is not None:
        require_direction(folder, direction, Direction.BACKWARD)
    if beginning is not None:
        require_direction(folder, direction, Direction.FORWARD)
    model, description, codec = load_model_folder(folder, choose_device(device))
    options = SamplingOptions(tokens, temp, top_k, seed)
    given = ending if ending is not None else beginning
    if given is not None:
        click.echo(complete(model, codec, given, description.context_tokens, options))
        return
    label = "Ending" if direction is Direction.BACKWARD else "Beginning"
    click.echo(f"{label}s of a text, or temp=X, top_k=X, tokens=X; an empty line leaves.")
    while True:
        try:
            line = input(f"{label}: ")
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        if not line.strip():
            return
        try:
            changed = apply_command(options, line)
            if changed is not None:
                options = changed
                continue
            click.echo(complete(model, codec, line, description.context_tokens, options))
        except PromptError as error:
            click.echo(f"megaback: {error}", err=True)
        options = replace(options, seed=options.seed + 1)


if __name__ == "__main__":
    main()
