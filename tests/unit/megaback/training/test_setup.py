"""Setup of a run: the lock of its folder, its start record, and the checkpoint to resume from."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.errors import LaunchError, MegabackError, RunMismatchError
from data_pipeline.loading.order import ORDER_VERSION
from megaback.checkpoints.saver import CheckpointSaver
from megaback.checkpoints.state import named_state
from megaback.config import Config
from megaback.data import open_data
from megaback.distributed.world import CollectiveExit, World
from megaback.faults.exit_record import read_exit, read_history
from megaback.faults.watchdog import Watchdog
from megaback.run_folder import (
    CHECKPOINTS_FOLDER,
    LATEST_NAME,
    META_NAME,
    complete_checkpoints,
)
from megaback.training.run import Run, batch_arithmetic
from megaback.training.same_run import require_same_run
from megaback.training.setup import prepare_run
from megaback.training.start import AlreadyTrained

Configs = Callable[..., Config]


@contextmanager
def prepared(config: Config, world: World) -> Iterator[Run]:
    """A run that is set up, whose folder is unlocked at the end."""
    watchdog = Watchdog(config.run, config.hardware, world)
    run = prepare_run(config, world, watchdog)
    assert isinstance(run, Run)
    assert run.lock is not None
    yield run
    watchdog.mark_exited("the test is over")
    run.data.training.close()
    run.lock.close()


def refused(config: Config, world: World) -> MegabackError:
    """The error with which a run does not start."""
    with pytest.raises(CollectiveExit) as ending:
        prepare_run(config, world, Watchdog(config.run, config.hardware, world))
    assert ending.value.error is not None
    return ending.value.error


def save(run: Run, step: int, world: World) -> None:
    """Save a checkpoint of a step."""
    saver = CheckpointSaver(
        run.config.run, run.data.codec.model_bytes, run.config.checkpoint, world
    )
    saver.begin(named_state(run.engine, world.rank, world.size), run.meta(step, 1.5, world))
    saver.finish()


def test_a_new_run_begins_at_step_0_and_records_its_start(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()

    with prepared(config, training_world) as run:
        assert (run.start_step, run.val_loss, run.changes) == (0, None, {})

    assert [line["event"] for line in read_history(config.run)] == ["start"]


def test_the_batch_arithmetic_has_the_tokens_of_a_step_and_a_run(
    config_of: Configs, training_world: World
) -> None:
    with prepared(config_of(), training_world) as run:
        text = batch_arithmetic(run, training_world)

    assert "2 rows x 64 tokens x 1 ranks x 2 accumulation = 256 tokens" in text
    assert "4 steps = 1,024 tokens" in text


def test_a_second_start_in_the_folder_of_a_training_run_is_refused(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()

    with prepared(config, training_world):
        assert isinstance(error := refused(config, training_world), LaunchError)

    assert "another process is training" in str(error)
    assert f"({socket.gethostname()} since 2" in str(error)


def test_a_requeued_job_starts_although_its_earlier_start_still_has_the_lock(
    config_of: Configs, training_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    config = config_of(hardware={"device": "cpu", "heartbeat_s": 600})
    watchdog = Watchdog(config.run, config.hardware, training_world)
    older = prepare_run(config, training_world, watchdog)
    assert isinstance(older, Run)

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with prepared(config, training_world) as newer:
        assert watchdog.fence.problem() is not None
        assert newer.watchdog.fence.problem() is None
        monkeypatch.delenv("SLURM_JOB_ID")
        assert isinstance(refused(config, training_world), LaunchError)

    starts = [line["start"] for line in read_history(config.run)]
    assert starts == [watchdog.fence.start_id, newer.watchdog.fence.start_id]
    watchdog._stopped.set()  # it would end this process
    older.data.training.close()


def test_a_run_resumes_at_its_newest_checkpoint_and_lists_changed_keys(
    config_of: Configs, training_world: World
) -> None:
    with prepared(config_of(), training_world) as run:
        save(run, 2, training_world)

    config = config_of(training={"steps": 8, "precision": "fp32"})
    with prepared(config, training_world) as run:
        assert (run.start_step, run.val_loss) == (2, 1.5)
        assert run.changes == {"training.steps": (4, 8)}


def test_a_resume_with_another_model_is_refused_and_the_record_is_kept(
    config_of: Configs, training_world: World
) -> None:
    with prepared(config_of(), training_world) as run:
        save(run, 2, training_world)
    history = read_history(run.config.run)

    other = config_of(model={"num_layers": 2, "width": 32, "num_heads": 4})

    assert isinstance(error := refused(other, training_world), RunMismatchError)
    assert "model.num_layers" in str(error)
    assert read_history(run.config.run) == history


def test_a_run_of_another_order_of_rows_is_refused_and_one_from_before_versions_resumes(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()
    with prepared(config, training_world) as run:
        save(run, 2, training_world)
    path = complete_checkpoints(config.run)[-1] / META_NAME
    fields = json.loads(path.read_text())
    assert fields["order_version"] == ORDER_VERSION

    of_before = {key: value for key, value in fields.items() if key != "order_version"}
    path.write_text(json.dumps(of_before))
    with prepared(config, training_world) as run:
        assert run.start_step == 2

    path.write_text(json.dumps({**fields, "order_version": ORDER_VERSION + 1}))
    error = refused(config, training_world)
    assert isinstance(error, RunMismatchError)
    for version in (f"has version {ORDER_VERSION + 1}", f"has version {ORDER_VERSION},"):
        assert version in str(error)


def test_a_run_of_changing_weights_is_refused_by_the_name_of_what_would_change_its_rows(
    config_of: Configs, training_world: World, tiny_shards: Path
) -> None:
    def mixed(weight: object = {0: 3, 0.5: 1}, steps: int = 4, **more: object) -> Config:
        shards = [{"path": str(tiny_shards), "weight": weight}, {"path": str(tiny_shards), **more}]
        training = {"steps": steps, "precision": "fp32"}
        return config_of(data={"shards": shards}, training=training)

    with prepared(mixed(), training_world) as run:
        save(run, 2, training_world)
        meta = run.meta(2, None, training_world)
    with prepared(mixed(), training_world) as run:
        assert run.start_step == 2

    for other, message in (
        (mixed(steps=8), "training.steps = 4, and the config has training.steps = 8, on which"),
        (mixed({0: 3, 0.5: 2}), "data.shards[0].weight.0.5 = 1.0, and the config has"),
        (mixed(max_epochs=2), "data.shards[1].max_epochs = null, and the config has"),
    ):
        data = open_data(other, 0, 1)
        with pytest.raises(RunMismatchError, match=re.escape(message)):
            require_same_run(other, data, run.config.run, meta)


def test_early_stopping_keeps_the_part_of_the_val_set_that_it_began_with(
    config_of: Configs, training_world: World
) -> None:
    def config(tokens: int | None, patience: int | None = 3) -> Config:
        return config_of(validation={"tokens": tokens, "patience": patience, "every_steps": 1})

    with prepared(config(128), training_world) as run:
        meta = run.meta(2, None, training_world)
        whole = open_data(config(None), 0, 1)
        assert run.data.describe_val() == (
            f"val set: 2 of {sum(1 for _ in whole.validation(0, 1)) * whole.micro_batch_rows} rows "
            "are measured (validation.tokens)"
        )
        assert whole.describe_val() is None
        assert open_data(config(1 << 40), 0, 1).describe_val() is None

    for tokens, shown in ((None, "null"), (64, "64")):
        other = config(tokens)
        with pytest.raises(
            RunMismatchError, match=rf"tokens = 128.*tokens = {shown}, and the best"
        ):
            require_same_run(other, open_data(other, 0, 1), other.run, meta)
        free = config(tokens, patience=None)
        require_same_run(free, open_data(free, 0, 1), free.run, meta)


def test_a_resume_with_rows_cut_otherwise_is_refused_and_a_run_from_before_the_key_resumes(
    config_of: Configs, training_world: World
) -> None:
    with prepared(config_of(), training_world) as run:
        save(run, 2, training_world)
    path = complete_checkpoints(config_of().run)[-1] / META_NAME
    fields = json.loads(path.read_text())
    del fields["config"]["data"]["rows"]
    path.write_text(json.dumps(fields))
    with prepared(config_of(), training_world) as run:
        assert run.start_step == 2

    whole = config_of(data={**config_of().data.model_dump(mode="json"), "rows": "documents"})
    error = refused(whole, training_world)
    assert isinstance(error, RunMismatchError)
    assert "data.rows = stream, and the config has data.rows = documents" in str(error)


def test_the_start_of_a_run_on_whole_documents_has_the_share_of_tokens_that_are_read(
    config_of: Configs, training_world: World
) -> None:
    whole = config_of(data={**config_of().data.model_dump(mode="json"), "rows": "documents"})
    with prepared(whole, training_world) as run:
        text = batch_arithmetic(run, training_world)
        rows = run.data.streams[0].table.rows_per_epoch
    assert f" epochs of {rows:,} rows, in " in text
    assert "rows read " in text
    assert "documents are longer than a row), and are " in text
    assert text.endswith("tokens of steps include the padding")


def test_the_default_share_of_forward_rows_may_be_given_on_resume_and_no_other(
    config_of: Configs, training_world: World
) -> None:
    both = {**config_of().data.model_dump(mode="json"), "direction": "both"}
    with prepared(config_of(data=both), training_world) as run:
        save(run, 2, training_world)

    with prepared(config_of(data={**both, "forward_share": 0.5}), training_world) as run:
        assert run.start_step == 2

    error = refused(config_of(data={**both, "forward_share": 0.4}), training_world)
    assert isinstance(error, RunMismatchError)
    assert "data.forward_share = 0.5, and the config has data.forward_share = 0.4" in str(error)


def test_a_run_with_no_steps_left_is_reported_and_recorded_as_finished(
    config_of: Configs, training_world: World
) -> None:
    config = config_of()
    with prepared(config, training_world) as run:
        save(run, 4, training_world)

    left = prepare_run(
        config, training_world, Watchdog(config.run, config.hardware, training_world)
    )

    assert isinstance(left, AlreadyTrained)
    assert "raise training.steps" in left.message
    assert (read_exit(config.run) or {})["kind"] == "finished"


def test_a_run_that_has_lost_its_checkpoints_resumes_from_their_copy(
    config_of: Configs, training_world: World, tmp_path: Path
) -> None:
    place = tmp_path / "copies"
    config = config_of(checkpoint={"every_steps": 2, "copy_to": str(place)})
    with prepared(config, training_world) as run:
        save(run, 2, training_world)
    (config.run / CHECKPOINTS_FOLDER / LATEST_NAME).unlink()
    place.mkdir()
    (config.run / CHECKPOINTS_FOLDER).rename(place / config.run.name)

    with prepared(config, training_world) as run:
        assert run.start_step == 2
