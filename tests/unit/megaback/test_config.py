"""Validation of configs, their error messages and overrides."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import BatchError, ConfigError, MegabackError
from data_pipeline.storage.address_variables import expanded
from megaback.config_batch import BatchSection, split_batch
from megaback.config_file import load_config
from megaback.shown_config import shown_config
from megaback.yaml_text import kept_overrides
from tests.helpers.paths import ROOT

SMALL: dict[str, Any] = {
    "run": "runs/small",
    "data": {"shards": "data/small"},
    "model": {"num_layers": 2, "width": 32, "num_heads": 4},
    "batch": {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2},
    "optimizer": {"learning_rate": 1e-3},
    "training": {"steps": 10},
}


def write_config(folder: Path, fields: object = SMALL) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


MIXED = "data.shards=[{{path: web, weight: {}}}, {{path: books, {}}}]"


@pytest.mark.parametrize(
    ("weight", "books", "more", "message"),
    [
        ("0", "weight: 1", "", "data.shards.0.weight = 0: 0 is not in the range x>0"),
        ("{0.5: 1}", "weight: 1", "", "give the weight at position 0"),
        ("{0: 0, 0.5: 0}", "weight: 1", "", "every weight is 0; remove the data set"),
        ("{0: -1}", "weight: 1", "", "-1 is not in the range x>=0"),
        ("{0: true}", "weight: 1", "", "is not a number"),
        ("{0: 1, 2e9: 3}", "weight: 1", "", "the position 2e+09 of a weight is not a fraction"),
        ("{0: 1, 0.5: 0}", "weight: {0: 2, 0.4: 0}", "", "every weight is 0 from position 0.5 on"),
        ("1", "max_epochs: 0", "", "data.shards.1.max_epochs = 0: "),
        ("1", "after_max_epochs: repeat", "", "data.shards.1.after_max_epochs = 'repeat': "),
        ("{0: 1, 9: 0}", "weight: {0: 0}", "data.weight_positions=tokens", "every weight is 0"),
    ],
)
def test_an_invalid_weight_is_refused(
    tmp_path: Path, weight: str, books: str, more: str, message: str
) -> None:
    overrides = (MIXED.format(weight, books), *more.split())
    assert message in refusal(write_config(tmp_path), *overrides)


def test_weights_over_training_are_read_back_as_written(tmp_path: Path) -> None:
    weights = MIXED.format("{0.8: 1, 0: 3e0}", "weight_interpolation: linear, max_epochs: 4")
    config = load_config(write_config(tmp_path), (weights,))
    web, books = config.data.shards
    assert web.weight == {0.0: 3.0, 0.8: 1.0}
    assert (books.max_epochs, books.after_max_epochs) == (4, "drop")
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert load_config(copy) == config
    assert config.data.description == "web x 3, then 1, books x 1"


def refusal(path: Path, *overrides: str) -> str:
    """The error message of an invalid config."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_a_minimal_config_has_defaults(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path))

    assert (config.training.steps, config.zero.stage, config.data.direction) == (10, 2, "backward")


def test_a_config_written_as_yaml_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ("init_from=models/base", "data.lanes=4"))
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())

    assert load_config(copy) == config


@pytest.mark.parametrize(
    "text",
    [
        "data.shards={}",
        "data.shards=[{{path: '{}', weight: 2}}, {{path: books}}]",
        "checkpoint.copy_to={}",
    ],
)
def test_an_override_for_other_processes_has_no_secrets_and_the_same_value(
    tmp_path: Path, text: str
) -> None:
    override = text.format("https://me:pass@host/web?token=abc&id=7")
    (kept,) = kept_overrides((override,))
    assert "abc" not in kept
    assert "pass@" not in kept
    assert kept_overrides((kept, "training.steps=7")) == (kept, "training.steps=7")
    path = write_config(tmp_path)
    assert load_config(path, (kept,)) == load_config(path, (override,))


