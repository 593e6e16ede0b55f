"""Process pools, and workers killed while another starts."""

import time
from multiprocessing import active_children
from multiprocessing.context import SpawnProcess

import pytest

from data_pipeline.common.process_pool import run_in_processes
from data_pipeline.errors import LaunchError


def test_a_worker_killed_while_another_starts_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = SpawnProcess.start
    started: list[SpawnProcess] = []

    def start_after_a_kill(process: SpawnProcess) -> None:
        if started:
            started[0].kill()
            queue = process._args[0]  # type: ignore[attr-defined]
            give_up = time.monotonic() + 30
            while not queue._reader.closed:  # until the pool has noticed
                assert time.monotonic() < give_up
                time.sleep(0.01)
        started.append(process)
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", start_after_a_kill)
    with pytest.raises(LaunchError, match="a worker process was killed"):
        list(run_in_processes(time.sleep, [(60,), (60,)], workers=2))
    assert len(started) == 2
    assert active_children() == []
