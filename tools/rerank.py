"""`megaback rerank`: ranks answers by a reverse score, mixed with a forward score."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.table import Table

from data_pipeline.common.command import Command, examples
from data_pipeline.common.number_ranges import SHARE
from data_pipeline.common.output_paths import (
    json_lines_with,
    json_object_with,
    overwrite_option,
    require_distinct,
    require_output,
    write_output,
)
from data_pipeline.common.rich_console import SafeConsole
from data_pipeline.common.terminal import print_table
from data_pipeline.errors import BadRecordError, ConfigError, DirectionMismatchError, PromptError
from data_pipeline.sources.line_writer import writing_lines
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.sources.weighted import on_bad_record_option
from megaback.scoring.candidates import Question, question_of
from megaback.scoring.pairs import Pair
from tools.model_options import (
    devices_option,
    dtype_option,
    seed_option,
    server_model_option,
    server_option,
)
from tools.score import (
    BadRecords,
    OwnKeys,
    echo,
    form_option,
    good_records,
    in_option,
    out_option,
)

if TYPE_CHECKING:
    from megaback.scoring.bootstrap import Interval
    from megaback.scoring.hf_scorer import HfScorer
    from megaback.scoring.reranking import Scored
    from megaback.scoring.scorer import Scorer

_DEFAULT_WEIGHT = 0.5
_LENGTHS = ("total", "token", "byte")


@dataclass(frozen=True, kw_only=True)
class CandidateScorers:
    """Scorers of candidates: a reverse model, and a forward model or a column of the input."""

    reverse: "Scorer"
    forward: "Scorer | HfScorer | None"
    forward_column: str | None
    forward_per: str
    max_record_bytes: int

    def questions(self, source: str, bad: BadRecords) -> list[tuple[dict[str, Any], Question]]:
        """The records of a file that every scorer accepts. Raises BadRecordError."""
        found = []
        for record in good_records(source, bad, self.max_record_bytes):
            try:
                question = question_of(record, self.forward_column)
                for pair in _pairs(question):
                    self.reverse.encoder.encode(pair)
                    if self.forward is not None:
                        _encode_forward(self.forward, pair)
                found.append((record.fields, question))
            except PromptError as error:
                bad.add(BadRecordError(f"{record.where}: {error}"))
            except BadRecordError as error:
                bad.add(error)
        return found

    def scored(self, questions: Sequence[Question]) -> "list[Scored]":
        """Reverse and forward scores of every candidate."""
        from megaback.scoring.reranking import Scored

        pairs = [pair for question in questions for pair in _pairs(question)]
        reverse = [one.log_probability for one in self.reverse.score(pairs)]
        forward: list[float] | None = None
        if self.forward is not None:
            name = {"total": "log_probability", "token": "per_token", "byte": "per_byte"}
            attribute = name[self.forward_per]
            forward = [float(getattr(one, attribute)) for one in self.forward.score(pairs)]
        elif self.forward_column is not None:
            forward = [
                one.given_score or 0.0 for question in questions for one in question.candidates
            ]
        results, start = [], 0
        for question in questions:
            window = slice(start, start + len(question.candidates))
            start = window.stop
            results.append(
                Scored(
                    None if forward is None else np.array(forward[window]),
                    np.array(reverse[window]),
                    np.array([one.is_right for one in question.candidates], dtype=bool)
                    if question.is_labeled
                    else None,
                )
            )
        return results


def _pairs(question: Question) -> list[Pair]:
    return [Pair(question.text, one.answer) for one in question.candidates]


def _encode_forward(forward: "Scorer | HfScorer", pair: Pair) -> None:
    """Raises PromptError for a pair that does not fit the model's context."""
    from megaback.scoring.scorer import Scorer

    if isinstance(forward, Scorer):
        forward.encoder.encode(pair)
    else:
        forward.encode(pair)


def load_forward(folder: Path, form: str, device: str | None, dtype: str) -> "Scorer | HfScorer":
    """A scorer with a forward model of megaback, or of transformers."""
    from megaback.inference.device_pool import choose_devices
    from megaback.inference.placement import choose_dtype
    from megaback.scoring.hf_scorer import HfScorer
    from megaback.scoring.scorer import load_scorer
    from megaback.weights.converted import model_folder
    from megaback.weights.model_folder import is_ours

    folder = model_folder(folder)
    if not is_ours(folder):
        on = choose_devices(device)[0]
        return HfScorer(folder, on, choose_dtype(dtype, on))
    scorer = load_scorer(folder, form=form, device=device, dtype=dtype, with_prior=False)
    if scorer.encoder.writes_question:
        raise DirectionMismatchError(
            f"--forward needs a model that writes forward, and {folder} writes backward"
        )
    return scorer


def _fitted(scorers: CandidateScorers, dev: str) -> float:
    from megaback.scoring.reranking import fit_weight

    if scorers.forward is None and scorers.forward_column is None:
        raise ConfigError("--fit needs a forward score: give --forward or --forward-column")
    questions = [question for _, question in scorers.questions(dev, BadRecords(None))]
    unlabeled = sum(not question.is_labeled for question in questions)
    if unlabeled:
        raise ConfigError(
            f"--fit {dev}: {unlabeled} of {len(questions)} questions have candidates without the "
            "key 'correct'; label every candidate"
        )
    weight = fit_weight(scorers.scored(questions))
    echo(f"weight {weight:.2f}, fitted on {len(questions):,} questions")
    return weight