def test_a_redacted_config_has_no_secrets_of_urls(tmp_path: Path) -> None:
    secret = "data.shards=[{path: 'https://me:word@host/web?token=abc', weight: 2}, {path: books}]"
    config = load_config(write_config(tmp_path), (secret,))

    shown = shown_config(config)

    assert [part["path"] for part in shown["data"]["shards"]] == ["https://host/web", "books"]
    assert shown["model"] == config.model.model_dump()
    assert "abc" not in config.to_yaml()
    assert "word" not in config.to_yaml()
    assert expanded(config.data.shards[0].path) == "https://me:word@host/web?token=abc"


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("trainig.steps=5", "trainig", "training"),
        ("optimizer.lerning_rate=1", "optimizer.lerning_rate", "optimizer.learning_rate"),
        ("model.num_head=2", "model.num_head", "model.num_heads"),
        ("batch.global_rows=2", "batch.global_rows", "batch.global_batch_rows"),
        ("zero.stages=2", "zero.stages", "zero.stage"),
        ("data.direktion=forward", "data.direktion", "data.direction"),
        (
            "data.shards=[{path: a, max_epoch: 3}]",
            "data.shards.0.max_epoch",
            "data.shards.0.max_epochs",
        ),
        ("logging.wandb_projekt=x", "logging.wandb_projekt", "logging.wandb_project"),
    ],
)
def test_an_unknown_key_is_reported_with_the_closest_one(
    tmp_path: Path, override: str, key: str, meant: str
) -> None:
    path = write_config(tmp_path)

    assert refusal(path, override) == f"{path}: there is no key {key}; did you mean {meant}?"


@pytest.mark.parametrize(
    ("override", "names"),
    [("zero.xyzzy=1", "; zero has stage"), ("xyzzy=1", "; the config has run,")],
)
def test_an_unknown_key_without_a_close_match_lists_the_keys_of_its_section(
    tmp_path: Path, override: str, names: str
) -> None:
    assert names in refusal(write_config(tmp_path), override)


@pytest.mark.parametrize("section", ["data", "model", "batch", "optimizer", "training"])
def test_a_missing_section_is_reported(tmp_path: Path, section: str) -> None:
    fields = {name: value for name, value in SMALL.items() if name != section}

    assert f"the key {section} is missing" in refusal(write_config(tmp_path, fields))


def test_a_missing_key_is_reported_with_its_section(tmp_path: Path) -> None:
    fields = {**SMALL, "model": {"num_layers": 2, "num_heads": 4}}

    assert "the key model.width is missing" in refusal(write_config(tmp_path, fields))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate = 'fast'"),
        ("model.num_layers=0", "model.num_layers = 0"),
        ("model.num_layers=2.5", "model.num_layers = 2.5"),
        ("zero.stage=4", "zero.stage = 4"),
        ("data.direction=sideways", "data.direction = 'sideways'"),
        ("data.forward_share=0.3", "forward_share is for models of both directions only"),
        ("validation.direction=forward", "validation.direction is for models of both directions"),
        ("training.precision=fp16", "training.precision = 'fp16'"),
        ("checkpoint.keep_last=1", "checkpoint.keep_last = 1"),
        ("training.seed=-1", "training.seed = -1"),
        ("model.width=34", "num_heads 4 does not divide width 34"),
        ("model.width=12", "width / num_heads is 3"),
        ("model.head_dim=5", "head_dim is 5; rotary positions need an even number"),
        ("model.rope_low_frequency_factor=4", "rope_low_frequency_factor 4 is not below"),
        ("model.num_kv_heads=3", "num_kv_heads 3 does not divide num_heads 4"),
        ("model=null", "model = None"),
        ("zero={stage: 0, offload: optimizer}", "offload optimizer needs stage 1 or higher"),
        ("zero={stage: 2, offload: parameters}", "offload parameters needs stage 3"),
        ("zero={stage: 0, hierarchical: true}", "hierarchical needs stage 1 or higher"),
        ("zero={offload: optimizer, hierarchical: true}", "hierarchical and offload optimizer"),
        (
            "model={num_layers: 1, width: 32, num_heads: 4, tie_embeddings: true, base_width: 8}",
            "base_width treats lm_head and the embeddings differently",
        ),
        (
            "model={num_layers: 1, width: 32, num_heads: 4, tie_embeddings: true, zero_head: true}",
            "zero_head treats lm_head and the embeddings differently",
        ),
        ("optimizer.matrix_learning_rate=0.1", "matrix_learning_rate is for Muon only"),
        ("optimizer.schedule=step", "optimizer.schedule = 'step'"),
        ("optimizer.decay_at=2e9", "Input should be a list; put it in brackets"),
        ("training.activation_checkpointing=true", "training.activation_checkpointing = True"),
    ],
)
def test_an_invalid_value_is_reported_with_its_key(tmp_path: Path, override: str, key: str) -> None:
    assert key in refusal(write_config(tmp_path), override)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["optimizer.learning_rate", "training.epochs", "model.rope_theta"])
