"""Decoding and scoring on a fake GPU: what the host sends, and when it waits.

Before ids, lengths and random numbers stayed on the device, a token of 12 layers in bf16 took 358
kernels, 3 copies to the device and 4 waits, and of 4 rows that report probabilities 370, 5 and 18.
Now it takes 288, 0 and 1, and 297, 0 and 2, and as graphs (test_step_graphs.py) 2, 0 and 1.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megaback.inference.batch import ContinuousBatch, Sample, Step
from megaback.inference.decoder import Decoder
from megaback.inference.device_pool import DevicePool
from megaback.inference.generate import sample_many
from megaback.inference.infill.join_scores import Half, score_half_steps
from megaback.inference.likelihood import (
    Continuation,
    log_probabilities,
    log_probability_steps,
)
from megaback.inference.sampling import SamplingOptions
from megaback.inference.steps import finish
from tests.helpers.decoding import CODEC, CONTEXT_TOKENS, decoder, prompt_of, written
from tests.helpers.device_traffic import Traffic
from tests.helpers.fake_gpu import counted, gpu, moved, on_fake_gpu
from tests.helpers.small_models import make_model

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 14]]
WAYS = {
    "one row": (1, SamplingOptions(temperature=0.8, top_k=5)),
    "greedy": (3, SamplingOptions(temperature=0)),
    "top_p": (3, SamplingOptions(top_p=0.9, min_p=0.01)),
    "penalty": (3, SamplingOptions(top_k=0, repetition_penalty=1.3)),
}


def on_gpu(dtype: torch.dtype = torch.float32, **changes: object) -> Decoder:
    return Decoder(moved(make_model(**changes).to(dtype)), CONTEXT_TOKENS)


def filled(by: Decoder, samples: list[Sample]) -> ContinuousBatch:
    """A batch that has prefilled its samples, and is past their first steps."""
    batch = ContinuousBatch(by, CODEC, len(samples))
    for sample in samples:
        batch.add(sample)
    batch.read(60)
    batch.step()
    batch.step()
    return batch


def endless(options: SamplingOptions, number: int = 0) -> Sample:
    """A sample that no end marker ends."""
    options = replace(options, max_new_tokens=1000, min_new_tokens=1000, seed=number)
    return Sample(prompt_of(PROMPTS[number]), options)


def token_traffic(batch: ContinuousBatch, steps: int = 6) -> tuple[Traffic, list[list[Step]]]:
    with counted() as traffic:
        taken = [batch.step() for _ in range(steps)]
    return traffic, taken


@pytest.mark.parametrize(("rows", "options"), WAYS.values(), ids=WAYS)
@on_fake_gpu
def test_a_token_copies_its_ids_to_the_host_and_nothing_to_the_device(
    rows: int, options: SamplingOptions
) -> None:
    batch = filled(on_gpu(), [endless(options, number) for number in range(rows)])

    traffic, _ = token_traffic(batch)

    assert traffic.to_device == [], traffic
    assert len(traffic.syncs) == 6, traffic
    assert all("in fetched, megaback/inference/sampling.py" in sync for sync in traffic.syncs)


@on_fake_gpu
def test_rows_with_different_options_are_fetched_together() -> None:
    ways = [options for _, options in WAYS.values()]
    batch = filled(on_gpu(), [endless(options, at) for at, options in enumerate(ways)])

    traffic, _ = token_traffic(batch)

    assert traffic.to_device == [], traffic
    assert len(traffic.syncs) == 6, traffic


@on_fake_gpu
def test_probabilities_of_all_rows_are_one_more_copy_to_the_host() -> None:
    samples = [endless(SamplingOptions(), number) for number in range(4)]
    for sample, count in zip(samples, (0, 3, None, 3), strict=True):
        sample.num_likeliest = count
    batch = filled(on_gpu(), samples)

    traffic, steps = token_traffic(batch)

    assert traffic.to_device == [], traffic
    assert len(traffic.syncs) == 12, traffic
    assert [len(step.likeliest) for step in steps[-1]] == [0, 3, 0, 3]


@on_fake_gpu
def test_random_numbers_are_sent_once_in_64_tokens() -> None:
    batch = ContinuousBatch(Decoder(moved(make_model(num_layers=1)), 100), CODEC, 1)
    batch.add(endless(SamplingOptions()))
    batch.read(60)
    batch.step()
    batch.step()

    traffic, _ = token_traffic(batch, 64)

    assert len(traffic.to_device) == 1, traffic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@on_fake_gpu
def test_the_kernels_of_a_token_are_bounded(dtype: torch.dtype) -> None:
    kernels = []
    for num_layers in (1, 3):
        by = on_gpu(dtype, num_layers=num_layers)
        batch = filled(by, [endless(SamplingOptions())])
        traffic, _ = token_traffic(batch, 1)
        kernels.append(traffic.num_kernels)

    per_layer = (kernels[1] - kernels[0]) / 2
    assert per_layer <= (20 if dtype is torch.float32 else 22), traffic
    assert kernels[0] - per_layer <= 24, traffic


@on_fake_gpu
def test_samples_and_scores_are_those_of_the_cpu() -> None:
    for name in ("top_p", "penalty"):
        options = replace(WAYS[name][1], max_new_tokens=CONTEXT_TOKENS, seed=3)
        expected = written(PROMPTS, options)
        prompts = [prompt_of(ids) for ids in PROMPTS]
        assert sample_many(on_gpu(), CODEC, prompts, options) == expected
    continuations = [Continuation(ids, [20, 21, 22]) for ids in PROMPTS]
    expected_scores = log_probabilities(make_model(), continuations)
    assert decoder().device.type == "cpu"

    model = moved(make_model())
    with counted() as traffic:
        scores = log_probabilities(model, continuations)

    assert scores == pytest.approx(expected_scores, abs=1e-5)
    # Of the whole pack: its ids, positions, segments and targets, and the result.
    assert len(traffic.to_device) == 4 + 2, traffic  # two are of sdpa's groups
    assert len(traffic.to_host) == len(traffic.syncs) == 1, traffic


CONTINUATIONS = [
    Continuation([5 + at, 6], [20 + at % 7 + place for place in range(1 + at % 5)])
    for at in range(24)
]


@on_fake_gpu
def test_a_pass_is_waited_for_while_the_next_one_computes() -> None:
    model = moved(make_model())
    expected = log_probabilities(make_model(), CONTINUATIONS)

    with counted() as traffic:
        found = finish(log_probability_steps(model, CONTINUATIONS, tokens_at_once=16))

    assert found == pytest.approx(expected, abs=1e-5)
    passes = len(traffic.to_host)
    assert passes > 5, traffic
    assert len(traffic.syncs) == passes, traffic
    assert all("in result, megaback/model/sending.py" in sync for sync in traffic.syncs), traffic


@on_fake_gpu
def test_a_pool_of_one_device_waits_once_per_batch_and_returns_them_in_order() -> None:
    model = moved(make_model())
    expected = log_probabilities(make_model(), CONTINUATIONS)
    batches = [CONTINUATIONS[start : start + 6] for start in range(0, 24, 6)]

    with counted() as traffic, DevicePool(Path(), [gpu()], torch.float32, model) as pool:
        running = [pool.submit(batch) for batch in batches]
        assert len(traffic.syncs) == 2, traffic  # the last two are still computing
        found = [pool.result(future) for future in running]

    assert [one for batch in found for one in batch] == pytest.approx(expected, abs=1e-5)
    assert len(traffic.syncs) == len(batches), traffic


@on_fake_gpu
def test_the_tables_of_an_infill_are_waited_for_once_per_pass() -> None:
    halves = [Half((20 + at, 21, 22 + at)) for at in range(6)]
    expected = finish(score_half_steps(make_model(), [5, 6], halves, [7, 8], halves))

    model = moved(make_model())
    with counted() as traffic:
        found = finish(score_half_steps(model, [5, 6], halves, [7, 8], halves))

    assert found.next_IAC == pytest.approx(expected.next_IAC, abs=1e-5)
    assert found.own_IA == pytest.approx(expected.own_IA, abs=1e-5)
    assert found.rest_JB == pytest.approx(expected.rest_JB, abs=1e-5)
    assert len(traffic.syncs) == 2, traffic  # of its own halves, and of the others


@on_fake_gpu
def test_an_added_synchronization_per_token_is_found() -> None:
    by = on_gpu()
    batch = filled(by, [endless(SamplingOptions())])
    step = by.step

    def slower(ids_B: torch.Tensor, cache: object) -> torch.Tensor:
        logits_BV = step(ids_B, cache)  # type: ignore[arg-type]
        assert bool(logits_BV.isfinite().any())
        return logits_BV + torch.tensor([0.0], device=logits_BV.device)

    by.step = slower  # type: ignore[method-assign,assignment]
    traffic, _ = token_traffic(batch)

    assert len(traffic.syncs) == 18
    assert len(traffic.to_device) == 6
    assert "_local_scalar_dense in slower" in traffic.syncs[0]
