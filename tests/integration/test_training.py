"""Real runs of two ranks over gloo: their losses and their files."""

import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from megaback.model.gpt import ReverseGPT
from megaback.weights.model_folder import load_model_folder
from tests.helpers.paths import SHARED
from tests.helpers.stored import read_weights
from tests.helpers.tiny_run import (
    FORWARD,
    TOTAL_STEPS,
    PlainMeasure,
    PlainResult,
    curve_of,
    measure_plainly,
    metrics_of,
    read_run_config,
    tiny_config,
    train_plainly,
    val_losses_of,
)

pytestmark = pytest.mark.slow

STAGES = [0, 1, 2, 3]
SHORT = ("training.steps=40",)
"""Overrides of runs at stages other than 1, which other tests train for 100 steps."""
ENDING = "  and so\tit ended – in 1871 ☃.\n\nThe end "
# Real English, if a parquet file with a column `text` is beside this repository.
PROSE = Path(
    os.environ.get(
        "MEGABACK_TEST_PROSE",
        SHARED / "corpora/prose/train-00003.parquet",
    )
)

Command = Callable[..., "subprocess.CompletedProcess[str]"]
RunOf = Callable[..., Path]
ModelOf = Callable[[Path], Path]


def largest_difference(left: list[float], right: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(left, right, strict=True))


def length_at(stage: int) -> tuple[str, ...]:
    return () if stage == 1 else SHORT


@pytest.fixture(scope="module")
def plain_at(plain: PlainResult, tiny_shards: Path) -> Callable[[int], PlainResult]:
    """`plain_at(stage)`: the plain loop of the stage's run."""
    short = cache(lambda: train_plainly(read_run_config(tiny_shards, *SHORT)))
    return lambda stage: plain if stage == 1 else short()


@pytest.mark.parametrize("stage", STAGES)
def test_losses_are_those_of_a_plain_loop(
    stage: int, run_of: RunOf, plain_at: Callable[[int], PlainResult]
) -> None:
    losses = curve_of(run_of(f"zero.stage={stage}", *length_at(stage)))

    assert largest_difference(losses, plain_at(stage).losses) < 1e-3


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_norms_before_clipping_are_those_of_a_plain_loop(
    stage: int, run_of: RunOf, plain_at: Callable[[int], PlainResult]
) -> None:
    norms = curve_of(run_of(f"zero.stage={stage}", *length_at(stage)), "gradient_norm")

    assert norms == pytest.approx(plain_at(stage).gradient_norms, rel=2e-3)


def test_the_learning_rates_that_are_logged_are_those_of_the_schedule(
    run_of: RunOf, plain: PlainResult
) -> None:
    assert curve_of(run_of("zero.stage=1"), "learning_rate") == plain.learning_rates


def test_the_runs_that_are_compared_clip_most_gradients(plain: PlainResult) -> None:
    assert sum(norm > 0.5 for norm in plain.gradient_norms) > TOTAL_STEPS / 2


def test_the_runs_that_are_compared_accumulate(run_of: RunOf) -> None:
    output = (run_of("zero.stage=1") / "output.txt").read_text()

    assert "2 rows x 64 tokens x 2 ranks x 2 accumulation = 512 tokens" in output


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_learns_what_fp32_learns_to_a_few_percent(
    stage: int, run_of: RunOf, plain_at: Callable[[int], PlainResult]
) -> None:
    losses = curve_of(run_of(f"zero.stage={stage}", *SHORT, "training.precision=bf16"))

    assert sum(losses[-10:]) == pytest.approx(sum(plain_at(stage).losses[-10:]), rel=0.03)


def test_one_rank_gives_the_loss_curve_of_two(run_of: RunOf, lonely_run_of: RunOf) -> None:
    one, two = curve_of(lonely_run_of("zero.stage=1")), curve_of(run_of("zero.stage=1"))

    assert largest_difference(one, two) < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_the_logged_val_loss_is_that_of_the_converted_model(
    stage: int, run_of: RunOf, model_of: ModelOf, tiny_shards: Path
) -> None:
    run = run_of(f"zero.stage={stage}", *length_at(stage))

    measured = measure(model_of(run), tiny_shards)

    losses = val_losses_of(run)
    assert measured.loss == pytest.approx(losses[max(losses)], abs=1e-5)


