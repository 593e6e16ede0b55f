"""Samples at validations: what is written, and that training does not change by them."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from data_pipeline.errors import ConfigError, PreemptedError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import TextCodec
from megaback.config import Config
from megaback.config_validation import ValidationSection
from megaback.data import open_data
from megaback.distributed.world import World
from megaback.inference.generate import complete
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT
from megaback.open_shards import OpenShards
from megaback.tracking.metrics import MACHINE_FIELDS, read_metrics
from megaback.tracking.samples_log import read_samples
from megaback.training.samples import write_samples
from tests.helpers.training import at_forward, signal_itself, train, trainer_of

Configs = Callable[..., Config]
CPU = torch.device("cpu")
ENDINGS = ("lived happily ever after.", "The end", "")
SAMPLES = {"every_steps": 2, "samples": ENDINGS, "sample_tokens": 12}


@pytest.fixture
def tiny_codec(tiny_shards: Path) -> TextCodec:
    return DataSet.open(tiny_shards).codec()


def model_of(config: Config, codec: TextCodec) -> ReverseGPT:
    model = ReverseGPT(config.model, codec.vocab_size)
    model.initialize(1)
    return model


def write(
    engine: Any, codec: TextCodec, options: SamplingOptions, rows: int = 2, step: int = 3
) -> list[list[int]]:
    prompts = [codec.prompt(ending) for ending in ENDINGS]
    return write_samples(engine, prompts, codec, options, step, rows, CPU, lambda: None)


def test_the_most_likely_samples_are_those_of_inference(
    config_of: Configs, tiny_codec: TextCodec
) -> None:
    model = model_of(config_of(), tiny_codec)
    options = SamplingOptions(max_new_tokens=12, temperature=0)

    samples = write(model, tiny_codec, options)

    for ending, new_ids in zip(ENDINGS, samples, strict=True):
        ids = [*tiny_codec.prompt(ending).ids, *new_ids]
        assert tiny_codec.render(ids) == complete(model, tiny_codec, ending, 64, options)
    assert model.training


def test_a_sample_depends_on_seed_step_and_its_place_only(
    config_of: Configs, tiny_codec: TextCodec
) -> None:
    model = model_of(config_of(), tiny_codec)
    options = SamplingOptions(max_new_tokens=12, seed=5)
    torch.manual_seed(9)
    np.random.seed(9)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]

    alone = write(model, tiny_codec, options, rows=1)
    together = write(model, tiny_codec, options, rows=3)

    assert alone == together
    assert write(model, tiny_codec, options, step=4) != alone
    assert write(model, tiny_codec, SamplingOptions(max_new_tokens=12, seed=6)) != alone
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state(legacy=False)["state"]["key"]).all()
    assert all(weight.grad is None for weight in model.parameters())


def test_every_rank_computes_the_same_number_of_passes(
    config_of: Configs, tiny_codec: TextCodec
) -> None:
    """Also if samples end: at ZeRO stage 3 the ranks gather weights together."""
    passes = 0

    class Ending(ReverseGPT):
        def forward(self, *arguments: Any) -> Tensor:
            nonlocal passes
            passes += 1
            logits_BV = super().forward(*arguments)
            logits_BV[:, tiny_codec.end_id] = 1e6
            return logits_BV

    model = Ending(config_of().model, tiny_codec.vocab_size)

    samples = write(model, tiny_codec, SamplingOptions(max_new_tokens=12), rows=2)

    assert max(map(len, samples)) == 1  # the piece that a prompt holds back
    assert passes == 2 * 12


def test_a_diverged_model_ends_its_samples(config_of: Configs, tiny_codec: TextCodec) -> None:
    model = model_of(config_of(), tiny_codec)
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)

    assert write(model, tiny_codec, SamplingOptions(max_new_tokens=4)) == [[], [], []]


def lines_of(config: Config) -> list[dict[str, Any]]:
    """Metrics without those of the machine."""
    return [
        {name: value for name, value in line.items() if name not in MACHINE_FIELDS}
        for line in read_metrics(config.run)
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_is_the_same_with_samples(
    stage: int, config_of: Configs, training_world: World
) -> None:
    sections = {"zero": {"stage": stage}, "optimizer": {"learning_rate": 0.01}}
    without = config_of("without", validation={"every_steps": 2}, **sections)
    config = config_of("with", validation=SAMPLES, **sections)

    train(without, training_world)
    train(config, training_world)

    assert lines_of(config) == lines_of(without)
    assert not (without.run / "samples.jsonl").exists()
    samples = read_samples(config.run)
    assert [line["step"] for line in samples] == [0] * 3 + [2] * 3 + [4] * 3
    assert [line["given"] for line in samples] == list(ENDINGS) * 3
    assert all(line["text"].endswith(line["given"]) for line in samples)
    assert samples[0]["text"] != samples[3]["text"]
    timed = [line for line in read_metrics(config.run) if "sample_s" in line]
    assert [line["step"] for line in timed] == [0, 2, 4]
    assert all(line["sample_s"] > 0 for line in timed)


def test_a_resumed_run_has_the_samples_of_an_uninterrupted_one(
    config_of: Configs, training_world: World
) -> None:
    whole = config_of("whole", validation=SAMPLES)
    train(whole, training_world)
    config = config_of(validation=SAMPLES, checkpoint={"every_steps": 1})
    with trainer_of(config, training_world) as (trainer, run):
        at_forward(run, 2 * 2 + 1, signal_itself(signal.SIGTERM))
        with pytest.raises(PreemptedError):
            trainer.train()
    newer = '{"step": 4, "given": "", "text": "of steps that were lost"}\n{"step": 4, "gi'
    with (config.run / "samples.jsonl").open("a") as file:
        file.write(newer)

    train(config, training_world)

    assert read_samples(config.run) == read_samples(whole.run)


def test_texts_that_do_not_fit_the_context_are_refused(config_of: Configs) -> None:
    config = config_of(validation={"samples": ["short", "word " * 60], "sample_tokens": 12})

    with pytest.raises(ConfigError, match=r"validation.samples\[1\] is read as .* of batch"):
        open_data(config, 0, 1)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ("The end", "give a list of texts"),
        (["."] * 101, "there are 101; give at most 100"),
        (["." * 10_001], "one has 10,001 characters; give texts of at most 10,000"),
    ],
)
def test_samples_of_other_forms_are_refused(samples: object, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ValidationSection.model_validate({"samples": samples})


def test_samples_without_a_val_set_are_refused(
    config_of: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenShards, "val_rows", lambda *_: ())

    with pytest.raises(ConfigError, match=r"validation.samples needs a val set"):
        open_data(config_of(validation={"samples": ["The end"]}), 0, 1)


def test_samples_of_a_forward_run_begin_with_the_given_text(
    config_of: Configs, tiny_shards: Path
) -> None:
    data = {"shards": str(tiny_shards), "direction": "forward"}
    config = config_of(data=data, validation={"samples": ["Once upon"], "sample_tokens": 12})
    given = open_data(config, 0, 1).given

    new_ids = write_samples(
        model_of(config, given.codec),
        given.prompts,
        given.codec,
        SamplingOptions(max_new_tokens=12),
        0,
        1,
        CPU,
        lambda: None,
    )

    assert given.whole(0, new_ids[0]).startswith("Once upon")
