"""Continuous batching: samples are generated together, and join and leave at any step.

Each sample has its own options, seed and end, and is the same as alone. (The products of more rows
round differently: fp32 logits differ by about 1e-6.) Prompts are prefilled one at a time, in steps
between which the other samples advance. A sample that has filled the context drops its older half:
it waits in the same queue until its newer half is prefilled again.

Shapes: R slots, B rows in use, V vocabulary, N scored rows, S numbers of a ScoredToken.
"""

import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import PromptError
from data_pipeline.text.codec import Prompt, TextCodec
from megaback.inference.decoder import Decoder
from megaback.inference.draws import DrawStream, DrawTable
from megaback.inference.kv_cache import LayerState
from megaback.inference.sampling import SamplingOptions, choose, fetched, penalized
from megaback.inference.step_graphs import StepGraphs
from megaback.inference.steps import Steps
from megaback.inference.token_scores import ScoredToken, packed_scores, scored_token


@dataclass(eq=False)
class Sample:
    """A sample: its prompt, its options and the ids generated so far."""

    prompt: Prompt
    options: SamplingOptions
    num_likeliest: int | None = None
    """Number of likeliest ids to report per step; None reports no probabilities at all."""
    ids: list[int] = field(default_factory=list)
    """Ids of the prompt and generated ids; filled by the batch."""

    @property
    def num_new(self) -> int:
        return max(0, len(self.ids) - len(self.prompt.ids))


@dataclass(frozen=True, kw_only=True)
class Step:
    """The result of one step for one sample."""

    sample: Sample
    new_id: int
    is_end: bool
    """Whether the id ended the sample and is not part of it."""
    is_last: bool
    """Whether the sample is complete: it has ended, or has `max_new_tokens`."""
    log_probability: float | None
    """log P of the id in nats, at temperature 1, among all ids."""
    likeliest: tuple[tuple[int, float], ...]
    """The likeliest ids at this position, with their log-probabilities."""


class ReadingError(Exception):
    """Raised for a sample that was dropped because its prompt could not be read; see its cause."""

    def __init__(self, sample: Sample) -> None:
        super().__init__("a prompt could not be read")
        self.sample = sample


@dataclass(eq=False)
class _Row:
    """A sample in the batch."""

    sample: Sample
    draws: DrawStream
    choice: SamplingOptions
    """Options, equal for rows that can sample in one operation."""


@dataclass(eq=False)
class _Reading:
    """A row whose ids must be prefilled."""

    row: _Row
    ids: list[int]


