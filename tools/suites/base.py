"""Inputs and results of the suites of `megaback eval`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import BadRecordError, ConfigError, SourceEmptyError
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.jsonl import read_records
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES
from data_pipeline.text.chat_format import ChatFormat, Example
from data_pipeline.text.codec import Direction
from megaback.inference.chat import Candidate, candidates_of_each
from megaback.inference.decoder import Decoder
from megaback.inference.device_pool import DevicePool
from megaback.inference.placement import choose_device, choose_dtype, dtype_name
from megaback.inference.sampling import SamplingOptions
from megaback.scoring.pairs import Pair
from megaback.scoring.scorer import Form, PairEncoder, Score, Scorer
from megaback.suites.accuracy import Metric
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import load_model_folder

_WRITTEN_AT_ONCE = 64


@dataclass(frozen=True)
class SuiteOptions:
    """Files that suites read, and their limits."""

    rows: str | None = None
    columns: str = ""
    word_pattern: str = ""
    passages: str | None = None
    passage_characters: int = 300
    shards: str | None = None
    limit: int | None = None
    seed: int = 0
    max_new_tokens: int = 100
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
    benchmarks: str | None = None
    scoring: str = "question"

    def need(self, name: str, suite: str) -> str:
        """The value of an option that a suite requires. Raises ConfigError if it is not set."""
        value: str | None = getattr(self, name)
        if value is None:
            raise ConfigError(f"--suite {suite} needs --{name}; add the option")
        return value


@dataclass(frozen=True)
class SuiteResult:
    """Result of one suite."""

    rows: int
    metrics: dict[str, Metric]
    excluded: int = 0
    """Number of rows that do not fit the context."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Further facts for JSON, such as the source of the rows."""
    shown: tuple[str, ...] | None = None
    """Names of the metrics for the table; None for all."""
    paired: dict[int, float] = field(default_factory=dict)
    """Value of the first shown metric for each row, by which two models are compared."""


class Evaluated:
    """A model under evaluation, which generates and scores."""

    def __init__(
        self,
        folder: Path,
        device: str | None = None,
        dtype: str = "auto",
        *,
        cuda_graphs: bool = True,
        direction: Direction | None = None,
    ) -> None:
        """`device`, `dtype`, `cuda_graphs` and `direction`: as `megaback.load` takes them."""
        self._cuda_graphs = cuda_graphs
        self.folder = folder = model_folder(folder)
        self.device = choose_device(device)
        self._dtype = choose_dtype(dtype, self.device)
        self.model, self.description, self.codec = load_model_folder(
            folder, self.device, self._dtype, direction
        )
        self.form = ChatFormat(self.codec)

    @property
    def dtype(self) -> str:
        """Data type of the weights: `float32` or `bfloat16`."""
        return dtype_name(self._dtype)

    @property
    def weights_dtype(self) -> torch.dtype:
        return self._dtype

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(
            self.model,
            self.description.context_tokens,
            takes_over=False,
            cuda_graphs=self._cuda_graphs,
        )

    def likeliest(self, given: Sequence[str], tokens: int) -> list[Candidate]:
        """Greedy generation for each text, of at most `tokens` tokens that fit the context."""
        prompts = [self.form.prompt(text) for text in given]
        rooms = [self.description.context_tokens - len(prompt.ids) for prompt in prompts]
        by_length = sorted(range(len(given)), key=rooms.__getitem__)
        alone = [[number] for number in by_length if rooms[number] < tokens]
        others = by_length[len(alone) :]
        together = [
            others[start : start + _WRITTEN_AT_ONCE]
            for start in range(0, len(others), _WRITTEN_AT_ONCE)
        ]
        found: dict[int, Candidate] = {}
        for numbers in (*alone, *together):
            options = SamplingOptions(min(tokens, rooms[numbers[0]]), temperature=0.0)
            chosen = [prompts[number] for number in numbers]
            written = candidates_of_each(
                self.model, self._decoder, self.form, chosen, options, count=1
            )
            found |= {number: one for number, (one,) in zip(numbers, written, strict=True)}
        return [found[number] for number in range(len(given))]

    def fits(self, example: Example) -> bool:
        """Whether an example fits the context."""
        return len(self.form.encode(example).ids) <= self.description.context_tokens

    def score(self, pairs: Sequence[Pair], form: Form, *, with_prior: bool = True) -> list[Score]:
        encoder = PairEncoder(self.codec, form, self.description.context_tokens)
        pool = DevicePool(self.folder, [self.device], self._dtype, self.model)
        with Scorer(encoder, pool, with_prior=with_prior) as scorer:
            return scorer.score(pairs)


Suite = Callable[[Evaluated, Evaluated | None, SuiteOptions], SuiteResult]
"""(model, forward model or None, options) -> result."""


def read_examples(
    source: str,
    limit: int | None,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
    columns: str = "",
) -> list[Example]:
    """Instruction rows.

    `columns` are as in `ExampleColumns.parse`. Raises ConfigError, BadRecordError, and
    SourceEmptyError if there are none.
    """
    found: list[Example] = []
    for example in _examples(source, max_record_bytes, ExampleColumns.parse(columns)):
        if limit is not None and len(found) >= limit:
            break
        found.append(example)
    if not found:
        raise SourceEmptyError(
            f"{source} has no instruction rows; name a file of them (JSON lines)"
        )
    return found


def _examples(source: str, max_record_bytes: int, columns: ExampleColumns) -> Iterator[Example]:
    for record in read_records(source, max_record_bytes):
        if isinstance(record, BadRecordError):
            raise record
        yield from columns.examples(record.fields, record.where)
