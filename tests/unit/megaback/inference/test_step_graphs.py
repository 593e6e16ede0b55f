"""Steps as graphs write what steps without them write, and cost two launches.

A token of 12 layers in bf16 took 288 kernels; as graphs it takes 2, and the copy of its id.
"""

import random
from dataclasses import replace

import pytest
import torch

from megaback.inference.batch import ContinuousBatch, Sample, Step
from megaback.inference.cuda_graph import Work
from megaback.inference.decoder import Decoder
from megaback.inference.generate import sample_many
from megaback.inference.sampling import SamplingOptions
from tests.helpers.decoding import CODEC, CONTEXT_TOKENS, STOP_ID, prompt_of
from tests.helpers.fake_gpu import counted, fake_capture, moved, on_fake_gpu
from tests.helpers.fake_graphs import FakeCapture
from tests.helpers.small_models import make_model

OPTIONS = [
    SamplingOptions(temperature=0.8, top_k=5),
    SamplingOptions(temperature=0),
    SamplingOptions(top_p=0.9, min_p=0.01),
    SamplingOptions(top_k=0, repetition_penalty=1.3),
    SamplingOptions(stop_ids=(STOP_ID,), min_new_tokens=4),
]


@pytest.fixture(autouse=True)
def _captures_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megaback.inference.step_graphs._USES_BEFORE_CAPTURE", 2)
    monkeypatch.setattr("megaback.inference.step_graphs._MIN_SLOTS", 6)


def plain_decoder(**changes: object) -> Decoder:
    return Decoder(make_model(**changes), CONTEXT_TOKENS)


def captured_decoder(dtype: torch.dtype = torch.float32, **changes: object) -> Decoder:
    by = Decoder(moved(make_model(**changes).to(dtype)), CONTEXT_TOKENS)
    by.capture = fake_capture()
    return by


def visits(by: Decoder, seed: int) -> list[Step]:
    """The steps of samples that join and leave a batch of five slots at random."""
    generator = random.Random(seed)
    batch = ContinuousBatch(by, CODEC, 5)
    waiting = [
        Sample(
            prompt_of([generator.randrange(5, 40) for _ in range(generator.randrange(1, 9))]),
            replace(
                generator.choice(OPTIONS),
                max_new_tokens=generator.choice((3, 12, 30)),
                seed=number,
            ),
            generator.choice((None, None, 0, 3)),
        )
        for number in range(14)
    ]
    steps: list[Step] = []
    running: list[Sample] = []
    while waiting or len(batch):
        while waiting and len(batch) < 5 and generator.random() < 0.4:
            running.append(waiting.pop())
            batch.add(running[-1])
        if running and generator.random() < 0.03:
            batch.remove(running.pop(0))
        batch.read()
        steps += batch.step()
    return steps


@pytest.mark.parametrize("seed", range(2))
@on_fake_gpu
def test_samples_that_join_and_leave_are_those_of_steps_without_graphs(seed: int) -> None:
    expected = visits(plain_decoder(), seed)
    by = captured_decoder()

    found = visits(by, seed)

    assert [step.new_id for step in found] == [step.new_id for step in expected]
    assert [step.is_last for step in found] == [step.is_last for step in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.log_probability or 0) == pytest.approx(other.log_probability or 0, abs=1e-5)
        assert [an_id for an_id, _ in one.likeliest] == [an_id for an_id, _ in other.likeliest]
    assert isinstance(by.capture, FakeCapture)
    assert by.capture.num_graphs > 6, "too few were captured to be tested"


@pytest.mark.parametrize("options", OPTIONS[2:4])
@on_fake_gpu
def test_a_batch_past_the_context_is_that_of_steps_without_graphs(
    options: SamplingOptions,
) -> None:
    options = replace(options, max_new_tokens=CONTEXT_TOKENS + 6)
    prompts = [prompt_of(ids) for ids in ([5, 6, 7], [8], [9, 10, 11, 12])]
    by = captured_decoder()

    found = [sample_many(by, CODEC, prompts[:rows], options) for rows in (3, 2)]

    expected = [sample_many(plain_decoder(), CODEC, prompts[:rows], options) for rows in (3, 2)]
    assert found == expected
    assert by.idle_batch is not None, "the graphs of the first batch serve the next ones"


def endless(number: int) -> Sample:
    options = SamplingOptions(max_new_tokens=1000, min_new_tokens=1000, seed=number)
    return Sample(prompt_of([5 + number]), options)


@pytest.mark.parametrize("rows", [1, 3])
@on_fake_gpu
def test_a_token_is_two_launches_and_one_copy(rows: int) -> None:
    batch = ContinuousBatch(captured_decoder(num_layers=3), CODEC, 4)
    batch.prepare()
    for number in range(rows):
        batch.add(endless(number))
    batch.read(60)
    for _ in range(4):
        batch.step()

    with counted() as traffic:
        batch.step()

    assert traffic.kernels == {"graph": 2}, traffic
    assert traffic.to_device == [], traffic
    assert len(traffic.syncs) == 1, traffic
    assert len(traffic.to_host) <= 1, traffic


@on_fake_gpu
def test_all_shapes_are_captured_before_the_first_sample_the_largest_first() -> None:
    by = captured_decoder()
    batch = ContinuousBatch(by, CODEC, 6)

    batch.prepare()

    assert batch._graphs is not None
    assert list(batch._graphs._steps) == [
        (rows, slots) for rows in (6, 4, 2, 1) for slots in (24, 12, 6)
    ]


@on_fake_gpu
def test_without_memory_for_graphs_text_is_written_without_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    by = captured_decoder()
    recorded = by.capture
    assert recorded is not None
    calls: list[int] = []

    def fails_at_the_third(compute: Work, commit: Work) -> Work:
        calls.append(1)
        if len(calls) == 3:
            compute()
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 MiB")
        assert len(calls) < 3, "it does not try again"
        return recorded(compute, commit)

    by.capture = fails_at_the_third

    assert [step.new_id for step in visits(by, 1)] == [
        step.new_id for step in visits(plain_decoder(), 1)
    ]
    (message,) = [one.getMessage() for one in caplog.records]
    assert "could not be captured (CUDA out of memory. Tried to allocate 2 MiB)" in message


@on_fake_gpu
def test_a_failed_step_does_not_disturb_later_samples() -> None:
    by = captured_decoder()
    batch = ContinuousBatch(by, CODEC, 4)
    for number in range(3):
        batch.add(endless(number))
    batch.read(60)
    for _ in range(5):
        batch.step()
    norm_D, damaged_D = by._norm_D, by._norm_D.clone()
    by._norm_D.fill_(torch.nan)
    with pytest.raises(Exception, match="non-finite"):
        batch.step()
    norm_D.copy_(damaged_D)
    batch.clear()

    sample = endless(3)
    batch.add(sample)
    batch.read(60)
    for _ in range(20):
        batch.step()

    options = replace(sample.options, max_new_tokens=20, min_new_tokens=20)
    (expected,) = sample_many(plain_decoder(), CODEC, [sample.prompt], options)
    assert sample.ids[1:] == expected