class ContinuousBatch:
    """Samples that one model is generating, at most `num_slots`."""

    def __init__(self, decoder: Decoder, codec: TextCodec, num_slots: int) -> None:
        self._decoder, self.codec = decoder, codec
        self._cache = decoder.new_cache(num_slots)
        self._rows: list[_Row] = []
        self._groups: _Groups | None = None  # made when the rows have changed
        self._readings: deque[_Reading] = deque()
        self._steps_of_first: Steps[list[LayerState]] | None = None
        # On the device between steps, so that only the chosen ids are copied, and only to the host.
        self._ids_R = torch.zeros(num_slots, dtype=torch.long, device=decoder.device)
        self._draws = DrawTable(num_slots, decoder.device)
        self._added_RV = torch.zeros(num_slots, decoder.vocab_size, device=decoder.device)
        self._seen_RV: Tensor | None = None  # made for the first sample with a penalty
        self._graphs: StepGraphs | None = None
        if decoder.capture is not None:
            self._graphs = StepGraphs(decoder, self._cache, self._ids_R, decoder.capture)
        self._later: dict[tuple[int, ...], Tensor] = {}
        self._last_read: tuple[list[int], list[LayerState]] | None = None

    def __len__(self) -> int:
        return len(self._rows) + len(self._readings)

    @property
    def has_graphs(self) -> bool:
        """Whether its steps are captured, which takes longer than to clear it."""
        return self._graphs is not None

    @property
    def num_rows(self) -> int:
        """Number of prefilled samples, which advance at each step."""
        return len(self._rows)

    @property
    def num_slots(self) -> int:
        """Maximum number of samples."""
        return self._cache.num_rows

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture what can be captured before the first sample, so that memory is known then."""
        if self._graphs is not None:
            self._graphs.prepare()

    def check(self, prompt: Prompt) -> None:
        """Raises PromptError if a prompt does not fit the context."""
        context_tokens = self._decoder.context_tokens
        if len(prompt.ids) > context_tokens:
            raise PromptError(
                f"the text has {len(prompt.ids)} tokens, more than the model's context of "
                f"{context_tokens}; shorten it"
            )

    def add(self, sample: Sample) -> None:
        """Queue a sample. Raises PromptError, ConfigError for unknown `stop_ids`, and ValueError if
        all slots are in use."""
        self.check(sample.prompt)
        sample.options.require_ids(self._decoder.vocab_size)
        if len(self) == self.num_slots:
            raise ValueError(f"all {self.num_slots} slots are in use")
        sample.ids = list(sample.prompt.ids)
        options = sample.options
        choice = replace(options, seed=0, max_new_tokens=1, stop_ids=(), min_new_tokens=0)
        row = _Row(sample, DrawStream(options.seed), choice)
        self._readings.append(_Reading(row, sample.ids[:-1]))

    @torch.inference_mode()
    def remove(self, sample: Sample) -> None:
        """Cancel a sample; has no effect on one that has ended."""
        for reading in self._readings:
            if reading.row.sample is sample:
                if reading is self._readings[0]:
                    self._steps_of_first = None
                self._readings.remove(reading)
                return
        for at, row in enumerate(self._rows):
            if row.sample is sample:
                self._take(at)
                return

    @torch.inference_mode()
    def clear(self) -> None:
        """Cancel all samples."""
        self._readings.clear()
        self._steps_of_first = None
        while self._rows:
            self._take(len(self._rows) - 1)
        self._draws.restart()  # a step may have failed halfway

    @torch.inference_mode()
    def read(self, seconds: float = 0.0) -> None:
        """Prefill queued samples in their order, for a number of seconds or one step.

        Consecutive samples with the same prompt share its prefill. Raises ReadingError.
        """
        ends_s = time.monotonic() + seconds
        while self._readings:
            first = self._readings[0]
            state = self._state_after_a_step(first)
            if state is not None:
                self._readings.popleft()
                self._begin(first.row, state)
            elif time.monotonic() >= ends_s:
                return

    @torch.inference_mode()
    def step(self) -> list[Step]:
        """Sample an id for each prefilled sample; samples that end are removed."""
        if not self._rows:
            return []
        if self._groups is None:
            self._groups = _Groups.of(self._rows, self._decoder.device)
        if self._graphs is None:
            logits_BV = self._decoder.step(self._ids_R[: len(self._rows)], self._cache)
        else:
            logits_BV = self._graphs.logits()
        chosen_B = self._chosen(logits_BV, self._groups.choices)
        self._draws.advance([row.draws for row in self._rows])
        chosen = fetched(chosen_B)
        scores = _scores_of(logits_BV, chosen_B, self._groups.scored)
        steps = []
        for at, (row, new_id) in enumerate(zip(self._rows, chosen, strict=True)):
            sample = row.sample
            is_end = new_id == sample.prompt.end_id or new_id in sample.options.stop_ids
            if not is_end:
                sample.ids.append(new_id)
                if sample.num_new in (1, sample.options.min_new_tokens):
                    self._added_RV[at] = self._allowed(sample)
            is_last = is_end or sample.num_new >= sample.options.max_new_tokens
            log_probability, likeliest = scores.get(at, (None, ()))
            steps.append(
                Step(
                    sample=sample,
                    new_id=new_id,
                    is_end=is_end,
                    is_last=is_last,
                    log_probability=log_probability,
                    likeliest=likeliest,
                )
            )
        for step in steps:
            if step.is_last:
                self.remove(step.sample)
        self._forget()
        return steps

    def _state_after_a_step(self, first: _Reading) -> list[LayerState] | None:
        """Keys and values of the first in the queue, after at most one step, if then complete."""
        if self._last_read is not None and self._last_read[0] == first.ids:
            return self._last_read[1]
        try:
            if self._steps_of_first is None:
                self._steps_of_first = self._decoder.read_steps(first.ids)
            next(self._steps_of_first)
        except StopIteration as end:
            state: list[LayerState] = end.value
            self._steps_of_first, self._last_read = None, (first.ids, state)
            return state
        except Exception as error:
            self.remove(first.row.sample)
            raise ReadingError(first.row.sample) from error
        return None

    def _begin(self, row: _Row, state: list[LayerState]) -> None:
        """Add a prefilled sample to the rows."""
        sample, at = row.sample, len(self._rows)
        self._cache.add(state)
        self._rows.append(row)
        self._groups = None
        self._ids_R[at].fill_(sample.ids[-1])
        self._draws.set(at, row.draws)
        self._added_RV[at] = self._allowed(sample)
        if sample.options.repetition_penalty != 1 and self._seen_RV is None:
            self._seen_RV = torch.zeros_like(self._added_RV, dtype=torch.bool)
        if self._seen_RV is not None:
            self._seen_RV[at] = False
            self._seen_RV[at, torch.tensor(sample.ids, device=self._decoder.device)] = True

    def _take(self, at: int) -> _Row:
        """Remove a row; the last row takes its slot."""
        row, last = self._rows[at], len(self._rows) - 1
        self._cache.remove(at)
        self._rows[at] = self._rows[last]
        self._rows.pop()
        self._groups = None
        if at != last:
            self._draws.move(last, at)
            for of_rows in (self._ids_R, self._added_RV, self._seen_RV):
                if of_rows is not None:
                    of_rows[at] = of_rows[last]
        return row

    def _forget(self) -> None:
        """Requeue each row that has filled the context, with its newer half."""
        context_tokens = self._decoder.context_tokens
        for at in reversed(range(len(self._rows))):  # removing a row moves none before it
            if self._cache.lengths[at] == context_tokens:
                row = self._take(at)
                read = row.sample.ids[:-1]
                newer = self.codec.newest(read, context_tokens // 2 - 1)
                self._readings.append(_Reading(row, newer))

    def _chosen(self, logits_BV: Tensor, choices: "list[tuple[SamplingOptions, _At]]") -> Tensor:
        """An id for each row, -1 for a row without one, with which the next step begins."""
        if self._graphs is not None and len(choices) == 1:
            options = choices[0][0]

            def choose_all(logits_BV: Tensor) -> Tensor:
                return self._choose(logits_BV, [(options, slice(len(logits_BV)))])

            return self._graphs.choose(options, choose_all, self._commit)
        chosen_B = self._choose(logits_BV, choices)
        self._commit(chosen_B)
        return chosen_B

    def _commit(self, chosen_B: Tensor) -> None:
        ids_B = chosen_B.clamp(min=0)  # an unused row may have none
        self._ids_R[: len(ids_B)] = ids_B
        self._draws.advance_on_device()
        if self._seen_RV is not None:
            self._seen_RV[: len(ids_B)].scatter_(1, ids_B[:, None], True)

    def _choose(self, logits_BV: Tensor, choices: "list[tuple[SamplingOptions, _At]]") -> Tensor:
        """An id for each row; rows with equal options are sampled in one operation."""
        chosen_B = torch.empty(len(logits_BV), dtype=torch.long, device=logits_BV.device)
        for options, at in choices:
            of_group_BV = logits_BV[at]
            if options.repetition_penalty != 1 and self._seen_RV is not None:
                of_group_BV = penalized(of_group_BV, self._seen_RV[at], options.repetition_penalty)
            of_group_BV = of_group_BV + self._added_RV[at]
            chosen_B[at] = choose(of_group_BV, options, self._draws.current[at])
        return chosen_B

    def _allowed(self, sample: Sample) -> Tensor:
        """Logit mask of a sample's next id, 0 or -inf: shape (V,)."""
        allowed_V = self._later_of(sample)
        if sample.num_new == 0:
            allowed_V = self._only(sample.prompt.first_ids)
        if sample.num_new < sample.options.min_new_tokens:
            allowed_V = allowed_V.clone()
            allowed_V[[sample.prompt.end_id, *sample.options.stop_ids]] = -torch.inf
        return allowed_V

    def _later_of(self, sample: Sample) -> Tensor:
        """Logit mask of all ids of a sample after its first."""
        key = (sample.prompt.end_id, *sample.options.stop_ids)
        if key not in self._later:
            writable = self.codec.writable_ids(sample.prompt.end_id).tolist()
            self._later[key] = self._only([*writable, *sample.options.stop_ids])
        return self._later[key]

    def _only(self, ids: "Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]") -> Tensor:
        """Logit mask that allows only these ids: shape (V,)."""
        added_V = torch.full((self._decoder.vocab_size,), -torch.inf)
        added_V[torch.as_tensor(np.asarray(ids, dtype=np.int64))] = 0
        return added_V.to(self._decoder.device)


