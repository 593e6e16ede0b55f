"""Batches and validation on a fake GPU: what is copied, and when the host waits."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from megaback.training.device_batches import DeviceBatches
from megaback.training.suites import Text, measure_suites
from megaback.training.validation import evaluate, to_device
from tests.helpers.fake_gpu import counted, gpu, moved, on_fake_gpu
from tests.helpers.small_models import CPU, VOCAB_SIZE, make_model, random_ids

LENGTHS = (7, 1, 12)
CONTEXT_TOKENS = 20


def batch(seed: int = 0) -> Batch:
    targets_T = random_ids(sum(LENGTHS), 10 + seed).numpy().copy()
    targets_T[-1] = IGNORED_TARGET
    return Batch(
        ids_T=random_ids(sum(LENGTHS), seed).numpy(),
        targets_T=targets_T,
        cu_seqlens=np.array([0, *np.cumsum(LENGTHS)], dtype=np.int32),
        num_targets=sum(LENGTHS) - 1,
        num_skipped_rows=0,
    )


def world_on(device: torch.device) -> Any:
    """One rank."""
    return SimpleNamespace(
        rank=0,
        size=1,
        device=device,
        begin_sum=lambda *values: SimpleNamespace(result=lambda: list(values)),
        sum=lambda *values: list(values),
    )


def listed(arguments: Any) -> list[list[int]]:
    ids_T, targets_T, positions_T, segments = arguments
    return [one.tolist() for one in (ids_T, targets_T, positions_T, segments.cu_seqlens)]


@on_fake_gpu
def test_a_batch_is_sent_from_pinned_memory_without_a_wait() -> None:
    with counted() as traffic:
        arguments = to_device(batch(), gpu())

    assert traffic.syncs == [], traffic
    assert len(traffic.to_device) == 3, traffic
    assert traffic.num_kernels <= 8, traffic
    assert listed(arguments) == listed(to_device(batch(), CPU))


@on_fake_gpu
def test_a_batch_is_sent_while_the_one_before_it_computes() -> None:
    """Also the first one of the next step."""
    batches = [batch(seed) for seed in range(6)]
    sending = DeviceBatches(gpu(), partial(to_device, device=gpu()))
    steps = (batches[:2], batches[2:4], batches[5:], [])
    arrived, copies = [], []
    with counted() as traffic:
        for micro_batches, following in pairwise(steps):
            for one, arguments in sending.take(micro_batches, following):
                arrived.append((one, arguments))
                copies.append(len(traffic.to_device))

    assert traffic.syncs == [], traffic
    # The first one is sent when it is due, any other after the one before it.
    assert copies == [3, 6, 9, 12, 15]
    assert len(traffic.to_device) == 15, traffic
    for one, arguments in arrived:
        assert listed(arguments) == listed(to_device(one, CPU))


@on_fake_gpu
def test_a_batch_that_was_sent_and_skipped_is_not_used() -> None:
    first, skipped, due = batch(0), batch(1), batch(2)
    sending = DeviceBatches(gpu(), partial(to_device, device=gpu()))
    list(sending.take([first], [skipped]))

    ((_, arguments),) = sending.take([due], [])

    assert listed(arguments) == listed(to_device(due, CPU))


def test_on_a_cpu_a_batch_is_converted_when_it_is_due() -> None:
    due: list[Batch] = []

    def convert(one: Batch) -> Any:
        due.append(one)
        return to_device(one, CPU)

    batches = [batch(seed) for seed in range(3)]

    for number, (one, _) in enumerate(DeviceBatches(CPU, convert).take(batches[:2], batches[2:])):
        assert one is batches[number]
        assert len(due) == number + 1
    assert len(due) == 2


@on_fake_gpu
def test_validation_is_that_of_the_cpu_and_waits_for_a_batch_while_the_next_one_computes() -> None:
    def measured(model: torch.nn.Module, device: torch.device) -> float:
        sizes, batches = np.ones(VOCAB_SIZE, dtype=np.int64), [batch(seed) for seed in range(3)]
        world = world_on(device)
        found = evaluate(model, batches, CONTEXT_TOKENS, sizes, world, lambda: None)
        return found.whole.nats_per_token

    expected, model = measured(make_model(), CPU), moved(make_model())
    waits: list[int] = []
    with counted() as traffic:
        model.register_forward_pre_hook(lambda *_: waits.append(len(traffic.syncs)))
        found = measured(model, gpu())

    assert found == pytest.approx(expected, abs=1e-5)
    assert len(traffic.to_host) == len(traffic.syncs) == 3, traffic
    assert all("in result, megaback/model/sending.py" in sync for sync in traffic.syncs), traffic
    assert waits == [0, 0, 1]


@on_fake_gpu
def test_suites_are_those_of_the_cpu_and_wait_for_a_pass_while_the_next_one_computes() -> None:
    texts: list[Text] = [((0, 5, number), (7, 8 + number)) for number in range(6)]
    passes = [[0, 1], [2], [3, 4, 5]]
    suites: Any = SimpleNamespace(texts=texts, passes=passes, results=lambda scores_2S: scores_2S)

    def measured(model: torch.nn.Module, device: torch.device) -> Any:
        world = world_on(device)
        return measure_suites(model, suites, world, lambda: None, lambda: False)

    expected, model = measured(make_model(), CPU), moved(make_model())
    waits: list[int] = []
    with counted() as traffic:
        model.register_forward_pre_hook(lambda *_: waits.append(len(traffic.syncs)))
        found = measured(model, gpu())

    assert (expected < 0).all()
    assert found == pytest.approx(expected, abs=1e-5)
    assert len(traffic.to_host) == len(traffic.syncs) == 3, traffic
    assert waits == [0, 0, 1]
