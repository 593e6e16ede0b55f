"""Steps left at a start, and keys changed on resume."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import NonFiniteError
from megaback.branches import BranchPoint
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.config import ALL_KEPT
from megaback.faults.exit_record import record_exit
from megaback.training.start import already_trained, changes_on_resume, describe_changes
from tests.helpers.run_config import run_config

STEPS = 25


def meta_at(step: int) -> CheckpointMeta:
    """Metadata of a checkpoint, of which only the step matters."""
    return CheckpointMeta(
        step=step,
        updates=1,
        world_size=step,
        zero_stage=0,
        precision="fp32",
        vocab_size=100,
        text_format={},
        data_fingerprint="data",
        config={},
        val_loss=2.0,
        versions={},
        files={},
    )


def config_of(run: Path, **sections: Any) -> Any:
    return run_config(run, **sections)


def test_a_run_with_steps_left_is_not_trained_to_the_end(tmp_path: Path) -> None:
    assert already_trained(config_of(tmp_path), meta_at(STEPS - 1), STEPS) is None


@pytest.mark.parametrize("code", [None, 0, 75])
def test_a_run_whose_last_step_is_saved_is_trained_to_the_end(
    tmp_path: Path, code: int | None
) -> None:
    if code is not None:
        record_exit(tmp_path, code, "kind", "reason")

    left = already_trained(config_of(tmp_path), meta_at(STEPS), STEPS)

    assert left is not None
    assert (left.reason, left.is_recorded) == ("trained to the end", code == 0)
    assert "has done 25 of 25 steps" in left.message
    assert "training.steps" in left.message


def test_a_run_that_ended_without_an_update_ends_so_again(tmp_path: Path) -> None:
    record_exit(tmp_path, NonFiniteError.exit_code, "NonFiniteError", "nothing was learned")

    point = BranchPoint(
        checkpoint="trunk",
        sha256="0" * 64,
        trunk_step=5,
        kept=ALL_KEPT,
        step=5,
        tokens=0,
        rows=0,
        order_rows=4,
        data_fingerprint="",
        text_format={},
        updates=5,
    )
    for fields in ({"updates": 0}, {"updates": 5, "branch": point}):
        with pytest.raises(NonFiniteError, match="nothing was learned"):
            already_trained(config_of(tmp_path), replace(meta_at(STEPS), **fields), STEPS)
    left = already_trained(config_of(tmp_path), meta_at(STEPS), STEPS)  # cut before the error
    assert left is not None
    assert left.reason == "trained to the end"


def test_a_run_that_max_epochs_has_ended_reports_it(tmp_path: Path) -> None:
    left = already_trained(config_of(tmp_path), meta_at(STEPS), STEPS, "books has been read twice")
    assert left is not None
    assert left.reason == "books has been read twice"
    assert "raise max_epochs to continue" in left.message


def test_fewer_steps_than_are_done_are_not_the_end_of_the_run(tmp_path: Path) -> None:
    left = already_trained(config_of(tmp_path), meta_at(STEPS), 10)

    assert left is not None
    assert left.is_recorded
    assert "has done 25 of 10 steps" in left.message


def test_a_run_that_stopped_early_is_trained_to_the_end(tmp_path: Path) -> None:
    lines = [f'{{"step": {step}, "val_loss": {loss}}}\n' for step, loss in ((0, 1.0), (5, 2.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    validation = {"every_steps": 5, "patience": 1}

    left = already_trained(config_of(tmp_path, validation=validation), meta_at(5), STEPS)
    patient = config_of(tmp_path, validation={**validation, "patience": 2})

    assert left is not None
    assert left.reason.startswith("stopped early")
    assert "validation.patience" in left.message
    assert already_trained(patient, meta_at(5), STEPS) is None


def test_changes_are_listed_by_key_with_both_values(tmp_path: Path) -> None:
    before = config_of(tmp_path / "a").model_dump(mode="json")
    now = config_of(
        tmp_path / "b", optimizer={"learning_rate": 1e-4, "schedule": "linear"}, zero={"stage": 1}
    )

    changes = changes_on_resume(before, now)

    assert changes == {
        "optimizer.learning_rate": (1e-3, 1e-4),
        "optimizer.schedule": ("cosine", "linear"),
        "zero.stage": (2, 1),
    }
    assert describe_changes(changes) == (
        "optimizer.learning_rate 0.001 -> 0.0001, optimizer.schedule cosine -> linear, "
        "zero.stage 2 -> 1"
    )


def test_a_key_that_an_older_checkpoint_lacks_is_no_change(tmp_path: Path) -> None:
    before = config_of(tmp_path).model_dump(mode="json")
    del before["guard"], before["logging"]["tensorboard"]

    assert changes_on_resume(before, config_of(tmp_path)) == {}


def test_changes_contain_no_secrets(tmp_path: Path) -> None:
    of = [
        {"shards": f"https://user:{word}@host/shards?signature={word}{place}"}
        for word, place in (("hidden", ""), ("hidden", "/more"))
    ]
    before = config_of(tmp_path, data={**of[0], "threads": 1}).model_dump(mode="json")

    changes = changes_on_resume(before, config_of(tmp_path, data={**of[1], "threads": 2}))

    assert changes["data.threads"] == (1, 2)
    assert "hidden" not in str(changes)