_At = Tensor | slice
"""Numbers of rows, on the device; a slice, which copies nothing, if they are all rows."""


@dataclass(frozen=True)
class _Groups:
    """Rows that are sampled or scored in one operation, by their numbers."""

    choices: list[tuple[SamplingOptions, _At]]
    scored: list[tuple[int, list[int], _At]]
    """Number of likeliest ids, and the rows that report as many."""

    @classmethod
    def of(cls, rows: Sequence[_Row], device: torch.device) -> "_Groups":
        choices: dict[SamplingOptions, list[int]] = defaultdict(list)
        scored: dict[int, list[int]] = defaultdict(list)
        for at, row in enumerate(rows):
            choices[row.choice].append(at)
            if row.sample.num_likeliest is not None:
                scored[row.sample.num_likeliest].append(at)

        def on_device(numbers: list[int]) -> _At:
            every = slice(len(rows))
            return every if len(numbers) == len(rows) else torch.tensor(numbers, device=device)

        return cls(
            [(options, on_device(numbers)) for options, numbers in choices.items()],
            [(count, numbers, on_device(numbers)) for count, numbers in scored.items()],
        )


def _scores_of(
    logits_BV: Tensor, chosen_B: Tensor, scored: list[tuple[int, list[int], _At]]
) -> dict[int, ScoredToken]:
    """Scores of the rows that report them, fetched from the device once."""
    if not scored:
        return {}
    parts = [packed_scores(logits_BV[at], chosen_B[at], count) for count, _, at in scored]
    numbers = iter(torch.cat([part_NS.flatten() for part_NS in parts]).tolist())
    return {
        row: scored_token(list(islice(numbers, 1 + 2 * count)))
        for count, rows, _ in scored
        for row in rows
    }
