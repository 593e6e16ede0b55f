"""Pipeline of checkpoints: written, completed and copied while training continues."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from megaback.checkpoints import saver as checkpoint_saver
from megaback.checkpoints.checkpoint import CheckpointMeta, newest_checkpoint
from megaback.checkpoints.pipeline import CheckpointPipeline
from megaback.checkpoints.remote_copy import CopyTarget
from megaback.checkpoints.safetensors_file import write_tensors
from megaback.config import Config
from megaback.distributed.engine import start_engine
from megaback.distributed.world import World
from megaback.faults.watchdog import Watchdog
from megaback.model.gpt import ReverseGPT
from megaback.run_folder import complete_checkpoints


@pytest.fixture
def config(config_of: Callable[..., Config], tmp_path: Path) -> Config:
    """Config of a run that copies its checkpoints."""
    return config_of(checkpoint={"copy_to": str(tmp_path / "copies")})


@pytest.fixture
def engine(config: Config, training_world: World) -> object:
    return start_engine(ReverseGPT(config.model, 50), config, 2, 2)


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def pipeline(config: Config, training_world: World, logged: list[str]) -> CheckpointPipeline:
    watchdog = Watchdog(config.run, config.hardware, training_world)
    return CheckpointPipeline(
        config.run, b"tokenizer", config.checkpoint, training_world, watchdog, logged.append
    )


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Event that blocks writing until it is set."""
    event = Event()

    def wait_and_write(path: Path, specs: object, of: object) -> object:
        event.wait(20)
        return write_tensors(path, specs, of)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_saver, "write_tensors", wait_and_write)
    yield event
    event.set()


def copied(config: Config) -> list[str]:
    assert config.checkpoint.copy_to is not None
    return CopyTarget(config.checkpoint.copy_to, config.run).complete()


def names(config: Config) -> list[str]:
    return [path.name for path in complete_checkpoints(config.run)]


def test_a_step_does_not_wait_for_a_checkpoint_that_is_being_written(
    pipeline: CheckpointPipeline,
    engine: object,
    config: Config,
    meta_at: Callable[..., CheckpointMeta],
    gate: Event,
) -> None:
    pipeline.save(engine, meta_at(1))
    pipeline.advance(is_writing=pipeline.is_writing, is_copying=pipeline.is_copying)
    assert pipeline.is_writing
    assert names(config) == []

    gate.set()
    pipeline.finish_writing(1)

    assert names(config) == ["step-00000001"]
    assert copied(config) == []


def test_a_completed_checkpoint_is_copied_from_the_next_step_on(
    pipeline: CheckpointPipeline,
    engine: object,
    config: Config,
    meta_at: Callable[..., CheckpointMeta],
) -> None:
    pipeline.save(engine, meta_at(1))
    pipeline.finish_writing(1)

    pipeline.advance(is_writing=False, is_copying=False)
    while pipeline.is_copying:
        pipeline.advance(is_writing=False, is_copying=True)
    assert copied(config) == []  # until all ranks have agreed that none is copying
    pipeline.advance(is_writing=False, is_copying=False)

    assert copied(config) == ["step-00000001"]


def test_a_checkpoint_is_incomplete_while_another_rank_writes(
    pipeline: CheckpointPipeline,
    engine: object,
    config: Config,
    meta_at: Callable[..., CheckpointMeta],
) -> None:
    pipeline.save(engine, meta_at(1))
    while pipeline.is_writing:
        pass

    pipeline.advance(is_writing=True, is_copying=False)

    assert names(config) == []


def test_draining_completes_every_checkpoint_and_copies_the_last_one(
    pipeline: CheckpointPipeline,
    engine: object,
    config: Config,
    meta_at: Callable[..., CheckpointMeta],
    training_world: World,
    logged: list[str],
) -> None:
    for step in (1, 2, 3):
        pipeline.save(engine, meta_at(step))
    pipeline.drain(3)

    assert names(config)[-1] == copied(config)[-1] == "step-00000003"
    found = newest_checkpoint(config.run, training_world)
    assert found is not None
    assert found[1].step == 3
    assert logged == []
