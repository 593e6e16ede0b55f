"""A device's process that is killed, idle or working, is reported."""

import time
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import LaunchError, MegabackError
from megaback.inference.device_pool import DevicePool
from megaback.inference.likelihood import Continuation

_WORK = [Continuation((1,), (2,))]


def test_a_killed_device_process_is_reported_to_the_caller(tmp_path: Path) -> None:
    with DevicePool(tmp_path, [torch.device("cpu")] * 2, torch.float32) as pool:
        with pytest.raises(MegabackError) as caught:
            pool.result(pool.submit(_WORK))  # there is no model, but the process has started
        assert not isinstance(caught.value, LaunchError)
        running = pool.submit(_WORK)  # on the other device, whose process starts slowly
        for process in active_children():
            process.kill()
        with pytest.raises(LaunchError, match="process was killed"):
            pool.result(running)
        give_up = time.monotonic() + 30
        while not pool._pools[0]._broken:  # type: ignore[attr-defined]
            assert time.monotonic() < give_up
            time.sleep(0.01)
        with pytest.raises(LaunchError, match="process was killed"):
            pool.submit(_WORK)
    assert active_children() == []