def _report(found: "dict[str, Interval]", num_questions: int, dtype: str) -> Table:
    title = f"accuracy over {num_questions:,} questions, scored in {dtype}"
    table = Table(title=title, title_justify="left")
    for column in ("chosen by", "accuracy", "95%"):
        table.add_column(column, justify="left" if column == "chosen by" else "right")
    for name, one in found.items():
        shown = "mixed - forward" if name == "gain" else name
        table.add_row(shown, f"{one.value:.3f}", one.between)
    return table


@click.command(
    cls=Command,
    name="rerank",
    epilog=examples(
        "megaback rerank models/backchat --in questions.jsonl --out ranked.jsonl",
        "megaback rerank models/backchat --in questions.jsonl --out ranked.jsonl "
        "--forward models/answers --fit labeled.jsonl --report accuracy.json",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@in_option
@out_option
@overwrite_option
@form_option
@click.option(
    "--forward",
    type=click.Path(path_type=Path),
    help="Folder of a forward model, of megaback or of transformers (local files).",
)
@click.option("--forward-column", help="Key of a candidate's forward score, instead of --forward.")
@click.option(
    "--forward-per",
    type=click.Choice(_LENGTHS),
    default="total",
    show_default=True,
    help="Normalization of the forward model's log P(answer | question): none (total), per token, "
    "or per byte.",
)
@click.option(
    "--weight",
    type=SHARE.option,
    help="Weight of the reverse score; the forward score has 1 - weight. Default: 0.5.",
)
@click.option(
    "--fit",
    "dev",
    type=click.Path(),
    help="File of labeled questions to fit the weight on, instead of --weight.",
)
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write the accuracies to, as JSON.",
)
@on_bad_record_option("stop")
@max_record_bytes_option
@seed_option
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
    forward: Path | None,
    forward_column: str | None,
    forward_per: str,
    weight: float | None,
    dev: str | None,
    report: Path | None,
    on_bad_record: str,
    max_record_bytes: int,
    seed: int,
    device: str | None,
    dtype: str,
    server: str | None,
    server_model: str | None,
) -> None:
    """Rank the candidate answers to each question by the reverse model in DIR.

    Each input line has `question` and `candidates`: texts, or objects with `answer` and optionally
    `correct`. Each output line adds `ranking` and `scores`.
    """
    if forward is not None and forward_column is not None:
        raise click.UsageError("Give either --forward or --forward-column.")
    if weight is not None and dev is not None:
        raise click.UsageError("Give either --weight or --fit.")
    inputs = (source, folder, forward, dev)
    of_out = json_lines_with(ranking=list, scores=list)
    require_output(out, inputs, is_ours=of_out, overwrite=overwrite)
    if report is not None:
        of_report = json_object_with("questions", "weight", "accuracy")
        require_output(report, inputs, is_ours=of_report, overwrite=overwrite, option="--report")
        require_distinct(out=out, report=report)
    from megaback.scoring.bootstrap import NO_INTERVAL
    from megaback.scoring.reranking import accuracies, ranking
    from megaback.scoring.scorer import load_scorer

    on_device = (device, dtype) if server is None or forward is None else (None, "auto")
    with load_scorer(
        folder,
        form=form,
        device=on_device[0],
        dtype=on_device[1],
        with_prior=False,
        server=server,
        server_model=server_model,
    ) as reverse:
        if not reverse.encoder.writes_question:
            raise DirectionMismatchError(
                f"rerank needs a model that writes backward, and {folder} writes forward; give "
                "that one as --forward"
            )
        by = None if forward is None else load_forward(forward, form, device, dtype)
        scorers = CandidateScorers(
            reverse=reverse,
            forward=by,
            forward_column=forward_column,
            forward_per=forward_per,
            max_record_bytes=max_record_bytes,
        )
        used = _DEFAULT_WEIGHT if weight is None else weight
        if dev is not None:
            used = _fitted(scorers, dev)
        bad = BadRecords(on_bad_record)
        records = scorers.questions(source, bad)
        bad.require_some(source, len(records))
        scored = scorers.scored([question for _, question in records])
    own = OwnKeys("ranking", "scores")
    with writing_lines(out, overwrite=overwrite) as writer:
        for (fields, _), one in zip(records, scored, strict=True):
            mixed = one.mixed(used)
            scores = {"reverse": one.reverse, "mixed": mixed}
            if one.forward is not None:
                scores = {"forward": one.forward, **scores}
            results = {
                "ranking": ranking(mixed),
                "scores": [
                    {name: round(float(values[at]), 5) for name, values in scores.items()}
                    for at in range(len(mixed))
                ],
            }
            writer.write(own.written(fields, results))
    own.report()
    labeled = [one for one in scored if one.is_right is not None]
    if not labeled:
        return echo(
            f"{len(scored):,} questions ranked in {reverse.dtype}; no accuracy, since of no "
            "question all candidates have `correct`"
        )
    found = accuracies(labeled, used, seed)
    if report is not None:
        fields = {name: one.to_dict() for name, one in found.items()}
        what = {
            "questions": len(labeled),
            "weight": used,
            "dtype": reverse.dtype,
            "accuracy": fields,
        }
        write_output(report, json.dumps(what, indent=2) + "\n", overwrite=overwrite)
    print_table(SafeConsole(stderr=True), _report(found, len(labeled), reverse.dtype))
    if any(one.low is None for one in found.values()):
        echo(NO_INTERVAL.replace("rows", "labeled questions"))
    return None


if __name__ == "__main__":
    main()
