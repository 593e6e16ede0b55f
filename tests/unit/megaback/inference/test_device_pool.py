"""Processes of devices, and one that is killed while it has work, or none."""

import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import LaunchError, MegabackError
from megaback.inference.device_pool import DevicePool
from megaback.inference.likelihood import Continuation

_WORK = [Continuation((1,), (2,))]


def test_whoever_asks_a_device_whose_process_was_killed_hears_of_it(tmp_path: Path) -> None:
    with DevicePool(tmp_path, [torch.device("cpu")] * 2) as pool:
        with pytest.raises(MegabackError) as caught:
            pool.result(pool.submit(_WORK))  # there is no model, but a process that looked for it
        assert not isinstance(caught.value, LaunchError)
        running = pool.submit(_WORK)  # of the other one, which takes a while to start
        for process in active_children():
            process.kill()
        with pytest.raises(LaunchError, match="killed from outside"):
            pool.result(running)
        give_up = time.monotonic() + 30
        while not pool._pools[0]._broken:  # type: ignore[attr-defined]
            assert time.monotonic() < give_up
            time.sleep(0.01)
        with pytest.raises(LaunchError, match="killed from outside"):
            pool.submit(_WORK)
    assert active_children() == []
