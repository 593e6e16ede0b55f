"""Suites of instruction rows: recall of instructions, and of words from their definitions."""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from data_pipeline.errors import ConfigError, DirectionMismatchError, SourceEmptyError
from data_pipeline.text.chat_format import Example
from megaback.scoring.pairs import Pair
from megaback.scoring.scorer import Form
from megaback.suites.accuracy import Metric
from tools.suites.base import Evaluated, SuiteOptions, SuiteResult, read_examples

DEFAULT_WORD_PATTERN = r"^Define the \w+ '(.+)'\.$"
NUM_CHOICES = 10
_WORDS = re.compile(r"\w+")


def token_f1(predicted: str, expected: str) -> float:
    """F1 over words, ignoring case, as in Rajpurkar et al., "SQuAD" (2016), but with articles
    kept."""
    ours, theirs = (Counter(_WORDS.findall(text.casefold())) for text in (predicted, expected))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else float(ours == theirs)


def instruction_recall(
    evaluated: Evaluated, _: Evaluated | None, options: SuiteOptions
) -> SuiteResult:
    """Compare the greedily generated instruction of each response with the true one.

    Chance is the instruction of another row.
    """
    _require_backward(evaluated, "instruction-recall")
    source, longest = options.need("rows", "instruction-recall"), options.max_record_bytes
    all_rows = read_examples(source, options.limit, longest, options.columns)
    rows = _that_fit(evaluated, all_rows)
    found = evaluated.likeliest([row.response for row in rows], options.max_new_tokens)
    matches = [float(one.text == row.instruction) for one, row in zip(found, rows, strict=True)]
    f1s = [token_f1(one.text, row.instruction) for one, row in zip(found, rows, strict=True)]
    others = _deranged(len(rows), options.seed)
    by_chance = [
        (
            float(rows[other].instruction == row.instruction),
            token_f1(rows[other].instruction, row.instruction),
        )
        for row, other in zip(rows, others, strict=True)
    ]
    chance = [sum(values) / len(rows) for values in zip(*by_chance, strict=True)]
    predictions = [
        {"response": row.response, "instruction": row.instruction, "written": one.text}
        for one, row in zip(found, rows, strict=True)
    ]
    return SuiteResult(
        len(rows),
        {
            "exact match": Metric.mean(matches, options.seed, chance[0]),
            "token F1": Metric.mean(f1s, options.seed, chance[1]),
        },
        len(all_rows) - len(rows),
        predictions,
    )


def reverse_dictionary(
    evaluated: Evaluated, _: Evaluated | None, options: SuiteOptions
) -> SuiteResult:
    """Accuracy of the word of each definition: generated, and chosen among ten like instructions.

    `word_pattern` matches the instructions of definitions; its group is the word. Chance for a
    generated word is another row's word.
    """
    _require_backward(evaluated, "reverse-dictionary")
    pattern = _compiled(options.word_pattern or DEFAULT_WORD_PATTERN)
    source = options.need("rows", "reverse-dictionary")
    all_rows = [
        row
        for row in read_examples(source, None, options.max_record_bytes, options.columns)
        if pattern.search(row.instruction)
    ][: options.limit]
    rows = _that_fit(evaluated, all_rows)
    if len(rows) < 2:
        raise SourceEmptyError(
            f"{source}: fewer than two instructions match --word-pattern {pattern.pattern}"
        )
    words = [_word(row.instruction, pattern) for row in rows]
    found = evaluated.likeliest([row.response for row in rows], options.max_new_tokens)
    matches = [
        float(_word(one.text, pattern) == word) for one, word in zip(found, words, strict=True)
    ]
    counts, total = Counter(words), len(words)
    chance = sum(count * (count - 1) for count in counts.values()) / (total * (total - 1))
    by_probability, by_ratio = _choose(evaluated, rows, words, pattern, options.seed)
    predictions = [
        {"definition": row.response, "word": word, "written": one.text}
        for one, row, word in zip(found, rows, words, strict=True)
    ]
    metrics = {"exact match": Metric.mean(matches, options.seed, chance)}
    if by_probability:
        metrics["choice of 10"] = Metric.mean(by_probability, options.seed, 1 / NUM_CHOICES)
        metrics["choice of 10, prior-normalized"] = Metric.mean(
            by_ratio, options.seed, 1 / NUM_CHOICES
        )
    return SuiteResult(total, metrics, len(all_rows) - total, predictions)


def _choose(
    evaluated: Evaluated,
    rows: Sequence[Example],
    words: Sequence[str | None],
    pattern: "re.Pattern[str]",
    seed: int,
) -> tuple[list[float], list[float]]:
    """Whether each row's own instruction is the best of ten, by log P and by the ratio."""
    of_wording: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        match = pattern.search(row.instruction)
        assert match is not None
        wording = row.instruction[: match.start(1)] + row.instruction[match.end(1) :]
        of_wording[wording].append(number)
    generator = random.Random(seed)
    pairs = []
    for numbers in of_wording.values():
        for number in numbers:
            others = sorted({words[other] or "" for other in numbers} - {words[number]})
            if len(others) < NUM_CHOICES - 1:
                continue
            chosen = generator.sample(others, NUM_CHOICES - 1)
            instruction = rows[number].instruction
            match = pattern.search(instruction)
            assert match is not None
            head, tail = instruction[: match.start(1)], instruction[match.end(1) :]
            pairs += [
                Pair(f"{head}{word}{tail}", rows[number].response) for word in (match[1], *chosen)
            ]
    scores = evaluated.score(pairs, Form.CHAT)
    groups = [scores[at : at + NUM_CHOICES] for at in range(0, len(scores), NUM_CHOICES)]
    return (
        [first_is_best([one.log_probability for one in group]) for group in groups],
        [first_is_best([one.log_ratio or 0.0 for one in group]) for group in groups],
    )


def first_is_best(values: Sequence[float]) -> float:
    """1 if the first value is the highest, 1/n if it ties with n - 1 others, else 0.

    >>> first_is_best([2.0, 2.0, 1.0])
    0.5
    """
    best = max(values)
    return (values[0] == best) / sum(value == best for value in values)


def _word(instruction: str, pattern: "re.Pattern[str]") -> str | None:
    match = pattern.search(instruction)
    return match[1].casefold() if match else None


def _compiled(pattern: str) -> "re.Pattern[str]":
    try:
        compiled = re.compile(pattern)
        if compiled.groups != 1:
            raise ValueError("it must have one group, around the word")
    except (re.error, ValueError) as error:
        raise ConfigError(f"--word-pattern {pattern!r}: {error}") from None
    return compiled


def _that_fit(evaluated: Evaluated, rows: Sequence[Example]) -> list[Example]:
    fitting = [row for row in rows if row.response and evaluated.fits(row)]
    if rows and not fitting:
        raise SourceEmptyError(
            f"no row fits the model's context of {evaluated.description.context_tokens} tokens; "
            "use shorter rows"
        )
    return fitting


def _deranged(count: int, seed: int) -> list[int]:
    """A random cyclic permutation, which maps each row to another one."""
    circle = list(range(count))
    random.Random(seed).shuffle(circle)
    other = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return [other[number] for number in range(count)]


def _require_backward(evaluated: Evaluated, suite: str) -> None:
    if not evaluated.form.writes_instruction:
        raise DirectionMismatchError(
            f"--suite {suite} needs a model that writes backward, and {evaluated.folder} writes "
            "forward"
        )
