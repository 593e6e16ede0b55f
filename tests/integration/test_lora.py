"""LoRA in our own fine-tuning, against the same training with peft in a plain loop."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from data_pipeline.errors import RunMismatchError
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.safetensors_file import TensorFile
from megaback.cli import main as megaback_command
from megaback.config import ModelSection
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.run_folder import complete_checkpoints
from megaback.tracking.samples_log import read_samples
from megaback.weights.source import open_source
from tests.helpers.models import write_model
from tests.helpers.tiny_run import (
    curve_of,
    metrics_of,
    read_run_config,
    tiny_config,
    train_plainly,
    val_losses_of,
)
from tests.helpers.warm_ranks import WarmRanks
from tools.convert import convert
from tools.rollback import roll_back

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RunOf = Callable[..., Path]
SAMPLES = (
    'validation.samples=["and so it ended."]',
    "validation.sample_tokens=4",
    "validation.sample_temperature=0",
)
TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = (
    "finetune.lora.rank=4",
    "finetune.lora.alpha=12",
    f"finetune.lora.target_modules=[{','.join(TARGETS)}]",
    "optimizer.learning_rate=0.02",
    "optimizer.warmup_steps=0",
    "training.steps=6",
    "checkpoint.every_steps=3",
    "validation.every_steps=6",
    *SAMPLES,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]) -> Path:
    """A model's folder, of the tiny config's shape."""
    shape = ModelSection.model_validate(tiny_config(Path())["model"]).resolved()
    model = ReverseGPT(shape, codec().vocab_size)
    model.initialize(8)
    return write_model(tmp_path_factory.mktemp("base") / "base", model, codec())


@pytest.fixture(scope="module")
def plain_losses(base: Path, tiny_shards: Path) -> list[float]:
    """Losses of the same steps in a plain loop, with peft's own layers."""
    from peft import LoraConfig, inject_adapter_in_model

    from megaback.model.lora import initial_adapters
    from megaback.planning.adapters import adapter_shapes

    config = read_run_config(tiny_shards, f"init_from={base}", *LORA)
    source = open_source(base)
    model = ReverseGPT(config.model, source.description.vocab_size)
    source.fill(model)
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS)
    inject_adapter_in_model(settings, model)
    sizes = adapter_shapes(config.model, config.finetune.lora)
    for name, factor in initial_adapters(sizes, config.training.seed):
        model.get_parameter(name).data.copy_(factor)
    return train_plainly(config, model).losses


