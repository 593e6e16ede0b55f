"""Facts stated in one order and asked in both, after Berglund et al., "The Reversal Curse" (2023).

    python benchmarks/reversal_facts.py --out runs/reversal_facts

Half of the fictitious facts are stated with the name first, half with the description first. Models
are trained on all of them forward and backward, and asked for the description of each name, and for
the name of each description: greedily written, and chosen among ten by log P. The same command
resumes after an interruption.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from controlled.facts import Fact, FactQuestion, Order, ask, is_asked_as_stated, make_facts
from controlled.runner import Folder, cell, cpu_line, folder_options
from smoke import Benchmark

from data_pipeline.text.codec import Direction
from megaback.inference.sampling import SamplingOptions
from megaback.inference.text_writer import Writer, load
from megaback.scoring.pairs import Pair
from megaback.scoring.scorer import load_scorer

NUM_CHOICES = 10
_DATA_SEED = 0
_AT_ONCE = 64
_MAX_NEW_TOKENS = 40
_ASKED = {"name": True, "description": False}


def measure(run: Path, is_forward: bool, facts: Sequence[Fact]) -> dict[str, Any]:
    """Exact match and choice among ten, for each order of the statement and each asked part."""
    direction = Direction.FORWARD if is_forward else Direction.BACKWARD
    writer = load(run, device="cpu", usual_rows=_AT_ONCE, direction=direction)
    found = {}
    with load_scorer(
        run, form="plain", device="cpu", with_prior=False, direction=direction
    ) as scorer:
        for order in Order:
            stated = [fact for fact in facts if fact.order is order]
            for asked, for_name in _ASKED.items():
                questions = [ask(fact, for_name=for_name, is_forward=is_forward) for fact in stated]
                groups = choices([question.answer for question in questions])
                scores = scorer.score(
                    [
                        pair(question, answer, is_forward)
                        for question, group in zip(questions, groups, strict=True)
                        for answer in group
                    ]
                )
                values = [score.log_probability for score in scores]
                of_questions = [
                    values[at : at + NUM_CHOICES] for at in range(0, len(values), NUM_CHOICES)
                ]
                right = [group[0] > max(group[1:]) for group in of_questions]
                found[f"{order.value}, {asked}"] = {
                    "written": _written(writer, questions, is_forward),
                    "chosen": sum(right) / len(right),
                }
    return found


def choices(answers: Sequence[str]) -> list[list[str]]:
    """Each answer, and NUM_CHOICES - 1 others."""
    generator = random.Random(_DATA_SEED)
    return [
        [answer, *generator.sample([x for x in answers if x != answer], NUM_CHOICES - 1)]
        for answer in answers
    ]


def pair(question: FactQuestion, answer: str, is_forward: bool) -> Pair:
    """The answer on the side that the model writes, the known text on the other."""
    if is_forward:
        return Pair(question.before, answer)
    return Pair(answer, question.after)


def _written(writer: Writer, questions: Sequence[FactQuestion], is_forward: bool) -> float:
    """Fraction of answers that are written exactly, up to the known text's other side."""
    options = SamplingOptions(max_new_tokens=_MAX_NEW_TOKENS, temperature=0.0)
    given = [question.before if is_forward else question.after for question in questions]
    texts = [
        text
        for at in range(0, len(given), _AT_ONCE)
        for text in writer.complete_many(given[at : at + _AT_ONCE], options)
    ]
    right = [
        text.startswith(known + question.answer + ".")
        if is_forward
        else text.endswith(question.answer + known)
        for text, known, question in zip(texts, given, questions, strict=True)
    ]
    return sum(right) / len(right)


def table(found: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The figures of each direction, order and question over seeds, as Markdown."""
    yield "| trained | stated | asked for | as stated | written exactly | chosen of 10 |"
    yield "|---|---|---|---|---|---|"
    for trained, results in found.items():
        for order in Order:
            for asked, for_name in _ASKED.items():
                figures = [one[f"{order.value}, {asked}"] for one in results]
                as_stated = is_asked_as_stated(
                    order, for_name=for_name, is_forward=trained.endswith("forward")
                )
                cells = [cell([one[key] for one in figures], 3) for key in ("written", "chosen")]
                yield (
                    f"| {trained} | {order.value} | {asked} | {'yes' if as_stated else 'no'} "
                    f"| {' | '.join(cells)} |"
                )
    yield f"| chance | | | | 0.000 | {1 / NUM_CHOICES:.3f} |"


@click.command(
    cls=Benchmark,
    smoke="--out {out} --config {config} --steps 2 --num-seeds 1 --direction backward"
    " --facts 20 --vocab-size 320",
)
@click.option(
    "--facts",
    "num_facts",
    type=click.IntRange(2 * NUM_CHOICES, 5000),
    default=400,
    show_default=True,
    help="Number of facts.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(300),
    default=600,
    show_default=True,
    help="Size of the tokenizer's vocabulary.",
)
@folder_options("reversal_facts", has_both=True)
def main(num_facts: int, vocab_size: int, **options: Any) -> None:
    """Make the facts, train, ask, and print the table."""
    folder = Folder(**options)
    folder.claim(facts=num_facts, vocab_size=vocab_size)
    facts = make_facts(num_facts, _DATA_SEED)
    sentences = [sentence for fact in facts for sentence in fact.sentences()]
    random.Random(_DATA_SEED).shuffle(sentences)
    text = folder.texts("facts", ({"text": sentence} for sentence in sentences))
    shards = folder.shards("facts", text, folder.tokenizer(text, vocab_size))
    found = {}
    for trained, label, part in folder.measured:

        def measured(run: Path, is_forward: bool = part == "forward") -> dict[str, Any]:
            return measure(run, is_forward, facts)

        written = "" if part == trained else part
        found[label] = folder.results("facts", shards, trained, measured, written)
    click.echo("")
    for line in table(found):
        click.echo(line)
    click.echo(f"\n{cpu_line(one for results in found.values() for one in results)}.")


if __name__ == "__main__":
    main()
