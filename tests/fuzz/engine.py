"""Fuzzing engine: runs a target on many inputs in one process, and keeps those that fail.

Atheris guides the search by coverage if it is installed; otherwise inputs are mutated blindly. An
input fails by any exception that its target does not allow, by more than 5 s of CPU time, and by
more than 1 GiB of memory. One that ends the process remains in `current`.
"""

import hashlib
import json
import mmap
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

MAX_SECONDS = 5.0
MAX_BYTES = 1 << 30
MAX_INPUT_BYTES = 1 << 16
INPUTS_OF_A_FAILURE = 3
"""Maximum number of inputs kept per failing line."""
_ROOT = Path(__file__).parents[2]
_REPORT_INTERVAL_S = 0.5
_SIZE = 8
"""Size in bytes of the length field before an input in `current`."""

Mutate = Callable[[bytes, random.Random], bytes]


class TooSlowError(BaseException):
    """Not an Exception, so that no handler of the target catches it."""


@dataclass(frozen=True)
class Target:
    """A function that reads untrusted input, with its seeds and allowed errors."""

    name: str
    run: Callable[[bytes], None]
    seeds: Sequence[bytes]
    mutate: Mutate
    allowed: tuple[type[BaseException], ...]


@dataclass
class Result:
    """Result of a target, as written by the process that runs it."""

    inputs: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    """Number of failed inputs, by exception and line that raised it."""
    slowest_s: float = 0.0
    slowest_bytes: int = 0


@contextmanager
def limits() -> Iterator[None]:
    """Raise TooSlowError or MemoryError in a block that exceeds its limits."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TooSlowError(f"more than {MAX_SECONDS:.0f} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    taken = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, memory[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, memory)


def failure_of(target: Target, data: bytes) -> tuple[BaseException | None, float]:
    """The forbidden exception of a target, if any, and its time in seconds."""
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        target.run(data)
    except target.allowed:
        return None, time.process_time() - started
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - unexpected exceptions are the result
        return error, time.process_time() - started
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None, time.process_time() - started


class Trial:
    """Runs inputs and counts results; keeps failing inputs with their tracebacks."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.result = Result()
        self._target = target
        self._failures = folder / "failures" / target.name
        self._report = folder / f"{target.name}.json"
        self._reported_s = 0.0
        current = folder / f"{target.name}.current"
        current.write_bytes(bytes(_SIZE + MAX_INPUT_BYTES))
        with current.open("r+b") as file:
            self._current = mmap.mmap(file.fileno(), 0)

    def try_one(self, data: bytes) -> None:
        data = data[:MAX_INPUT_BYTES]
        self._current[: _SIZE + len(data)] = len(data).to_bytes(_SIZE, "little") + data
        error, seconds = failure_of(self._target, data)
        result = self.result
        result.inputs += 1
        if seconds > result.slowest_s:
            result.slowest_s, result.slowest_bytes = seconds, len(data)
        if error is not None:
            self._keep(error, data)
        if error is not None or time.monotonic() - self._reported_s > _REPORT_INTERVAL_S:
            self.report()

    def report(self) -> None:
        self._reported_s = time.monotonic()
        self._report.write_text(json.dumps(self.result.__dict__))

    def _keep(self, error: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if is_ours(frame.filename)] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        name = f"{type(error).__name__} at {place}"
        number = self.result.failures.get(name, 0)
        self.result.failures[name] = number + 1
        if number < INPUTS_OF_A_FAILURE:
            said = "".join(traceback.format_exception(error))
            keep(self._failures, data, said)


def is_ours(file: str) -> bool:
    """Whether a file is of the repository, outside its virtual environment."""
    return file.startswith(f"{_ROOT}/") and not file.startswith(f"{_ROOT}/.")


def keep(folder: Path, data: bytes, said: str) -> Path:
    """Save an input that failed, with its traceback."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(said, encoding="utf-8", errors="backslashreplace")
    return path


def current_input(path: Path) -> bytes:
    """The input that a process was running when it ended."""
    data = path.read_bytes()
    return data[_SIZE : _SIZE + int.from_bytes(data[:_SIZE], "little")]


def mutate_blindly(trial: Trial, target: Target, seconds: float, inputs: int, seed: int) -> None:
    """Run the seeds, and then mutations of them and of earlier mutations."""
    generator = random.Random(seed)
    ends_s = time.monotonic() + seconds
    pool = list(target.seeds)
    for data in target.seeds:
        trial.try_one(data)
    while trial.result.inputs < inputs and time.monotonic() < ends_s:
        data = target.mutate(generator.choice(pool), generator)
        trial.try_one(data)
        if generator.random() < 0.05:
            place = generator.randrange(len(target.seeds), len(target.seeds) + 64)
            pool[place : place + 1] = [data]


def search(trial: Trial, target: Target, seconds: float, inputs: int, folder: Path) -> None:
    """Run atheris, which looks for inputs that reach new code. Ends the process."""
    import atheris

    corpus = folder / "corpus" / target.name
    corpus.mkdir(parents=True, exist_ok=True)
    for data in target.seeds:
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)

    def mutated(data: bytes, max_size: int, seed: int) -> bytes:
        generator = random.Random(seed)
        if generator.random() < 0.5:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutate(data, generator)[:max_size]

    options: dict[str, int | str] = {
        "max_total_time": int(seconds),
        "runs": inputs,
        "max_len": MAX_INPUT_BYTES,
        "timeout": 300,
        "rss_limit_mb": 0,
        "verbosity": 0,
        "print_final_stats": 0,
    }
    options |= {"artifact_prefix": f"{folder}/"}
    words = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(corpus)]
    atheris.Setup(words, trial.try_one, custom_mutator=mutated)
    atheris.Fuzz()


def instrumented() -> Any:
    """Instrument modules of megaback imported in the block for atheris's coverage."""
    import atheris

    return atheris.instrument_imports(include=["data_pipeline", "megaback", "tools", "launcher"])
