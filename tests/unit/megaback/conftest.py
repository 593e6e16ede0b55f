"""Fixtures for a rank that trains in the test process."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from megaback.config import Config
    from megaback.distributed.world import World


@pytest.fixture(scope="module")
def training_world() -> "Iterator[World]":
    """One rank on the CPU, started as a real one; environment and signals are restored."""
    import deepspeed
    import torch
    import torch.distributed as dist
    from deepspeed.utils import groups

    from megaback.distributed.world import start_world

    environment, threads = dict(os.environ), torch.get_num_threads()
    linear = torch.nn.functional.linear  # which ZeRO 3 replaces in all of PyTorch
    no_groups = dict(vars(groups))
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    excepthook = sys.excepthook  # which PyTorch replaces for a process group
    num_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    torch.set_num_threads(1)  # fastest for a model this small
    yield start_world("cpu", 60)
    dist.destroy_process_group()
    vars(groups).update(no_groups)  # DeepSpeed would reuse the destroyed groups
    deepspeed.comm.comm.cdb = None
    torch.nn.functional.linear = linear
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.excepthook = excepthook
    resource.setrlimit(resource.RLIMIT_NOFILE, num_files)  # with others, no process starts warm
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def config_of(tmp_path: Path, tiny_shards: Path) -> "Callable[..., Config]":
    """`config_of(name, section={...})`: a run of 4 steps of 4 rows, saved every 2 steps."""
    from tests.helpers.run_config import run_config

    def make(name: str = "run", **sections: object) -> "Config":
        usual = {
            "data": {"shards": str(tiny_shards)},
            "training": {"steps": 4, "precision": "fp32"},
            "hardware": {"device": "cpu", "preflight": "off"},
            "checkpoint": {"every_steps": 2},
            "logging": {"tensorboard": "off"},
        }
        return run_config(tmp_path / name, **(usual | sections))

    return make
