"""`megaback backtranslate`: generates instructions for texts, as examples for fine-tuning.

Results are stored in chunks in a work folder beside the output; after a kill, the same command
resumes. Tasks share the texts; the one that completes the last writes the output, whose bytes
depend on the texts, the models and the options, not on kills or on the number of tasks.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.build.options import text_column_option
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.number_ranges import (
    COUNT,
    MANY,
    NUMBER,
)
from data_pipeline.common.output_paths import (
    overwrite_option,
)
from data_pipeline.common.shared_options import limit_option
from data_pipeline.common.source_type import SOURCE
from data_pipeline.redaction import place_of
from data_pipeline.sources.documents import Columns, Slice
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.sources.registry import list_source, read_slice
from data_pipeline.sources.skipped import skipped_lines
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction
from tools.backtranslation.example_selection import Choice, different_texts
from tools.backtranslation.proposals import BackTranslator, RoundTripScorer, Text
from tools.backtranslation.row_forms import FORMS, Form
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
from tools.resumable_output import (
    ResumableOutput,
    converted,
    identity,
    out_option,
    task_index_option,
    tasks_option,
)

if TYPE_CHECKING:
    import torch

_FORMAT = {"format": "megaback-backtranslation", "version": 3}
_PROGRESS_INTERVAL_S = 10.0


def _inputs(pieces: Iterable[Slice]) -> list[dict[str, Any]]:
    """The inputs for the plan, with URLs stripped of secrets and signatures, which may change."""
    return [{**asdict(piece), "path": place_of(piece.path)} for piece in pieces]


def _texts(
    pieces: tuple[Slice, ...], columns: Columns, limit: int | None, max_record_bytes: int
) -> Iterator[Text]:
    how: dict[str, Any] = {"max_record_bytes": max_record_bytes}
    documents = (document for piece in pieces for document in read_slice(piece, columns, **how))
    positions_and_texts = ((document.position, document.text) for document in documents)
    yield from islice(different_texts(positions_and_texts), limit)


def _load(
    folder: Path,
    forward: Path | None,
    device: "torch.device",
    dtype: "torch.dtype",
    cuda_graphs: bool,
    options: Any,
    count: int,
) -> BackTranslator:
    from megaback.inference.decoder import Decoder
    from megaback.weights.model_folder import load_model_folder

    model, description, codec = load_model_folder(folder, device, dtype, Direction.BACKWARD)
    round_trip = None
    if forward is not None:
        judging, of_judge, its_codec = load_model_folder(forward, device, dtype, Direction.FORWARD)
        round_trip = RoundTripScorer(judging, ChatFormat(its_codec), of_judge.context_tokens)
    decoder = Decoder(model, description.context_tokens, takes_over=False, cuda_graphs=cuda_graphs)
    return BackTranslator(
        model=model,
        decoder=decoder,
        form=ChatFormat(codec),
        round_trip=round_trip,
        options=options,
        count=count,
    )


def _do_task(
    output: ResumableOutput,
    task: int,
    texts: Iterator[Text],
    batch_size: int,
    translator: BackTranslator,
) -> None:
    """Generate the missing chunks of a task."""
    started = logged_s = time.monotonic()
    num_texts = 0
    every = iter(lambda: list(islice(texts, batch_size)), [])
    with output.chunks(task, every) as chunks:
        for chunk in chunks:
            output.append(task, translator.records(chunk))
            num_texts += len(chunk)
            if time.monotonic() - logged_s > _PROGRESS_INTERVAL_S:
                logged_s = time.monotonic()
                line = {"event": "backtranslate", "task": task, "texts": num_texts}
                rate = {"texts_per_s": round(num_texts / (logged_s - started), 2)}
                click.echo(json.dumps({**line, "up_to": chunk[-1].position, **rate}), err=True)


def _write(output: ResumableOutput, choice: Choice, overwrite: bool) -> None:
    counts: Counter[str] = Counter()
    rows = choice.examples(output.results, counts)
    output.write(rows, overwrite=overwrite, differs="with another --keep, --min-score or --form")
    texts, examples = counts.pop("texts", 0), counts.pop("examples", 0)
    click.echo(f"{output.out}: {examples:,} examples from {texts:,} texts")
    for why, count in sorted(counts.items()):
        click.echo(f"  excluded: {count:,} ({why})")


@click.command(
    cls=ResumableCommand,
    name="backtranslate",
    epilog=examples(
        "megaback backtranslate models/backchat --in texts.jsonl --out sft.jsonl",
        "megaback backtranslate models/backchat --in 'books/*.jsonl.zst' --out sft.jsonl "
        "-n 8 --keep 2 --forward models/answers",
        "megaback backtranslate models/backchat --in texts.jsonl --out sft.jsonl --form messages",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--in",
    "source",
    type=SOURCE,
    required=True,
    help="Source of texts: a path, pattern, URL or hf:NAME.",
)
@out_option
@overwrite_option
@text_column_option
@click.option(
    "--forward",
    type=click.Path(path_type=Path),
    help="Folder of a forward model, to score an instruction by how likely it makes its text. "
    "Default: score by the backward model.",
)
@num_samples_option(4, "Number of instructions to sample per text.")
@click.option(
    "--keep",
    type=COUNT.option,
    default=1,
    show_default=True,
    help="Maximum number of instructions to keep per text; those with the highest scores are kept.",
)
@click.option(
    "--min-score",
    type=NUMBER.option,
    help="Minimum score of an instruction, in nats per token; others are excluded. Default: none.",
)
@click.option(
    "--form",
    type=click.Choice(FORMS),
    default="alpaca",
    show_default=True,
    help="Columns of the rows: instruction, input and output; messages of a user and an assistant; "
    "or prompt and completion.",
)
@max_new_tokens_option(128, "instruction")
@temperature_option
@top_k_option
@seed_option
@limit_option("texts, the first ones")
@max_record_bytes_option
@click.option(
    "--batch-size",
    type=MANY.option,
    default=16,
    show_default=True,
    help="Number of texts per batch.",
)
@tasks_option("texts")
@task_index_option
@device_option
@dtype_option
@cuda_graphs_option
def main(
    folder: Path,
    source: str,
    out: Path,
    overwrite: bool,
    text_column: str,
    forward: Path | None,
    num_samples: int,
    keep: int,
    min_score: float | None,
    form: Form,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    limit: int | None,
    max_record_bytes: int,
    batch_size: int,
    tasks: int,
    task_index: int | None,
    device: str | None,
    dtype: str,
    cuda_graphs: bool,
) -> None:
    """Generate instructions for texts with the fine-tuned backward model in DIR.

    Run the same command again to resume. --keep, --min-score and --form may be changed afterwards.
    """
    from megaback.weights.model_folder import read_description

    output = ResumableOutput(out, tasks, task_index)
    output.require((source, folder, forward))
    folder = converted(folder)
    forward = None if forward is None else converted(forward)
    for model, direction in ((folder, Direction.BACKWARD), (forward, Direction.FORWARD)):
        if model is not None:
            read_description(model, direction)
    columns = Columns(text_column)
    listing = list_source(source, columns, max_record_bytes=max_record_bytes)
    pieces = listing.slices
    for line in skipped_lines(listing.skipped):
        click.echo(line, err=True)
    next(_texts(pieces, columns, 1, max_record_bytes), None)  # fails before the folder is claimed
    plan = {
        **_FORMAT,
        "model": identity(folder),
        "--forward": forward and identity(forward),
        "--in": _inputs(pieces),
        "--text-column": text_column,
        "--limit": limit,
        "--num-samples": num_samples,
        "--max-new-tokens": max_new_tokens,
        "--temperature": temperature,
        "--top-k": top_k,
        "--seed": seed,
        "--batch-size": batch_size,
        "--tasks": tasks,
        "--dtype": dtype,
    }
    output.claim(plan)
    if waiting := output.waiting:
        from megaback.inference.placement import choose_device, choose_dtype
        from megaback.inference.sampling import SamplingOptions

        options = SamplingOptions(
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
        )
        on = choose_device(device)
        translator = _load(
            folder, forward, on, choose_dtype(dtype, on), cuda_graphs, options, num_samples
        )
        for task in waiting:
            texts = _texts(pieces, columns, limit, max_record_bytes)
            _do_task(output, task, texts, batch_size, translator)
    if output.is_complete():
        _write(output, Choice(keep, min_score, form), overwrite)


if __name__ == "__main__":
    main()
