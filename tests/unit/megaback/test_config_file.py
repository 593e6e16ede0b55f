"""Config files with keys from a base model, duplicate keys, and other spellings of numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    ConfigError,
    RunMismatchError,
)
from data_pipeline.text.codec import TextCodec
from megaback.config import Config
from megaback.config_file import load_config
from tests.helpers.exports import write_checkpoint
from tools.convert import convert

FIELDS: dict[str, Any] = {
    "run": "runs/small",
    "data": {"shards": "data/small"},
    "model": {"num_layers": 2, "width": 32, "num_heads": 4},
    "batch": {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"steps": 10},
}
BASE = {"num_kv_heads": 2, "qk_norm": False, "rope_theta": 5e5, "tie_embeddings": True}


def write_config(folder: Path, **changes: Any) -> Path:
    path = folder / "small.yaml"
    fields = {key: value for key, value in {**FIELDS, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]
) -> dict[str, Path]:
    """One model in all the forms that init_from takes."""
    folder = tmp_path_factory.mktemp("bases")
    target, _ = write_checkpoint(folder / "run", codec(), **BASE)
    convert(folder / "run", folder / "full", "full", "float32")
    convert(folder / "run", folder / "hf", "hf", "float32")
    convert(folder / "run", folder / "foreign", "hf", "float32")
    path = folder / "foreign" / "config.json"
    fields = json.loads(path.read_text())
    del fields["megaback"]
    path.write_text(json.dumps(fields))
    (folder / "run" / "checkpoints" / "best").write_text(target.name + "\n")
    return {
        "run": folder / "run",
        "checkpoints": folder / "run" / "checkpoints",
        "best": folder / "run" / "checkpoints" / "best",
        "checkpoint": target,
        **{name: folder / name for name in ("full", "hf", "foreign")},
    }


@pytest.mark.parametrize(
    "kind", ["run", "checkpoints", "best", "checkpoint", "full", "hf", "foreign"]
)
def test_a_config_without_a_model_takes_the_shape_of_its_base(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    path = write_config(tmp_path, model=None)
    config = load_config(path, (f"init_from={bases[kind]}",))

    meta = json.loads((bases["checkpoint"] / "meta.json").read_text())
    assert config.model == Config.model_validate(meta["config"]).model.resolved()


def test_keys_of_the_config_are_merged_with_the_bases(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    given = {"num_kv_heads": None, "rope_theta": "5e5", "zero_output_projections": True}
    path = write_config(tmp_path, model=given, init_from=str(bases["run"]))

    model = load_config(path).model

    assert (model.width, model.num_kv_heads, model.rope_theta) == (32, 2, 5e5)
    assert model.zero_output_projections  # of the run, not of the base


@pytest.mark.parametrize("kind", ["run", "foreign"])
def test_only_keys_that_contradict_the_base_are_reported(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    given = {"width": 64, "num_layers": 2, "qk_norm": True}
    path = write_config(tmp_path, model=given, init_from=str(bases[kind]))

    with pytest.raises(RunMismatchError) as caught:
        load_config(path)

    assert "width is 32 there and 64 here (2 differ: width, qk_norm)" in str(caught.value)


def test_a_run_that_has_begun_no_longer_needs_its_base(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": FIELDS["model"] | BASE}))
    path = write_config(tmp_path, model=None, init_from="gone", run=str(run))

    assert load_config(path).model.rope_theta == 5e5


def test_a_missing_base_is_an_error_only_if_the_config_lacks_a_model(tmp_path: Path) -> None:
    path = write_config(tmp_path, model=None, init_from="gone")

    with pytest.raises(CheckpointMissingError, match="init_from gone is not a model"):
        load_config(path)
    assert load_config(write_config(tmp_path, init_from="gone")).model.width == 32
    with pytest.raises(ConfigError, match="the key model is missing; set it, or set init_from"):
        load_config(write_config(tmp_path, model=None))


def test_a_complete_config_does_not_read_its_base(bases: dict[str, Path], tmp_path: Path) -> None:
    whole = load_config(write_config(tmp_path)).model.model_dump()
    path = write_config(tmp_path, model=whole, init_from=str(bases["run"]))

    assert load_config(path).model.width == 32


def test_a_damaged_base_is_reported(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{")
    path = write_config(tmp_path, model=None, init_from=str(tmp_path / "base"))

    with pytest.raises(CheckpointCorruptError, match=r"base/config.json does not describe"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: a\ntraining:\n  steps: 1\nrun: b\n", "the key run is given twice, on line 1 and on"),
        ("training:\n  steps: 1\n  seed: 2\n  steps: 3\n", "steps is given twice, on line 2 and"),
        ("training: {steps: 1, steps: 2}\n", "the key steps is given twice"),
    ],
)
def test_a_duplicate_key_is_refused_with_its_lines(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_merged_keys_can_be_overridden(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    text = path.read_text().replace("training:", "training: &it\n  seed: 4", 1)
    path.write_text(text + "validation: {every_steps: 3}\n")

    assert load_config(path).training.seed == 4
    path.write_text("x: &d {steps: 1}\ny: &e {<<: *d, steps: 2}\nz: {<<: *e, steps: 3}\n")
    with pytest.raises(ConfigError, match="there is no key x"):  # the YAML itself is valid
        load_config(path)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.steps=1e3", "training.steps", 1000),
        ("training.steps=2.5E+03", "training.steps", 2500),
        ("training.steps=1_000", "training.steps", 1000),
        ("training.steps=1000.0", "training.steps", 1000),
        ("batch.global_batch_rows=1e1", "batch.global_batch_rows", 10),
        ("checkpoint.every_steps=1e2", "checkpoint.every_steps", 100),
        ("optimizer.learning_rate=1e-4", "optimizer.learning_rate", 1e-4),
        ("logging.wandb_project=1e3", "logging.wandb_project", "1e3"),
        ("run=1e3", "run", Path("1e3")),
    ],
)
def test_integers_can_be_written_with_exponents_and_underscores(
    override: str, key: str, value: object, tmp_path: Path
) -> None:
    found: Any = load_config(write_config(tmp_path), (override,))
    for part in key.split("."):
        found = getattr(found, part)

    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        "training.steps=1e-1",
        "training.steps=1.5",
        "training.steps=yes",
        "optimizer.learning_rate=true",
        "zero.stage=true",
        "training.steps=1e3x",
    ],
)
def test_a_value_that_is_not_an_integer_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config(write_config(tmp_path), (override,))


def test_a_long_value_is_truncated_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write_config(tmp_path), (f"training.precision={'x' * 500}",))

    assert str(caught.value).count("x") < 100


def test_a_deeply_nested_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.yaml"
    path.write_text("run: " + "[" * 3000 + "]" * 3000)

    with pytest.raises(ConfigError, match="nested too deeply"):
        load_config(path)
