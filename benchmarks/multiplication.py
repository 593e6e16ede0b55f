"""Multiplication in both directions, after Zhang et al., "Reversal Blessing" (2025), section 4.

    python benchmarks/multiplication.py --digits 2 --out runs/multiplication2

For each of the forms m*n=p and p=m*n, models are trained forward and backward on texts in which
every digit is a token. Each is asked to choose the right side of an equation among four that differ
in one digit, by log P of the part that it reads last given the part that it reads first. Printed at
the end is the table of docs/results.md, with the published figures beside it. The same command
resumes after an interruption.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import click
from controlled.multiplication import (
    PUBLISHED,
    SCORINGS,
    Form,
    Product,
    Scoring,
    accuracies,
    factor_entropy,
    questions,
    split_products,
)
from controlled.runner import CHARACTER_PIECES, Folder, cell, cpu_line, folder_options
from smoke import Benchmark

from data_pipeline.common.number_ranges import COUNT
from data_pipeline.text.codec import Direction
from megaback.scoring.pairs import Pair
from megaback.scoring.scorer import Scorer, load_scorer

_DATA_SEED = 0
_CHARACTERS = len("0123456789*=")


def measure(
    run: Path, scorings: Sequence[Scoring], parts: dict[str, Sequence[Product]], num_draws: int
) -> dict[str, Any]:
    """Accuracy per draw and nats per question, of each way to score in one direction, per part."""
    found: dict[str, Any] = {}
    is_forward = scorings[0].is_forward
    direction = Direction.FORWARD if is_forward else Direction.BACKWARD
    with load_scorer(
        run, form="plain", device="cpu", with_prior=False, direction=direction
    ) as scorer:
        for scoring in scorings:
            found[scoring.name] = {
                name: _scored(scorer, scoring, products, num_draws)
                for name, products in parts.items()
            }
    return found


def _scored(
    scorer: Scorer, scoring: Scoring, products: Sequence[Product], num_draws: int
) -> dict[str, Any]:
    asked = questions(products, scoring.form, num_draws, _DATA_SEED)
    texts = [(number, text) for number, one in enumerate(asked) for text in one.candidates]
    halves = [scoring.halves(f"{asked[number].left}={text}") for number, text in texts]
    scores: list[dict[str, float]] = [{} for _ in asked]
    pairs = [Pair(question, answer) for question, answer in halves]
    for (number, text), score in zip(texts, scorer.score(pairs), strict=True):
        scores[number][text] = score.log_probability
    nats = mean(-score[one.right] for one, score in zip(asked, scores, strict=True))
    return {"accuracies": accuracies(asked, scores), "nats": nats}


def table(found: dict[str, list[dict[str, Any]]], entropy: float) -> Iterator[str]:
    """The figures of each way to score, over seeds, as Markdown."""
    yield (
        "| | text | held-out, % | train, % | held-out, nats | train, nats | theoretical "
        "| published: test, % | train, % | test, nats | train, nats | theoretical |"
    )
    yield "|" + "---|" * 12
    for suffix, scoring in product(("", _OF_BOTH), SCORINGS):
        if scoring.name + suffix not in found:
            continue
        results = found[scoring.name + suffix]
        parts = [[one[scoring.name][part] for one in results] for part in _PARTS]
        theirs = PUBLISHED[scoring.name]
        yield (
            f"| {scoring.name}{suffix} | {'m*n=p' if scoring.form is Form.FORWARD_X else 'p=m*n'} "
            + "".join(f"| {_accuracy([one['accuracies'] for one in part])} " for part in parts)
            + "".join(f"| {cell([one['nats'] for one in part], 3)} " for part in parts)
            + f"| {entropy if scoring.is_ambiguous else 0:.3f} "
            f"| {theirs.test[0]:.2f} ± {theirs.test[1]:.2f} "
            f"| {theirs.train[0]:.2f} ± {theirs.train[1]:.2f} "
            f"| {theirs.test_nats:.2f} | {theirs.train_nats:.2f} "
            f"| {theirs.theoretical_nats:.2f} |"
        )


_PARTS = ("held-out", "train")
_OF_BOTH = ", model of both"


def _accuracy(of_seeds: Sequence[Sequence[float]]) -> str:
    """Percent, with the standard errors over seeds and, in parentheses, over draws."""
    over_seeds = cell([100 * mean(draws) for draws in of_seeds], 1)
    of_draws = [100 * mean(values) for values in zip(*of_seeds, strict=True)]
    over_draws = cell(of_draws, 1).partition(" ± ")[2]
    return over_seeds + (f" ({over_draws})" if over_draws else "")


@click.command(
    cls=Benchmark,
    smoke="--out {out} --config {config} --steps 2 --num-seeds 1 --direction backward"
    " --form forward-x --questions 8 --max-pairs 300",
)
@click.option(
    "--digits", type=click.IntRange(2, 4), default=2, show_default=True, help="Of each factor."
)
@click.option(
    "--form",
    "forms",
    type=click.Choice([form.value for form in Form]),
    multiple=True,
    default=[form.value for form in Form],
    show_default=True,
    help="Order of the equation: m*n=p, or p=m*n. May be repeated.",
)
@click.option(
    "--max-pairs",
    type=COUNT.option,
    default=500_000,
    show_default=True,
    help="Maximum number of pairs in the data, m*n and n*m being one.",
)
@click.option(
    "--questions",
    "num_questions",
    type=COUNT.option,
    default=300,
    show_default=True,
    help="Maximum number of questions on held-out products, and on trained ones.",
)
@click.option(
    "--draws",
    "num_draws",
    type=COUNT.option,
    default=10,
    show_default=True,
    help="Number of times that the wrong choices are drawn.",
)
@folder_options("multiplication", has_both=True)
def main(
    digits: int,
    forms: tuple[str, ...],
    max_pairs: int,
    num_questions: int,
    num_draws: int,
    **options: Any,
) -> None:
    """Make the data, train, score, and print the table."""
    folder = Folder(**options)
    folder.claim(digits=digits, max_pairs=max_pairs, questions=num_questions, draws=num_draws)
    split = split_products(digits, max_pairs, _DATA_SEED)
    parts = {"held-out": split.held_out[:num_questions], "train": split.train[:num_questions]}
    started = time.process_time()
    found: dict[str, list[dict[str, Any]]] = {}
    everything = []
    for form in map(Form, forms):
        text = folder.texts(form.value, ({"text": one.text(form)} for one in split.train))
        tokenizer = folder.tokenizer(text, CHARACTER_PIECES + _CHARACTERS)
        shards = folder.shards(form.value, text, tokenizer)
        for trained, _, part in folder.measured:
            scorings = [
                scoring
                for scoring in SCORINGS
                if scoring.form is form and scoring.is_forward is (part == "forward")
            ]

            def measured(run: Path, scorings: Sequence[Scoring] = scorings) -> dict[str, Any]:
                return measure(run, scorings, parts, num_draws)

            suffix, written = ("", "") if part == trained else (_OF_BOTH, part)
            results = folder.results(form.value, shards, trained, measured, written)
            found |= {scoring.name + suffix: results for scoring in scorings}
            everything += results
    click.echo("")
    for line in table(found, factor_entropy(digits)):
        click.echo(line)
    click.echo(
        f"\n{len(split.train):,} products to train on, {len(split.held_out):,} held out; "
        f"{len(parts['held-out'])} and {len(parts['train'])} asked. {cpu_line(everything)}; "
        f"everything else {time.process_time() - started:.0f} s."
    )


if __name__ == "__main__":
    main()
