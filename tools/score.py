"""`megaback score`: log P(question | answer) of question-answer pairs, as JSON lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.output_paths import json_lines_with, overwrite_option, require_output
from data_pipeline.common.terminal import fit
from data_pipeline.errors import BadRecordError, PromptError, SourceEmptyError
from data_pipeline.sources.documents import stop_or_skip
from data_pipeline.sources.jsonl import Record, read_records
from data_pipeline.sources.line_writer import writing_lines
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.sources.weighted import on_bad_record_option
from data_pipeline.text.codec import Direction
from megaback.scoring.pairs import PairColumns
from tools.model_options import (
    devices_option,
    direction_option,
    dtype_option,
    server_model_option,
    server_option,
)

if TYPE_CHECKING:
    from megaback.scoring.scorer import EncodedPair, PairEncoder

in_option = click.option(
    "--in",
    "source",
    type=click.Path(allow_dash=True),
    required=True,
    help="File of JSON lines to read, also compressed (.gz, .zst, .bz2, .xz); - for stdin.",
)
out_option = click.option(
    "--out",
    type=click.Path(allow_dash=True),
    required=True,
    help="File of JSON lines to write, in the order of the input; - for stdout.",
)
form_option = click.option(
    "--form",
    type=click.Choice(["chat", "plain"]),
    default="chat",
    show_default=True,
    help="Format of a pair: with chat markers (fine-tuned models), or plain text (base models).",
)


class BadRecords:
    """Policy for invalid lines: `stop` raises the first, `skip` reports and counts all.

    None raises the first as it is, without a hint at --on-bad-record.
    """

    def __init__(self, choice: str | None) -> None:
        self._choice = choice
        self._first: BadRecordError | None = None
        self.count = 0

    def add(self, error: BadRecordError) -> None:
        """Raise the error, or report and count it."""
        if self._choice is None:
            raise error
        if self._choice == "stop":
            stop_or_skip(error)
        self.count += 1
        self._first = self._first or error
        click.echo(f"skipped: {error}", err=True)

    def require_some(self, source: str, num_good: int) -> None:
        """Raises SourceEmptyError, with the first reason, if every line was skipped."""
        if not num_good and self._first is not None:
            raise SourceEmptyError(
                f"{source}: all {self.count:,} lines are invalid, so nothing was written; the "
                f"first error: {self._first}"
            )


def good_records(source: str, bad: BadRecords, max_record_bytes: int) -> Iterator[Record]:
    """The valid records of a file.

    Raises SourceEmptyError for an empty file, and the errors of `read_records`.
    """
    is_empty = True
    for record in read_records(source, max_record_bytes):
        if isinstance(record, BadRecordError):
            bad.add(record)
        else:
            is_empty = False
            yield record
    if is_empty and not bad.count:
        raise SourceEmptyError(f"{source} has no records; give a file of JSON lines")


class OwnKeys:
    """Counts rows whose own keys have the names of results."""

    def __init__(self, *names: str) -> None:
        self._counts = dict.fromkeys(names, 0)

    def written(self, fields: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
        """A row with its results, which replace keys of the same name."""
        for name in results.keys() & fields.keys():
            self._counts[name] += 1
        return {**fields, **results}

    def report(self) -> None:
        """Print a line per key that was replaced."""
        for name, count in self._counts.items():
            if count:
                rows, whose = ("1 row", "its") if count == 1 else (f"{count:,} rows", "their")
                echo(f"{rows} had a key {name!r} of {whose} own, which was replaced")


def encoded_pairs(
    records: Iterator[Record], columns: PairColumns, encoder: "PairEncoder", bad: BadRecords
) -> "Iterator[tuple[dict[str, Any], EncodedPair]]":
    """Each record with its pair's ids."""
    for record in records:
        try:
            yield record.fields, encoder.encode(columns.pair(record.fields, record.where))
        except PromptError as error:
            bad.add(BadRecordError(f"{record.where}: {error}"))
        except BadRecordError as error:
            bad.add(error)


@click.command(
    cls=Command,
    name="score",
    epilog=examples(
        "megaback score models/backchat --in pairs.jsonl --out scored.jsonl",
        "megaback score runs/xcoax_100bt --form plain --columns "
        "question=prompt,answer=completion --in - --out -",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@in_option
@out_option
@overwrite_option
@form_option
@click.option(
    "--columns",
    default="",
    help="Keys of the input with other names: question=prompt,answer=completion.",
)
@click.option(
    "--prior/--no-prior",
    default=True,
    show_default=True,
    help="Also write log P(question), and by how much the answer raises it (log_ratio).",
)
@on_bad_record_option("stop")
@max_record_bytes_option
@direction_option
@devices_option
@dtype_option
@server_option
@server_model_option
def main(
    folder: Path,
    source: str,
    out: str,
    overwrite: bool,
    form: str,
    columns: str,
    prior: bool,
    on_bad_record: str,
    max_record_bytes: int,
    direction: Direction | None,
    device: str | None,
    dtype: str,
    server: str | None,
    server_model: str | None,
) -> None:
    """Score each question by the model in DIR: log P(question | answer), in nats.

    DIR is a converted model, a run or a checkpoint. Each input line has `question` and `answer`, or
    `instruction`, `input` and `output`; each output line adds `score`. A forward model scores the
    answer given the question.
    """
    names, bad = PairColumns.parse(columns), BadRecords(on_bad_record)
    require_output(out, (source, folder), is_ours=json_lines_with(score=dict), overwrite=overwrite)
    from megaback.scoring.scorer import load_scorer

    with load_scorer(
        folder,
        form=form,
        device=device,
        dtype=dtype,
        with_prior=prior,
        direction=direction,
        server=server,
        server_model=server_model,
    ) as scorer:
        records = good_records(source, bad, max_record_bytes)
        pairs = encoded_pairs(records, names, scorer.encoder, bad)
        own = OwnKeys("score")
        with writing_lines(out, overwrite=overwrite) as writer:
            written = 0
            for fields, score in scorer.score_all(pairs):
                writer.write(own.written(fields, {"score": score.to_dict()}))
                written += 1
            bad.require_some(source, written)
    own.report()
    skipped = f", {bad.count:,} lines skipped" if bad.count else ""
    echo(f"{written:,} pairs scored in {scorer.dtype}{skipped}")


def echo(text: str) -> None:
    """Print to stderr, since stdout may be the output."""
    click.echo(fit(text), err=True)


if __name__ == "__main__":
    main()