def test_a_non_finite_number_is_refused(tmp_path: Path, key: str, value: str) -> None:
    overrides = ["training.steps=null"] if key == "training.epochs" else []

    assert key in refusal(write_config(tmp_path), *overrides, f"{key}={value}")


def test_the_length_can_be_given_in_epochs(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ("training.steps=null", "training.epochs=1.5"))

    assert (config.training.steps, config.training.epochs) == (None, 1.5)


@pytest.mark.parametrize("override", ["training.epochs=2", "training.steps=null"])
def test_exactly_one_of_steps_and_epochs_is_accepted(tmp_path: Path, override: str) -> None:
    sentence = refusal(write_config(tmp_path), override)

    assert "training: give exactly one of steps and epochs" in sentence


def test_a_later_override_wins(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ("training.seed=1", "training.seed=2"))

    assert config.training.seed == 2


def test_an_override_adds_a_section_that_the_file_lacks(tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path), ("zero.stage=3",)).zero.stage == 3


def test_a_learning_rate_can_be_written_as_3e_4(tmp_path: Path) -> None:
    """YAML 1.1 reads 3e-4, without a dot, as text."""
    config = load_config(write_config(tmp_path), ("optimizer.learning_rate=3e-4",))

    assert config.optimizer.learning_rate == 3e-4


def test_the_value_of_an_override_can_contain_an_equals_sign(tmp_path: Path) -> None:
    assert load_config(write_config(tmp_path), ("run=runs/lr=1",)).run == Path("runs/lr=1")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.steps", "'training.steps' is not an override"),
        ("=5", "'=5' is not an override"),
        ("training.steps.more=5", "sets a key of steps, which has no keys"),
        ("run=[1", "is not valid YAML"),
    ],
)
def test_an_invalid_override_is_quoted(tmp_path: Path, override: str, complaint: str) -> None:
    assert complaint in refusal(write_config(tmp_path), override)


@pytest.mark.parametrize("override", [".steps=5", "training.=5", "training..steps=5"])
def test_an_override_with_an_empty_name_is_refused(tmp_path: Path, override: str) -> None:
    refusal(write_config(tmp_path), override)


def test_a_missing_config_file_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"

    assert refusal(path) == (
        f"cannot read the config {path}: No such file or directory; give the path of a YAML file, "
        "such as configs/demo.yaml"
    )


def test_for_the_folder_of_a_run_its_config_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: elsewhere\n")

    assert refusal(tmp_path).endswith(f"give the run's config, {tmp_path / 'config.yaml'}")


def test_an_error_of_yaml_has_its_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text("run: a\nmodel: [")

    assert refusal(path).startswith(f"{path} is not valid YAML: line 2, column 9: while parsing")


@pytest.mark.parametrize("content", [b"", b"- a\n", b"text", b"run: [", b"\xff\xfe", b"a: b: c"])
def test_a_file_that_is_not_a_config_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)

    assert str(path) in refusal(path)


@pytest.mark.parametrize(
    "override",
    ["zero.stages=2", "model.width=34", "training.epochs=2", "optimizer.learning_rate=-1", "run=["],
)
def test_an_error_message_is_one_line(tmp_path: Path, override: str) -> None:
    assert "\n" not in refusal(write_config(tmp_path), override)


def test_keys_that_are_not_strings_are_refused(tmp_path: Path) -> None:
    fields = {**SMALL, "zero": {2: 3}}

    assert "zero.2" in refusal(write_config(tmp_path, fields))


@given(
    micro_rows=st.integers(1, 64),
    per_rank=st.integers(1, 256),
    world_size=st.integers(1, 64),
)
def test_micro_batches_accumulation_and_ranks_multiply_to_the_global_batch(
    micro_rows: int, per_rank: int, world_size: int
) -> None:
    batch = batch_of(per_rank * world_size, micro_rows)

    rows, accumulation = split_batch(batch, world_size)

    assert rows * accumulation * world_size == batch.global_batch_rows
    assert rows <= micro_rows


