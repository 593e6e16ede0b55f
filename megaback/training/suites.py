"""Benchmarks that are measured while a model trains, with its weights of that moment.

Rows are read once, by the first rank. The texts of a forward pass depend on the config alone, and a
pass is computed by one rank, so that scores are the same for any number of ranks. All ranks compute
equally many passes, as the engine gathers weights at ZeRO stage 3. No random state is used.

Shapes: T packed tokens, S texts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megaback.config import Config
from megaback.config_validation import ValidationSection
from megaback.data import Data
from megaback.distributed.world import World
from megaback.model.attention import Segments
from megaback.model.sending import Arriving, sent
from megaback.scoring.choices import ChoiceEncoder, ChoiceScore, EncodedChoice, Scoring
from megaback.suites.accuracy import (
    Metric,
    accuracies,
    bits_per_byte,
    chance_of,
    encode_rows,
    needs_given,
    scored_rows,
)
from megaback.suites.data import BenchmarkRows, read_benchmark
from megaback.suites.rows import BENCHMARKS

_TOKENS_PER_PASS = 8192
_SEED = 0
"""Seed of the intervals."""

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Given ids, with the begin marker, and scored ones."""
Results = dict[str, dict[str, Metric]]
"""Metrics by suite, by their name."""


def open_suites(config: Config, data: Data, world: World) -> "Suites | None":
    """Rows of the config's suites, ready to be measured; None without suites. Collective.

    If the rows of any suite cannot be read or do not fit the context, all ranks exit.
    """
    section, context_tokens = config.validation, config.batch.context_tokens
    if not section.suites:
        return None
    read = world.run_collectively(_read, section, world)
    rows = world.of_first(read, dict[str, BenchmarkRows])
    # What fits a rank in training fits it here. Texts are not divided.
    row_tokens = context_tokens // data.part.count
    micro_batch_tokens = data.micro_batch_rows * row_tokens
    return world.run_collectively(
        Suites,
        rows,
        ChoiceEncoder(data.given.codec, context_tokens),
        Scoring(section.suite_scoring),
        max(row_tokens, min(micro_batch_tokens, _TOKENS_PER_PASS)),
    )


def _read(section: ValidationSection, world: World) -> dict[str, BenchmarkRows]:
    """Rows of each suite, on the first rank."""
    folder = None if section.suite_folder is None else str(section.suite_folder)
    found: dict[str, BenchmarkRows] = {}
    for name in section.suites if world.is_first else ():
        read = read_benchmark(name, BENCHMARKS[name], folder, None, "validation.suite_folder")
        chosen = spread(len(read.rows), section.suite_rows)
        found[name] = BenchmarkRows([read.rows[row] for row in chosen], read.split, read.source)
    return found