@pytest.mark.parametrize(
    "ways",
    [
        ("zero.stage=0",),
        ("zero.stage=1",),
        ("zero.stage=2", "training.activation_checkpointing=selective"),
        ("zero.stage=3",),
        ("zero.stage=3", "training.activation_checkpointing=block", "zero.reduce_once=true"),
    ],
    ids=" ".join,
)
def test_every_stage_gives_the_losses_of_a_plain_loop_with_peft(
    ways: tuple[str, ...], base: Path, run_of: RunOf, plain_losses: list[float]
) -> None:
    losses = curve_of(run_of(f"init_from={base}", *LORA, *ways))

    assert losses == pytest.approx(plain_losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.02


@pytest.fixture(scope="module")
def tuned(base: Path, run_of: RunOf) -> Path:
    return run_of(f"init_from={base}", *LORA, "zero.stage=1")


def test_one_rank_gives_the_losses_of_two(tuned: Path, base: Path, lonely_run_of: RunOf) -> None:
    alone = lonely_run_of(f"init_from={base}", *LORA, "zero.stage=1")

    assert curve_of(alone) == pytest.approx(curve_of(tuned), abs=1e-5)


def test_the_base_is_unchanged_and_in_every_checkpoint_as_one_file(tuned: Path, base: Path) -> None:
    first, last = complete_checkpoints(tuned)[-2:]
    source = open_source(base)

    frozen = TensorFile(last / "base.safetensors")
    assert frozen.entries.keys() == source.shapes.keys()
    for name in source.shapes:
        assert torch.equal(frozen.tensor(name), source.read(name))
    assert (first / "base.safetensors").samefile(last / "base.safetensors")
    assert "base.safetensors" in json.loads((last / "meta.json").read_text())["files"]


def test_the_merged_model_has_the_val_loss_and_the_samples_of_the_run(
    tuned: Path, lonely_run_of: RunOf
) -> None:
    assert val_losses_of(tuned)[6] < val_losses_of(tuned)[0] - 0.01
    short = ("training.steps=1", "validation.every_steps=1")
    merged = lonely_run_of(f"init_from={tuned}", *short, *SAMPLES)

    assert val_losses_of(merged)[0] == pytest.approx(val_losses_of(tuned)[6], abs=1e-5)
    assert read_samples(merged)[0]["text"] == read_samples(tuned)[-1]["text"]


@pytest.fixture(scope="module")
def exported(base: Path) -> Path:
    """The base for transformers."""
    convert(base, base.with_name("hf"), "hf", "float32")
    return base.with_name("hf")


def test_peft_loads_the_adapter_of_a_run_on_the_exported_base(
    tuned: Path, exported: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    convert(tuned, tmp_path / "peft", "peft", "float32", base=exported)

    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")
    merged = open_source(tuned)
    ours = ReverseGPT(merged.description.shape, merged.description.vocab_size)
    merged.fill(ours)
    ids_T = torch.arange(5, 29)
    with torch.no_grad():
        expected = ours.logits(ids_T, torch.arange(24), Segments.from_lengths((24,), CPU))
        found = model(ids_T[None]).logits[0]
        with model.disable_adapter():
            of_base = model(ids_T[None]).logits[0]
    assert (found - expected).abs().max() < 1e-5
    assert (of_base - expected).abs().max() > 1e-3


def test_an_adapter_of_a_run_and_its_base_are_merged_to_the_weights_of_the_run(
    tuned: Path, exported: Path, tmp_path: Path
) -> None:
    convert(tuned, tmp_path / "peft", "peft", "float32", base=exported)
    convert(tmp_path / "peft", tmp_path / "back", "full", "float32", base=exported)

    source, back = open_source(tuned), open_source(tmp_path / "back")
    assert all(torch.equal(source.read(name), back.read(name)) for name in source.shapes)


def test_only_a_run_with_lora_and_its_own_base_make_an_adapter(
    tuned: Path, exported: Path, base: Path, codec: Callable[..., TextCodec], tmp_path: Path
) -> None:
    shape = ModelSection.model_validate(tiny_config(Path())["model"]).resolved()
    model = ReverseGPT(shape, codec().vocab_size)
    model.initialize(9)
    convert(write_model(tmp_path / "else", model, codec()), tmp_path / "hf", "hf", "float32")

    for source, given, part in (
        (base, exported, "has no adapter"),
        (tuned, base, "is no model for transformers"),
        (tuned, tmp_path / "hf", "its model.embed_tokens.weight differs"),
    ):
        words = ["--to", "peft", "--base", str(given), "--out", str(tmp_path / "x")]
        result = CliRunner().invoke(megaback_command, ["convert", str(source), *words])
        assert result.exit_code == RunMismatchError.exit_code, result.output
        assert part in result.stderr
        assert not (tmp_path / "x").exists()


def test_a_resumed_run_repeats_an_uninterrupted_one_without_its_base(
    tuned: Path, base: Path, tmp_path: Path, warm_ranks: Callable[[int], WarmRanks]
) -> None:
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    newest = complete_checkpoints(run)[-1]
    expected = {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}
    shutil.rmtree(newest)
    (run / "checkpoints" / "base.safetensors").unlink()

    resume = (f"run={run}", f"init_from={tmp_path / 'deleted'}")
    warm_ranks(2).train(run / "config.yaml", resume, tmp_path / "out.txt")

    assert metrics_of(run) == metrics_of(tuned)
    assert {path.name: path.read_bytes() for path in newest.glob("*.safetensors")} == expected


def test_a_rolled_back_run_skips_its_steps_and_trains_on(
    tuned: Path, tmp_path: Path, warm_ranks: Callable[[int], WarmRanks]
) -> None:
    run = Path(shutil.copytree(tuned, tmp_path / "run"))

    assert roll_back(run, 1)[1:] == (4, 6)
    longer = (f"run={run}", "training.steps=7")
    warm_ranks(1).train(run / "config.yaml", longer, tmp_path / "out.txt")

    assert [line["step"] for line in metrics_of(run) if line.get("excluded")] == [4, 5, 6]
    assert len(curve_of(run)) == 3 + 1
    assert val_losses_of(run)[7] < val_losses_of(tuned)[0]


def test_a_branch_repeats_its_trunk_and_its_copies_are_whole(
    tuned: Path, tmp_path: Path, warm_ranks: Callable[[int], WarmRanks]
) -> None:
    run, copies = tmp_path / "branch", tmp_path / "copies"
    trunk = complete_checkpoints(tuned)[-2]
    ways = (f"run={run}", "init_from=null", f"branch_from={trunk}", f"checkpoint.copy_to={copies}")
    warm_ranks(1).train(tuned / "config.yaml", ways, tmp_path / "out.txt")

    assert curve_of(run)[-3:] == pytest.approx(curve_of(tuned)[-3:], abs=1e-5)
    source, copied = open_source(run), open_source(copies / "branch" / "step-00000006")
    assert all(torch.equal(source.read(name), copied.read(name)) for name in source.shapes)
    shutil.rmtree(run / "checkpoints")
    warm_ranks(1).train(run / "config.yaml", ("training.steps=7",), tmp_path / "again.txt")
    assert curve_of(run)[-4:-1] == pytest.approx(curve_of(tuned)[-3:], abs=1e-5)


def test_another_number_of_ranks_and_stage_resumes(
    tuned: Path, tmp_path: Path, warm_ranks: Callable[[int], WarmRanks]
) -> None:
    run = Path(shutil.copytree(tuned, tmp_path / "run"))
    shutil.rmtree(complete_checkpoints(run)[-1])

    resume = (f"run={run}", "zero.stage=3")
    warm_ranks(1).train(run / "config.yaml", resume, tmp_path / "out.txt")

    assert curve_of(run) == pytest.approx(curve_of(tuned), abs=1e-5)
