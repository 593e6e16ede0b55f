"""Continuous batching: each sample is the same as alone."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import PromptError
from megaback.inference.batch import ContinuousBatch, Sample, Step
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.inference.sampling import SamplingOptions
from megaback.inference.steps import finish
from tests.helpers.decoding import CODEC, CONTEXT_TOKENS, STOP_ID, decoder, prompt_of, written
from tests.helpers.small_models import VOCAB_SIZE, make_model

IDS = st.lists(st.integers(3, VOCAB_SIZE - 1), min_size=1, max_size=CONTEXT_TOKENS)
OPTIONS = st.builds(
    SamplingOptions,
    max_new_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 1.0, 1.5]),
    top_k=st.sampled_from([0, 5]),
    seed=st.integers(0, 99),
    top_p=st.sampled_from([0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    stop_ids=st.sampled_from([(), (STOP_ID,)]),
    min_new_tokens=st.sampled_from([0, 1, 3, 40]),
)


def new_batch(num_slots: int) -> ContinuousBatch:
    return ContinuousBatch(decoder(), CODEC, num_slots)


def advance(batch: ContinuousBatch) -> list[Step]:
    """A step of prefill, and a step of generation."""
    batch.read()
    return batch.step()


def text_of(steps: Sequence[Step], sample: Sample) -> list[int]:
    return [step.new_id for step in steps if step.sample is sample and not step.is_end]


@settings(max_examples=25)
@given(
    asked=st.lists(st.tuples(IDS, OPTIONS, st.integers(0, 12)), min_size=1, max_size=6),
    num_slots=st.integers(1, 4),
)
def test_a_sample_that_joins_at_any_time_is_the_same_as_alone(
    asked: list[tuple[list[int], SamplingOptions, int]], num_slots: int
) -> None:
    batch = new_batch(num_slots)
    samples = [Sample(prompt_of(ids), options) for ids, options, _ in asked]
    waiting = sorted(zip((at for *_, at in asked), samples, strict=True), key=lambda one: one[0])
    steps: list[Step] = []
    for turn in range(10_000):
        while waiting and len(batch) < num_slots and waiting[0][0] <= turn:
            batch.add(waiting.pop(0)[1])
        steps += advance(batch)
        if not waiting and not len(batch):
            break

    assert [text_of(steps, sample) for sample in samples] == [
        written([ids], options)[0] for ids, options, _ in asked
    ]
    assert all(sum(s.is_last for s in steps if s.sample is sample) == 1 for sample in samples)


@given(leaving=st.integers(0, 3), after=st.integers(0, 5))
@settings(max_examples=10)
def test_removing_a_sample_does_not_change_the_others(leaving: int, after: int) -> None:
    batch, options = new_batch(4), SamplingOptions(12, temperature=1.0, seed=3)
    samples = [Sample(prompt_of([5 + n] * (n + 1)), options) for n in range(4)]
    for sample in samples:
        batch.add(sample)
    steps = [step for _ in range(after) for step in advance(batch)]
    batch.remove(samples[leaving])
    while len(batch):
        steps += advance(batch)
    for number, sample in enumerate(samples):
        if number != leaving:
            assert text_of(steps, sample) == written([sample.prompt.ids], options)[0]


def test_other_samples_advance_during_a_prefill() -> None:
    batch, options = new_batch(3), SamplingOptions(30, min_new_tokens=30)
    first, late, last = (Sample(prompt_of([5 + n, 6, 7]), options) for n in range(3))
    batch.add(first)
    batch.read(60)
    batch.add(late)
    batch.add(last)
    while batch.num_rows < 3:  # a layer of one prompt at a time
        batch.read()
        batch.step()
    layers = len(make_model().model.layers)
    assert (first.num_new, late.num_new) == (2 * layers + 1, layers + 1)
    batch.remove(late)
    assert (len(batch), batch.num_rows) == (2, 2)


def test_samples_with_a_penalty_can_be_removed_at_any_time() -> None:
    batch, options = new_batch(3), SamplingOptions(12, repetition_penalty=1.5, min_new_tokens=12)
    samples = [Sample(prompt_of([5 + n]), replace(options, seed=n)) for n in range(3)]
    for sample in samples:
        batch.add(sample)
    batch.read(60)
    steps = batch.step()
    batch.remove(samples[0])
    while len(batch):
        steps += advance(batch)
    for sample in samples[1:]:
        assert text_of(steps, sample) == written([sample.prompt.ids], sample.options)[0]


def test_reported_probabilities_are_those_of_the_model() -> None:
    batch = new_batch(2)
    sample = Sample(prompt_of([5, 6]), SamplingOptions(6, temperature=1.5, top_k=0), 3)
    batch.add(Sample(prompt_of([9]), SamplingOptions(3)))
    batch.add(sample)
    steps = []
    while len(batch):
        steps += [step for step in advance(batch) if step.sample is sample]
    ids = [step.new_id for step in steps]
    (total,) = log_probabilities(make_model(), [Continuation([5, 6], ids)])
    assert sum(step.log_probability or 0 for step in steps) == pytest.approx(total, abs=1e-4)
    for step in steps:
        values = [value for _, value in step.likeliest]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] >= (step.log_probability or 0) - 1e-6
        assert sum(map(math.exp, values)) <= 1 + 1e-6


def test_log_probabilities_of_the_decoder_are_those_of_the_model() -> None:
    scored = finish(decoder().score_steps([5, 6], [7, 8, 9], 2))
    (total,) = log_probabilities(make_model(), [Continuation([5, 6], [7, 8, 9])])
    assert sum(nats for nats, _ in scored) == pytest.approx(total, abs=1e-4)
    for nats, ((_, first), (_, second)) in scored:
        assert first >= second
        assert first >= nats


def test_a_batch_refuses_long_prompts_and_too_many_samples() -> None:
    batch = new_batch(1)
    with pytest.raises(PromptError, match="shorten"):
        batch.add(Sample(prompt_of([5] * (CONTEXT_TOKENS + 1)), SamplingOptions()))
    assert len(batch) == 0
    batch.add(Sample(prompt_of([5]), SamplingOptions()))
    with pytest.raises(ValueError, match="in use"):
        batch.add(Sample(prompt_of([5]), SamplingOptions()))


def test_only_the_first_id_is_restricted_by_the_prompt() -> None:
    batch = new_batch(2)
    first, other = Sample(prompt_of([5], np.array([9])), SamplingOptions(5)), None
    batch.add(first)
    other = Sample(prompt_of([5], np.array([11])), SamplingOptions(5, seed=1))
    batch.add(other)
    while len(batch):
        advance(batch)
    assert (first.ids[1], other.ids[1]) == (9, 11)
    assert first.ids[2:] != [9] * 4


@settings(max_examples=25)
@given(ids=IDS, min_new_tokens=st.integers(0, 12), seed=st.integers(0, 99))
def test_no_sample_ends_before_its_minimum_of_tokens(
    ids: list[int], min_new_tokens: int, seed: int
) -> None:
    options = SamplingOptions(
        12, temperature=1.5, top_k=0, seed=seed, stop_ids=(STOP_ID,), min_new_tokens=min_new_tokens
    )
    batch = new_batch(1)
    sample = Sample(prompt_of(ids), options)
    batch.add(sample)
    while len(batch):
        advance(batch)
    assert min_new_tokens <= sample.num_new <= 12
    assert not {STOP_ID, sample.prompt.end_id} & set(sample.ids[len(ids) :])
