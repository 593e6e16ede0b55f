"""Fault injector, loaded by every Python that has this folder on its path.

FAULT is a JSON object: `at` (`module:Class.function`), `rank`, `call` (number of the call, from 1),
`when` (before or after it) and `do` (kill, abort, raise, run out of memory, nan, sleep, wait).
With `training`, calls count only if the model is in training mode.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

FAULT: dict[str, Any] = json.loads(os.environ.get("FAULT", "null")) or {}


def act(result: Any) -> Any:
    """Cause the fault; returns the function's result."""
    deed = FAULT["do"]
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "abort":
        os.abort()
    elif deed == "raise":
        raise MemoryError("cannot allocate 1 PiB")
    elif deed == "run out of memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.81 GiB. GPU 0 has …")
    elif deed == "sleep":
        time.sleep(FAULT["seconds"])
    elif deed == "wait":
        (run,) = (word.removeprefix("run=") for word in sys.argv if word.startswith("run="))
        while not Path(f"{run}.released").exists():
            time.sleep(0.02)
    elif deed == "nan":
        return result * float("nan")
    return result


def faulty(function: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper of the function that causes the fault in the chosen call."""
    calls = 0

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        if FAULT.get("training") and not arguments[0].training:
            return function(*arguments, **options)
        calls += 1
        is_now = FAULT["call"] <= calls < FAULT["call"] + FAULT.get("times", 1)
        if is_now and FAULT["when"] == "before":
            act(None)
        result = function(*arguments, **options)
        return act(result) if is_now and FAULT["when"] == "after" else result

    return wrapper


def make_faulty(module: ModuleType, place: str) -> None:
    """Replace a function of a module, also where other modules have imported it already."""
    *owners, function_name = place.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, function_name)
    replacement = faulty(original)
    setattr(owner, function_name, replacement)
    for other in [] if owners else [*sys.modules.values()]:
        for name in [name for name, value in vars(other).items() if value is original]:
            setattr(other, name, replacement)


class Finder(importlib.abc.MetaPathFinder):
    """Import hook that wraps the function when its module is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        module_name, _, place = FAULT["at"].partition(":")
        if name != module_name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            make_faulty(module, place)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if FAULT and os.environ.get("RANK") == str(FAULT["rank"]):
    _name, _, _place = FAULT["at"].partition(":")
    if _name in sys.modules:
        make_faulty(sys.modules[_name], _place)
    else:
        sys.meta_path.insert(0, Finder())