def spread(num_rows: int, num_chosen: int | None) -> list[int]:
    """Numbers of rows at equal distances: of a sorted benchmark, each part has its share."""
    count = num_rows if num_chosen is None else min(num_chosen, num_rows)
    return [number * num_rows // count for number in range(count)]


@dataclass(frozen=True)
class _Suite:
    """Rows of one suite and their encoded choices, by number."""

    rows: BenchmarkRows
    encoded: Mapping[int, Sequence[EncodedChoice]]


class Suites:
    """Encoded rows of suites, in texts that are packed for forward passes."""

    def __init__(
        self,
        rows: Mapping[str, BenchmarkRows],
        encoder: ChoiceEncoder,
        scoring: Scoring,
        pass_tokens: int,
    ) -> None:
        """Raises SourceEmptyError for a suite without a row that fits the context."""
        self._scorings = [scoring] if encoder.is_backward else None
        self._has_prior = encoder.is_backward and scoring is Scoring.RATIO
        self._suites = {
            name: _Suite(one, encode_rows(name, one.rows, encoder)) for name, one in rows.items()
        }
        wanted: dict[Text, int] = {}
        for name, suite in self._suites.items():
            for one in (choice for group in suite.encoded.values() for choice in group):
                for text in self._texts_of(name, one):
                    wanted.setdefault(text, len(wanted))
        self._numbers = wanted
        self.texts = [*wanted]
        self.passes = _packs(self.texts, pass_tokens)
        self.sha256 = hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()
        """SHA-256 of the texts, by which measurements of other rows are recognized."""

    def _texts_of(self, name: str, one: EncodedChoice) -> list[Text]:
        """The whole choice and, if its score has a prior, the scored ids alone."""
        texts = [(one.given, one.scored)]
        if self._has_prior and not BENCHMARKS[name].is_text:
            texts.append((one.given[:1], one.scored))
        return texts

    def describe(self) -> list[str]:
        """A line about the rows of each suite."""
        lines = []
        for name, suite in self._suites.items():
            num_excluded = len(suite.rows.rows) - len(suite.encoded)
            excluded = f", {num_excluded:,} more do not fit the context" if num_excluded else ""
            lines.append(
                f"suite {name}: {len(suite.encoded):,} rows of {suite.rows.split} from "
                f"{suite.rows.source}{excluded}"
            )
        return lines

    def results(self, scores_2S: "np.ndarray[Any, Any]") -> Results:
        """Metrics from log P(given) and log P(scored | given) of each text, in nats."""
        results = {}
        for name, suite in self._suites.items():
            benchmark = BENCHMARKS[name]
            with_given = needs_given(benchmark, self._scorings)
            scores = []
            for one in (choice for group in suite.encoded.values() for choice in group):
                numbers = [self._numbers[text] for text in self._texts_of(name, one)]
                given, scored = scores_2S[:, numbers[0]].tolist()
                prior = float(scores_2S[1, numbers[1]]) if len(numbers) > 1 else None
                score = ChoiceScore(
                    scored, False, len(one.scored), given if with_given else None, prior
                )
                scores.append(score)
            scored_by_row = scored_rows(suite.rows.rows, suite.encoded, scores)
            if benchmark.is_text:
                results[name] = {"bits_per_byte": bits_per_byte(scored_by_row, _SEED)}
                continue
            values = accuracies(
                scored_by_row, self._scorings, has_normalized=benchmark.has_normalized
            )
            chance = chance_of(scored_by_row)
            results[name] = {key: Metric.mean(one, _SEED, chance) for key, one in values.items()}
        return results


def _packs(texts: Sequence[Text], pass_tokens: int) -> list[list[int]]:
    """Numbers of the texts of each forward pass, by length: attention takes equal ones together."""
    num_read = [len(given) + len(scored) - 1 for given, scored in texts]
    packs: list[list[int]] = []
    room = 0
    for number in sorted(range(len(texts)), key=num_read.__getitem__):
        if num_read[number] > room:
            packs.append([])
            room = pass_tokens
        packs[-1].append(number)
        room -= num_read[number]
    return packs


@torch.no_grad()
def measure_suites(
    engine: Any,
    suites: Suites,
    world: World,
    on_pass: Callable[[], None],
    must_stop: Callable[[], bool],
    *,
    is_compiled: bool = False,
) -> Results | None:
    """Metrics of all suites, on every rank; None if any rank had to stop. Collective.

    `on_pass` and `must_stop` are called before each pass. `is_compiled`: as in `evaluate`.
    """
    engine.eval()
    scores_2S = np.zeros((2, len(suites.texts)))
    before: tuple[list[int], Arriving] | None = None
    is_stopped = False
    for first in range(0, len(suites.passes), world.size):
        is_stopped = bool(world.sum(must_stop())[0])
        if is_stopped:
            break
        on_pass()
        own = suites.passes[first + world.rank : first + world.rank + 1]
        # A rank that has none left computes one text for nothing.
        numbers = own[0] if own else [0]
        inputs = _inputs([suites.texts[number] for number in numbers], world.device)
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            nats = Arriving(engine(*inputs))
        if before is not None:  # while this pass computes
            _add(scores_2S, suites.texts, *before)
        before = (numbers, nats) if own else None
    if before is not None:
        _add(scores_2S, suites.texts, *before)
    engine.train()
    if is_stopped:
        return None
    # Each text has a score on one rank and 0 on the others, so that sums are exact.
    return suites.results(np.array(world.sum(*scores_2S.ravel())).reshape(scores_2S.shape))


def _inputs(texts: Sequence[Text], device: torch.device) -> tuple[Any, ...]:
    """Arguments of the model's forward pass, in which all ids but the first are targets."""
    rows = [(*given, *scored) for given, scored in texts]
    lengths = tuple(len(row) - 1 for row in rows)
    ids_T = sent(torch.tensor([one for row in rows for one in row[:-1]]), device)
    targets_T = sent(torch.tensor([one for row in rows for one in row[1:]]), device)
    positions_T = sent(torch.cat([torch.arange(length) for length in lengths]), device)
    return ids_T, targets_T, positions_T, Segments.from_lengths(lengths, device)


def _add(
    scores_2S: "np.ndarray[Any, Any]", texts: Sequence[Text], numbers: list[int], nats: Arriving
) -> None:
    """Add the scores of a pass to those of all texts."""
    nats_T = nats.result().double().numpy()
    start = 0
    for number in numbers:
        given, scored = texts[number]
        middle = start + len(given) - 1
        stop = middle + len(scored)
        scores_2S[:, number] = -nats_T[start:middle].sum(), -nats_T[middle:stop].sum()
        start = stop