def measure(folder: Path, shards: Path) -> PlainMeasure:
    model, description, _ = load_model_folder(folder, torch.device("cpu"))
    return measure_plainly(model, shards, description.context_tokens)


def test_validation_counts_the_targets_and_bytes_of_the_whole_val_set(
    run_of: RunOf, model_of: ModelOf, tiny_shards: Path
) -> None:
    measured = measure(model_of(run_of("zero.stage=1")), tiny_shards)

    logged = metrics_of(run_of("zero.stage=1"))[-1]
    assert logged["val_targets"] == measured.num_targets
    assert logged["val_bits_per_byte"] == pytest.approx(measured.bits_per_byte, abs=1e-5)


def test_validation_reports_the_loss_by_context_length(
    run_of: RunOf, model_of: ModelOf, tiny_shards: Path
) -> None:
    measured = measure(model_of(run_of("zero.stage=1")), tiny_shards).nats_of_context

    logged = metrics_of(run_of("zero.stage=1"))[-1]["val_by_context"]
    assert sum(bucket["targets"] for bucket in logged.values()) == sum(map(len, measured.values()))
    for name, bucket in logged.items():
        first, _, last = name.partition("-")
        contexts = range(int(first), int(last or first) + 1)
        nats = [value for context in contexts for value in measured.get(context, [])]
        assert bucket["targets"] == len(nats)
        assert bucket["loss"] == pytest.approx(sum(nats) / len(nats), abs=1e-4)


def test_validation_is_done_at_the_start_at_the_end_and_when_it_is_due(run_of: RunOf) -> None:
    assert list(val_losses_of(run_of("zero.stage=1"))) == [0, 50, TOTAL_STEPS]


def test_the_first_validation_is_of_the_model_as_it_was_initialized(
    run_of: RunOf, tiny_shards: Path
) -> None:
    config = read_run_config(tiny_shards)
    model = ReverseGPT(config.model, 600)
    model.initialize(config.training.seed)

    expected = measure_plainly(model, tiny_shards, config.batch.context_tokens).loss

    assert val_losses_of(run_of("zero.stage=1"))[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_converted_model_has_the_weights_of_the_plain_loop(
    stage: int, run_of: RunOf, model_of: ModelOf, plain_at: Callable[[int], PlainResult]
) -> None:
    weights = read_weights(model_of(run_of(f"zero.stage={stage}", *length_at(stage))))

    expected = plain_at(stage).model.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-3, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_bf16_run_converts_to_its_fp32_master_weights(
    stage: int, run_of: RunOf, model_of: ModelOf
) -> None:
    run = run_of(f"zero.stage={stage}", *SHORT, "training.precision=bf16")

    weights = read_weights(model_of(run))

    head = weights["lm_head.weight"]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())


# Other ways to train.