@given(micro_rows=st.integers(1, 64), per_rank=st.integers(1, 256), world_size=st.integers(1, 64))
def test_the_micro_batch_is_the_largest_that_divides_a_ranks_rows(
    micro_rows: int, per_rank: int, world_size: int
) -> None:
    rows, _ = split_batch(batch_of(per_rank * world_size, micro_rows), world_size)

    assert all(per_rank % larger for larger in range(rows + 1, min(micro_rows, per_rank) + 1))


@given(parts=st.sampled_from([1, 2, 4, 8]), groups=st.integers(1, 16), per_group=st.integers(1, 64))
def test_ranks_that_share_rows_count_once_in_the_batch(
    parts: int, groups: int, per_group: int
) -> None:
    batch = batch_of(per_group * groups, 4, sequence_parallel=parts)

    assert split_batch(batch, parts * groups) == split_batch(batch_of(per_group, 4), 1)


def test_ranks_that_cannot_be_divided_into_groups_are_refused() -> None:
    with pytest.raises(BatchError, match=r"sequence_parallel 4 does not divide 6 ranks"):
        split_batch(batch_of(8, 4, sequence_parallel=4), 6)
    with pytest.raises(BatchError, match=r"divisible by 3 groups of batch\.sequence_parallel 2"):
        split_batch(batch_of(8, 4, sequence_parallel=2), 6)


@pytest.mark.parametrize(
    ("parts", "model", "keys"),
    [
        (3, {}, ("batch: sequence_parallel 3", "context_tokens 64")),
        (8, {}, ("batch.sequence_parallel is 8", "model.num_heads is 4")),
        (2, {"num_heads": 6, "num_kv_heads": 3, "width": 48}, ("model.num_kv_heads is 3",)),
    ],
)
def test_heads_and_tokens_that_cannot_be_divided_are_refused(
    parts: int, model: dict[str, int], keys: tuple[str, ...], tmp_path: Path
) -> None:
    batch = {**SMALL["batch"], "sequence_parallel": parts}
    fields = {**SMALL, "model": {**SMALL["model"], **model}, "batch": batch}

    message = refusal(write_config(tmp_path, fields))

    for key in keys:
        assert key in message


def test_ranks_that_share_rows_skip_no_bad_frames(tmp_path: Path) -> None:
    batch = {**SMALL["batch"], "sequence_parallel": 2}
    data = {**SMALL["data"], "on_bad_frame": "skip"}

    message = refusal(write_config(tmp_path, {**SMALL, "batch": batch, "data": data}))

    assert "batch.sequence_parallel and data.on_bad_frame skip" in message
    assert "set data.on_bad_frame to stop" in message


@given(global_rows=st.integers(1, 4096), world_size=st.integers(1, 512))
def test_the_error_for_an_indivisible_batch_suggests_a_divisible_one(
    global_rows: int, world_size: int
) -> None:
    if global_rows % world_size == 0:
        return
    with pytest.raises(BatchError) as caught:
        split_batch(batch_of(global_rows, 4), world_size)

    message = str(caught.value)
    assert f"global_batch_rows {global_rows} is not divisible by {world_size} ranks" in message
    suggested = int(re.search(r"use (\d+) rows", message)[1])
    assert suggested % world_size == 0
    assert abs(suggested - global_rows) < world_size


def batch_of(global_rows: int, micro_rows: int, sequence_parallel: int = 1) -> BatchSection:
    return BatchSection(
        context_tokens=64,
        global_batch_rows=global_rows,
        micro_batch_rows=micro_rows,
        sequence_parallel=sequence_parallel,
    )


def test_config_errors_are_megaback_errors() -> None:
    assert issubclass(BatchError, ConfigError)
    assert issubclass(ConfigError, MegabackError)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("hardware.preflight=off", "off"),
        ("hardware.preflight=on", "on"),
        ("logging.wandb=off", "off"),
    ],
)
def test_words_that_yaml_reads_as_booleans_need_no_quotes(override: str, value: str) -> None:
    section, key = override.partition("=")[0].split(".")
    config = load_config(ROOT / "configs" / "demo.yaml", (override,))

    assert getattr(getattr(config, section), key) == value
