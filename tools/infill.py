"""`megaback infill`: generates the text between a beginning and an ending.

For one text, or for JSON lines.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.common.command import Command, examples
from data_pipeline.common.number_ranges import COUNT, FEW, SEED, TEMPERATURE, TOP_K
from data_pipeline.errors import PromptError
from tools.jsonl_io import (
    Answer,
    answer_each,
    json_lines_option,
    parse_object,
    print_all,
    stdin_lines,
)
from tools.model_options import (
    cuda_graphs_option,
    device_option,
    dtype_option,
    max_new_tokens_option,
    num_samples_option,
    seed_option,
    temperature_option,
    top_k_option,
)

if TYPE_CHECKING:
    from megaback.inference.infill.infiller import Infill, Infiller, InfillOptions

_BETWEEN_INFILLS = "\n\n---\n\n"
_DECIMALS = 4


class Request(BaseModel):
    """One line of JSON; missing keys have the values of the command line."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    beginning: str
    ending: str
    tokens: Annotated[int, COUNT] | None = None
    min_tokens: Annotated[int, COUNT] | None = None
    candidates: Annotated[int, FEW] | None = None
    n: Annotated[int, FEW] | None = None
    temperature: Annotated[float, TEMPERATURE] | None = None
    top_k: Annotated[int, TOP_K] | None = None
    seed: Annotated[int, SEED] | None = None

    def changed(self, options: "InfillOptions") -> "InfillOptions":
        """The options with this request's values. Raises ConfigError for an invalid one."""
        sampling = _given(temperature=self.temperature, top_k=self.top_k, seed=self.seed)
        return replace(
            options,
            **_given(
                max_new_tokens=self.tokens,
                min_new_tokens=self.min_tokens,
                forward_candidates=self.candidates,
                backward_candidates=self.candidates,
            ),
            sampling=replace(options.sampling, **sampling),
        )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def answer(infiller: "Infiller", line: str, options: "InfillOptions", count: int) -> Answer:
    """The result for a line of JSON, independent of other lines.

    Raises PromptError or ConfigError.
    """
    fields = parse_object(line, "an object with 'beginning' and 'ending'")
    try:
        request = Request.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise PromptError(
            f"{name!r}: {first['msg']}; valid keys are {', '.join(Request.model_fields)}"
        ) from None
    options, count = request.changed(options), request.n or count
    found = infill(infiller, request.beginning, request.ending, options, count)
    return {
        "beginning": request.beginning,
        "middle": found[0].middle,
        "ending": request.ending,
        "infills": [_rounded(one) for one in found],
        "seed": options.sampling.seed,
    }


def _rounded(one: "Infill") -> dict[str, Any]:
    """Fields, rounded to digits that do not depend on the batch."""
    return {
        name: round(value, _DECIMALS) if isinstance(value, float) else value
        for name, value in asdict(one).items()
    }


def infill(
    infiller: "Infiller", beginning: str, ending: str, options: "InfillOptions", count: int
) -> "list[Infill]":
    """Up to `count` middles, best first. Raises PromptError if there is none."""
    options = replace(options, rescored=max(options.rescored, count))
    found = infiller.fill(beginning, ending, options)
    if not found:
        raise PromptError(
            f"no candidate is a middle of {options.min_new_tokens} to {options.max_new_tokens} "
            "tokens; allow other lengths, or more candidates"
        )
    return found[:count]


@click.command(
    cls=Command,
    name="infill",
    epilog=examples(
        "megaback infill --forward models/forward --backward models/backward --beginning "
        '"The captain opened" --ending "and never spoke of it again."',
        'megaback infill --backward models/both --beginning "The captain opened" --ending '
        '"and never spoke of it again."',
        "megaback infill --forward models/forward --backward models/backward --json -n 3 "
        "< gaps.jsonl > filled.jsonl",
    ),
)
@click.option(
    "--forward",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder of the forward model, which continues the beginning. Default: that of --backward, "
    "if it has both directions.",
)
@click.option(
    "--backward",
    metavar="DIR",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder of the backward model, which generates toward the ending.",
)
@click.option("--beginning", help="Text before the middle.")
@click.option("--ending", help="Text after the middle.")
@json_lines_option
@num_samples_option(1, "Number of middles to show, best first.")
@max_new_tokens_option(32, "middle")
@click.option(
    "--min-new-tokens",
    type=COUNT.option,
    default=1,
    show_default=True,
    help="Minimum number of new tokens per middle.",
)
@click.option(
    "--candidates",
    type=FEW.option,
    default=16,
    show_default=True,
    help="Number of candidates that each model generates.",
)
@temperature_option
@top_k_option
@seed_option
@device_option
@dtype_option
@cuda_graphs_option
def main(
    forward: Path | None,
    backward: Path,
    beginning: str | None,
    ending: str | None,
    is_json: bool,
    num_samples: int,
    max_new_tokens: int,
    min_new_tokens: int,
    candidates: int,
    temperature: float,
    top_k: int,
    seed: int,
    device: str | None,
    dtype: str,
    cuda_graphs: bool,
) -> None:
    """Generate the text between a beginning and an ending.

    A forward and a backward model with one tokenizer, or one model of both directions, generate
    candidates, which are joined where both find the whole text most likely. With --json, each line
    of stdin is an object such as {"beginning": "Once", "ending": "the end.", "n": 2}, and is
    answered by one line.
    """
    from megaback.inference.infill.infiller import InfillOptions, load_infiller
    from megaback.inference.sampling import SamplingOptions

    if is_json and (beginning is not None or ending is not None):
        raise click.UsageError("Give either --json, or --beginning and --ending.")
    if not is_json and (beginning is None or ending is None):
        raise click.UsageError("Give --beginning and --ending, or --json.")
    options = InfillOptions(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        forward_candidates=candidates,
        backward_candidates=candidates,
        sampling=SamplingOptions(temperature=temperature, top_k=top_k, seed=seed),
    )
    infiller = load_infiller(
        forward or backward, backward, device=device, dtype=dtype, cuda_graphs=cuda_graphs
    )
    if beginning is None or ending is None:
        print_all(
            answer_each(stdin_lines(), lambda line: answer(infiller, line, options, num_samples))
        )
        return
    found = infill(infiller, beginning, ending, options, num_samples)
    texts = [beginning + one.middle + ending for one in found]
    if num_samples > 1:
        texts = [
            f"({one.score:.3f} nats/token)\n{text}" for one, text in zip(found, texts, strict=True)
        ]
    click.echo(_BETWEEN_INFILLS.join(texts))


if __name__ == "__main__":
    main()
