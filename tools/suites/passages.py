"""Suites of running text: choice of the preceding passage, and bits per byte."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.errors import DirectionMismatchError, ShardsMissingError, SourceEmptyError
from data_pipeline.loading.loader import sequential_batches
from data_pipeline.loading.measured_rows import measured_rows
from data_pipeline.shards.data_set import DataSet
from data_pipeline.sources.registry import list_source, read_slice
from data_pipeline.text.codec import Direction
from megaback.scoring.bootstrap import ratio_interval
from megaback.scoring.pairs import Pair
from megaback.scoring.scorer import Form
from megaback.suites.accuracy import Metric
from tools.suites.base import Evaluated, SuiteOptions, SuiteResult
from tools.suites.loss_sums import loss_sums
from tools.suites.recall import NUM_CHOICES, first_is_best

_DEFAULT_ITEMS = 500


@dataclass(frozen=True)
class Neighbors:
    """Two adjacent passages of a document; `first + second` is a substring of it."""

    first: str
    second: str


def neighbors(text: str, characters: int) -> Iterator[Neighbors]:
    """Cut a document into passages of `characters` characters, up to the next word end, in pairs.

    A passage after the first begins with the whitespace before its first word.
    """
    cuts = [0]
    while True:
        at = cuts[-1] + characters
        while at < len(text) and not text[at].isspace():
            at += 1
        if at >= len(text):
            break
        cuts.append(at)
    for start, middle, stop in zip(cuts[::2], cuts[1::2], cuts[2::2], strict=False):
        yield Neighbors(text[start:middle], text[middle:stop])


def passage_choice(
    evaluated: Evaluated, forward: Evaluated | None, options: SuiteOptions
) -> SuiteResult:
    """Accuracy of choosing the passage that precedes a given one, among it and nine others.

    By log P(first | second) of the backward model, by its difference from log P(first) and, if
    there is a forward model, by its log P(second | first).
    """
    if evaluated.codec.format.direction is not Direction.BACKWARD:
        raise DirectionMismatchError(
            f"--suite passage-choice needs a model that writes backward, and {evaluated.folder} "
            "writes forward; give that one as --forward"
        )
    if forward is not None and forward.codec.format.direction is not Direction.FORWARD:
        raise DirectionMismatchError(
            f"--forward needs a model that writes forward, and {forward.folder} writes backward"
        )
    source, longest = options.need("passages", "passage-choice"), options.max_record_bytes
    items = [
        item
        for piece in list_source(source, max_record_bytes=longest).slices
        for document in read_slice(piece, max_record_bytes=longest)
        for item in neighbors(document.text, options.passage_characters)
    ]
    generator = random.Random(options.seed)
    generator.shuffle(items)
    drawn = items[: options.limit or _DEFAULT_ITEMS]
    models = [evaluated] if forward is None else [evaluated, forward]
    items = [item for item in drawn if all(_fits_with_any(item, model) for model in models)]
    if len(items) < NUM_CHOICES:
        raise SourceEmptyError(
            f"{source}: {len(items)} pairs of passages of {options.passage_characters} characters "
            f"fit the context, and a choice needs {NUM_CHOICES}; name more text, or decrease "
            "--passage-characters"
        )
    pairs = []
    for number, item in enumerate(items):
        others = generator.sample([at for at in range(len(items)) if at != number], NUM_CHOICES - 1)
        pairs += [Pair(items[at].first, item.second) for at in (number, *others)]
    scores = evaluated.score(pairs, Form.PLAIN)
    choices = {
        "reverse": [one.log_probability for one in scores],
        "prior-normalized": [one.log_ratio or 0.0 for one in scores],
    }
    if forward is not None:
        of_forward = forward.score(pairs, Form.PLAIN, with_prior=False)
        choices["forward"] = [one.log_probability for one in of_forward]
    metrics = {}
    for name, values in choices.items():
        right = [
            first_is_best(values[at : at + NUM_CHOICES])
            for at in range(0, len(values), NUM_CHOICES)
        ]
        metrics[name] = Metric.mean(right, options.seed, 1 / NUM_CHOICES)
    return SuiteResult(len(items), metrics, len(drawn) - len(items))


def _fits_with_any(item: Neighbors, model: Evaluated) -> bool:
    """Whether each passage takes at most half of the context, so that any two fit."""
    maximum = (model.description.context_tokens - 1) // 2
    return all(len(model.codec.encode(text)) <= maximum for text in (item.first, item.second))


def bits_per_byte(evaluated: Evaluated, _: Evaluated | None, options: SuiteOptions) -> SuiteResult:
    """Bits per byte of a val set, as in validation; the interval is a bootstrap over rows."""
    shards = options.need("shards", "bits-per-byte")
    data_set = DataSet.open(shards)
    if not data_set.manifest.split("val"):
        raise ShardsMissingError(f"{data_set.name} has no val set; build it with --val-fraction")
    described = evaluated.description
    rows = measured_rows(
        data_set, f"{evaluated.folder}", described.text_format, described.context_tokens
    )
    num_bytes = evaluated.codec.piece_num_bytes()
    batches = sequential_batches(rows, 0, 1, 1)
    sums = list(loss_sums(evaluated.model, batches, num_bytes, evaluated.device))
    nats_N, bytes_N = [nats for nats, _, _ in sums], [of_text for _, _, of_text in sums]
    bits = ratio_interval(nats_N, bytes_N, options.seed).scaled(1 / math.log(2))
    return SuiteResult(len(nats_N), {"bits/byte": Metric(bits, len(nats_N))})