def test_epochs_decide_the_number_of_steps(lonely_run_of: RunOf, tiny_shards: Path) -> None:
    rows = -(-Manifest.load(tiny_shards).total("train")["tokens"] // 64)

    steps = len(curve_of(lonely_run_of(*FORWARD)))

    assert 1.5 * rows / 8 <= steps <= 1.05 * 1.5 * rows / 8 + 1


def test_backward_shards_train_a_forward_model(lonely_run_of: RunOf) -> None:
    losses = curve_of(lonely_run_of(*FORWARD))

    assert losses[0] == pytest.approx(6.39, abs=0.1)
    assert losses[-1] < 3.5


def test_a_forward_model_is_reported_as_forward(lonely_run_of: RunOf, model_of: ModelOf) -> None:
    _, _, codec = load_model_folder(model_of(lonely_run_of(*FORWARD)), torch.device("cpu"))

    assert codec.format.direction is Direction.FORWARD


@pytest.fixture(scope="module")
def prose_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real English, in frames of 4,096 tokens."""
    if not PROSE.is_file():
        pytest.skip("there is no parquet file of real prose; MEGABACK_TEST_PROSE may name one")
    folder = tmp_path_factory.mktemp("prose")
    train_tokenizer(str(PROSE), folder, 1000, max_bytes=1_000_000)
    codec = TextCodec.load(folder / TOKENIZER_NAME, Direction.BACKWARD, Unit.TOKEN)
    settings = BuildSettings(
        (WeightedSource(str(PROSE)),),
        codec.format.tokenizer_sha256,
        val_fraction=0.002,
        frame_tokens=4096,
    )
    build_shards(settings, codec, folder / "shards", workers=1)
    return folder / "shards"


@pytest.fixture(scope="module")
def plain_prose(prose_shards: Path) -> PlainResult:
    return train_plainly(read_run_config(prose_shards))


def test_100_steps_on_real_prose_give_the_loss_curve_of_a_plain_loop(
    run_of: RunOf, prose_shards: Path, plain_prose: PlainResult
) -> None:
    losses = curve_of(run_of(f"data.shards={prose_shards}", "zero.stage=1"))

    assert largest_difference(losses, plain_prose.losses) < 1e-3


# What a trained model writes.


@pytest.fixture(scope="module")
def sample(run_of: RunOf, model_of: ModelOf, run_megaback: Command) -> Callable[..., str]:
    """`sample(*options, again=False)`: what `megaback sample` prints for the ending."""

    @cache
    def print_sample(*options: str, again: bool = False) -> str:
        result = run_megaback(
            "sample",
            model_of(run_of("zero.stage=1")),
            "--ending",
            ENDING,
            "--max-new-tokens",
            "40",
            *options,
        )
        assert result.returncode == 0, result.stderr
        return str(result.stdout)

    return print_sample


def test_a_sample_ends_with_the_ending_byte_for_byte(sample: Callable[..., str]) -> None:
    text = sample("--seed", "5")

    assert text.endswith(ENDING + "\n")
    assert len(text) > len(ENDING) + 1


def test_one_seed_gives_one_text(sample: Callable[..., str]) -> None:
    assert sample("--seed", "5") == sample("--seed", "5", again=True)


def test_another_seed_gives_another_text(sample: Callable[..., str]) -> None:
    assert sample("--seed", "5") != sample("--seed", "6")


def test_temperature_zero_ignores_the_seed(sample: Callable[..., str]) -> None:
    assert sample("--temp", "0", "--seed", "5") == sample("--temp", "0", "--seed", "6")


def test_the_command_converts_as_the_function_does(
    run_of: RunOf, model_of: ModelOf, run_megaback: Command, tmp_path: Path
) -> None:
    result = run_megaback("convert", run_of("zero.stage=1"), "--out", tmp_path / "model")

    assert result.returncode == 0, result.stderr
    for path in model_of(run_of("zero.stage=1")).iterdir():
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_starts_from_the_weights_that_init_from_names(
    model_of: ModelOf, run_of: RunOf, train_one_rank: Command, tmp_path: Path
) -> None:
    first = model_of(run_of("zero.stage=1"))

    result = train_one_rank(tmp_path / "run", f"init_from={first}", "training.steps=1")

    assert result.returncode == 0, result.stderr
    expected = val_losses_of(run_of("zero.stage=1"))[TOTAL_STEPS]
    assert val_losses_of(tmp_path / "run")[0] == pytest.approx(expected, abs=1e-5)


def test_old_checkpoints_are_deleted(run_of: RunOf) -> None:
    names = {path.name for path in (run_of("zero.stage=1") / "checkpoints").iterdir()}

    assert names == {"latest", "step-00000050", "step-00000075", "step-00000100"}


def test_a_run_keeps_its_resolved_config(run_of: RunOf, tiny_shards: Path) -> None:
    run = run_of("zero.stage=3", *SHORT)
    fields = yaml.safe_load((run / "config.yaml").read_text())

    assert fields["zero"]["stage"] == 3
    assert fields["batch"] == {**tiny_config(tiny_shards)["batch"], "sequence_parallel": 1}
    assert fields["run"] == str(run)
