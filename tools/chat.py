"""`megaback chat`: generates the instruction that could have led to a response.

Interactive, for one response, or for JSON lines. A model that writes forward responds to
instructions.
"""

import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.number_ranges import FEW, SEED, Range
from data_pipeline.common.output_paths import require_apart
from data_pipeline.errors import (
    DirectionMismatchError,
    OutputExistsError,
    PromptError,
    StorageError,
)
from data_pipeline.text.codec import Direction
from tools.jsonl_io import answer_each, json_lines_option, parse_object, print_all, stdin_lines
from tools.model_options import (
    cuda_graphs_option,
    device_option,
    direction_option,
    dtype_option,
    max_new_tokens_option,
    num_samples_option,
    seed_option,
    temperature_option,
    top_k_option,
)
from tools.sample import apply_command

if TYPE_CHECKING:
    from megaback.inference.chat import Candidate, Chat
    from megaback.inference.sampling import SamplingOptions

# The options that give a text, and the direction of their model.
_DIRECTION_OF = {
    "response": Direction.BACKWARD,
    "ending": Direction.BACKWARD,
    "instruction": Direction.FORWARD,
    "beginning": Direction.FORWARD,
}


def answer_lines(
    chat: "Chat", lines: Iterable[str | None], options: "SamplingOptions", count: int
) -> Iterator[dict[str, Any]]:
    """An object per line of JSON that is not blank, with `error` for an invalid one.

    A line is an object with `response` (or `ending`, for plain generation), and may have `n`,
    `temp`, `top_k`, `tokens` and `seed`. The default seed differs between lines.
    """
    seeds = itertools.count(options.seed, count)
    return answer_each(
        lines, lambda line: _answer_line(chat, line, replace(options, seed=next(seeds)), count)
    )


def _answer_line(chat: "Chat", line: str, options: "SamplingOptions", count: int) -> dict[str, Any]:
    keys = (chat.given_name, chat.prompt_name)
    wanted = f"an object with either {keys[0]!r} or {keys[1]!r}"
    request = parse_object(line, wanted)
    if sum(key in request for key in keys) != 1:
        raise PromptError(f"give {wanted}")
    (key,) = (key for key in keys if key in request)
    given = request.pop(key)
    if not isinstance(given, str):
        raise PromptError(f"{key!r} is of type {type(given).__name__}, not text")
    count = _whole_number(request.pop("n", count), "n", FEW)
    seed = _whole_number(request.pop("seed", options.seed), "seed", SEED)
    options = replace(options, seed=seed)
    for name, value in request.items():
        changed = apply_command(options, f"{name}={value}")
        if changed is None:
            raise PromptError(f"unknown key {name!r}; use n, temp, top_k, tokens and seed")
        options = changed
    if key == chat.prompt_name:
        return {key: given, "text": chat.complete(given, options), "seed": seed}
    found = chat.answer(given, options, count)
    return {
        key: given,
        chat.written_name: found[0].text,
        "candidates": [
            {chat.written_name: one.text, **{k: v for k, v in asdict(one).items() if k != "text"}}
            for one in found
        ],
        "seed": seed,
    }


def _whole_number(value: object, name: str, allowed: Range) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and not allowed.problem(value):
        return value
    shown = str(value)[:40]
    raise PromptError(
        f"{name!r} is {shown!r}; it must be a whole number from {allowed.min} to {allowed.max}"
    )


_HISTORY_STARTS = ('{"response": "', '{"instruction": "')


class History:
    """Exchanges of the session, and those restored from and appended to a file of JSON lines."""

    def __init__(self, path: Path | None) -> None:
        """Raises StorageError if the file is unreadable, OutputExistsError if it is no history."""
        self._path = path
        self.exchanges: list[dict[str, str]] = []
        if path is None or not path.exists():
            return
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StorageError(f"cannot read the history {path}: {error}") from None
        for line in text.splitlines():
            with suppress(ValueError, RecursionError):  # a line truncated by a kill
                self.exchanges.append(json.loads(line))
        are_ours = all(
            isinstance(exchange, dict) and exchange.keys() == {"response", "instruction"}
            for exchange in self.exchanges
        )
        if text and not (are_ours and text.startswith(_HISTORY_STARTS)):
            raise OutputExistsError(
                f"--history {path} holds something that this command did not write; choose another "
                "--history"
            )

    def add(self, exchange: dict[str, str]) -> None:
        """Raises OSError."""
        self.exchanges.append(exchange)
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(exchange) + "\n")

    def show(self) -> None:
        for number, exchange in enumerate(self.exchanges, start=1):
            for name, text in exchange.items():
                click.echo(f"{number:>3} {name}: {text}")


def _show(chat: "Chat", found: "list[Candidate]") -> None:
    """Print the candidates, with log-probabilities if there are several."""
    label = chat.written_name.capitalize()
    for one in found:
        cut = "" if one.is_complete else f" … (not ended after {one.tokens} tokens)"
        likelihood = f" ({one.log_probability:.1f} nats)" if len(found) > 1 else ""
        click.echo(f"{label}{likelihood}: {one.text}{cut}")


