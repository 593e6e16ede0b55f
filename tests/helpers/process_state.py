"""State of a test process that is there after a test, so that later results depend on it.

A library that a test imports first is none, nor are variables that it sets then.
"""

import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_LIMITS = [name for name in dir(resource) if name.startswith("RLIMIT_")]
_OTHER_VARIABLES = ("PYTEST_", "KMP_", "PYTORCH_", "TOKENIZERS_", "TORCHINDUCTOR_")
"""Starts of names of variables that pytest sets, and libraries as they are imported."""
_LAZY = "transformers"
"""A module that replaces itself."""
_WAIT_S = 5
"""Seconds that a thread which was asked to end is waited for."""


def process_state() -> dict[str, Any]:
    """The state by name: values that are equal while nothing has changed."""
    root = logging.getLogger()
    variables = {k: v for k, v in os.environ.items() if not k.startswith(_OTHER_VARIABLES)}
    return {
        "working directory": Path.cwd(),
        "sys.path": [path for path in sys.path if not _is_of_a_library(path)],
        "sys.excepthook": sys.excepthook,
        "blocked signals": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "processors": os.sched_getaffinity(0),
        "logging level": (root.level, root.manager.disable),
        "process group": dist.is_available() and dist.is_initialized(),
        "torch.nn.functional.linear": torch.nn.functional.linear,
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of torch's threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        **{f"handler of {number.name}": signal.getsignal(number) for number in _SIGNALS},
        **{name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS},
        **{f"variable {name}": value for name, value in variables.items()},
        **{f"module {name}": module for name, module in sys.modules.items() if name != _LAZY},
    }


def _is_of_a_library(path: str) -> bool:
    """Whether a library adds it to `sys.path` as it is imported: setuptools, transformers."""
    return "site-packages" in path or path == os.environ.get("HF_MODULES_CACHE")


def changes(before: Mapping[str, Any]) -> list[str]:
    """A line for each change since `before`."""
    after = process_state()
    names = sorted(
        name
        for name in {*before, *after}
        if before.get(name) != after.get(name)
        and not (name.startswith("module ") and name not in before)
    )
    return [f"{name} was {before.get(name)}, is {after.get(name)}" for name in names]


def running_threads() -> set[threading.Thread]:
    """Threads that the process would wait for at its end."""
    return {thread for thread in threading.enumerate() if not thread.daemon}


def left_threads(before: set[threading.Thread]) -> list[str]:
    """A line for each thread that was started since and does not end."""
    give_up = time.monotonic() + _WAIT_S
    while (left := running_threads() - before) and time.monotonic() < give_up:
        time.sleep(0.01)
    return sorted(f"thread {thread.name} runs" for thread in left)