def _talk(chat: "Chat", options: "SamplingOptions", count: int, history: History) -> None:
    label = chat.given_name.capitalize()
    with suppress(ImportError):
        import readline  # editing and recall of lines

        for exchange in history.exchanges:
            readline.add_history(exchange.get(chat.given_name, ""))
    click.echo(
        f"{label}s, or temp=X, top_k=X, tokens=X, n=X, {chat.prompt_name}=TEXT, history; "
        "an empty line exits."
    )
    while True:
        try:
            line = input(f"{label}: ").strip()
        except EOFError:
            click.echo()
            return
        if not line:
            return
        name, _, value = (part.strip() for part in line.partition("="))
        try:
            if line == "history":
                history.show()
                continue
            if name == "n" and value:
                number = int(value) if value.isdecimal() else value
                count = _whole_number(number, "n", FEW)
                continue
            if name == chat.prompt_name and value:
                click.echo(chat.complete(value, options))
            elif (changed := apply_command(options, line)) is not None:
                options = changed
                continue
            else:
                found = chat.answer(line, options, count)
                _show(chat, found)
                history.add({chat.given_name: line, chat.written_name: found[0].text})
        except PromptError as error:
            click.echo(f"megaback: {error}", err=True)
        options = replace(options, seed=options.seed + count)


def _require_direction(folder: Path, actual: Direction, name: str) -> None:
    needed = _DIRECTION_OF[name]
    if actual is not needed:
        others = [f"--{other}" for other, of_other in _DIRECTION_OF.items() if of_other is actual]
        raise DirectionMismatchError(
            f"--{name} needs a model that writes {needed.value}, and {folder} writes "
            f"{actual.value}; use {' or '.join(others)}, or another model"
        )


@click.command(
    cls=Command,
    name="chat",
    epilog=examples(
        "megaback chat runs/backchat",
        'megaback chat models/backchat -n 4 --response "Telegram was founded by the '
        'Durov brothers."',
        "megaback chat models/backchat --json < given.jsonl > found.jsonl",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--response", "given", help="Response to generate an instruction for; prints it and exits."
)
@click.option(
    "--instruction",
    help="Instruction to respond to with a forward model; prints the response and exits.",
)
@click.option(
    "--ending", help="Ending of a plain text; a backward model generates what precedes it."
)
@click.option("--beginning", help="Beginning of a plain text; a forward model continues it.")
@direction_option
@json_lines_option
@num_samples_option(1, "Number of samples per text; distinct ones are shown, best first.")
@click.option(
    "--history",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to append exchanges to, and to restore them from.",
)
@max_new_tokens_option(500, "sample")
@temperature_option
@top_k_option
@seed_option
@device_option
@dtype_option
@cuda_graphs_option
def main(
    folder: Path,
    given: str | None,
    instruction: str | None,
    ending: str | None,
    beginning: str | None,
    direction: Direction | None,
    is_json: bool,
    num_samples: int,
    history: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: str | None,
    dtype: str,
    cuda_graphs: bool,
) -> None:
    """Generate the instruction that could have led to a response, with the model in DIR.

    DIR is a converted model, a run or a checkpoint. Without a text, the command is interactive.
    With --json, each line of stdin is an object such as {"response": "Telegram", "n": 4}, and is
    answered by one line.
    """
    from megaback.inference.chat import load_chat
    from megaback.inference.sampling import SamplingOptions
    from megaback.weights.converted import model_folder
    from megaback.weights.model_folder import read_description

    values = (given, ending, instruction, beginning)
    texts = {
        name: text for name, text in zip(_DIRECTION_OF, values, strict=True) if text is not None
    }
    if len(texts) + is_json > 1:
        raise click.UsageError(
            "Give one of --response, --instruction, --ending, --beginning and --json."
        )
    if history is not None:
        require_apart(history, [folder], "--history")
    kept = History(history)
    folder = model_folder(folder)
    text_format = read_description(folder).text_format
    for name in texts:
        if text_format.both:
            if direction not in (None, _DIRECTION_OF[name]):
                raise PromptError(
                    f"--{name} is continued {_DIRECTION_OF[name].value}; omit --direction"
                )
            direction = _DIRECTION_OF[name]
        else:
            _require_direction(folder, text_format.direction, name)
    chat = load_chat(
        folder, device=device, dtype=dtype, cuda_graphs=cuda_graphs, direction=direction
    )
    options = SamplingOptions(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    if is_json:
        print_all(answer_lines(chat, stdin_lines(), options, num_samples))
    elif not texts:
        _talk(chat, options, num_samples, kept)
    elif chat.prompt_name in texts:
        click.echo(chat.complete(texts[chat.prompt_name], options))
    else:
        text = texts[chat.given_name]
        found = chat.answer(text, options, num_samples)
        _show(chat, found)
        kept.add({chat.given_name: text, chat.written_name: found[0].text})


if __name__ == "__main__":
    main()
