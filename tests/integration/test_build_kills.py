"""Builds that are killed with SIGKILL repeatedly end with the bytes of an uninterrupted build.

Kills come at random moments from the start of the command to the end of an uninterrupted build, and
take a worker, the build's first process, or all of them, without clean-up in between. In addition,
a small build is killed before each of its changes to the file system.
"""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.build.command import build_shards
from data_pipeline.build.plan import BUILD_FOLDER
from data_pipeline.build.settings import BuildSettings
from data_pipeline.build.task import STAGED_FOLDER
from data_pipeline.common import process_pool
from data_pipeline.errors import LaunchError
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit

NUM_TASKS = 8
KILLS = 2
"""Kills per number of workers, with and without a selection: eight in all."""
SEED = 24
SELECTION = ("--deduplicate", "--limit-tokens", "60000")

with_and_without_selection = pytest.mark.parametrize(
    "selection", [(), SELECTION], ids=["all", "selection"]
)


@dataclass(kw_only=True)
class Building:
    """A build of eight tasks: its command, its folder and its finished tasks."""

    out: Path
    source: Path
    tokenizer: Path
    selection: tuple[str, ...] = ()
    done: dict[Path, int] = field(default_factory=dict)
    """Modification time of each file of a finished task."""

    def start(self, *options: object, workers: int = 1) -> "subprocess.Popen[str]":
        """Start the command in a new process group."""
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "data_pipeline.build.command"),
                *("--source", self.source, "--tokenizer", self.tokenizer, "--out", self.out),
                *("--frame-tokens", "256", "--shard-tokens", "4000", "--val-fraction", "0.1"),
                *("--tasks", str(NUM_TASKS), "--workers", str(workers)),
                *self.selection,
                *map(str, options),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, workers: int = 1) -> None:
        process = self.start(workers=workers)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr

    def note_what_is_done(self) -> list[str]:
        """Returns the files of finished tasks that were written again since the last time."""
        again = [
            path.name
            for path, written_ns in self.done.items()
            if path.exists() and path.stat().st_mtime_ns != written_ns
        ]
        shards = self.out / STAGED_FOLDER if self.selection else self.out
        self.done = {
            path: path.stat().st_mtime_ns
            for record in (self.out / BUILD_FOLDER).glob("task-*.json")
            for path in (record, *shards.glob(f"*-{record.stem.removeprefix('task-')}-*.zst"))
        }
        return again


Make = Callable[..., Building]


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory, english_documents: list[str]) -> Path:
    """Source that builds in about a process's start-up time; every other document is repeated."""
    folder = tmp_path_factory.mktemp("source")
    generator = random.Random(SEED)
    for number in range(NUM_TASKS):
        texts = generator.choices(english_documents, k=400)
        records = [
            {"text": f"{text} {number}.{line}" if line % 2 else text}
            for line, text in enumerate(texts)
        ]
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{number:02d}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def make(tmp_path: Path, large_source: Path, tokenizer_path: Path) -> Make:
    """`make(selection)`: a build in a new folder."""
    numbers = count()
    return lambda selection: Building(
        out=tmp_path / str(next(numbers)),
        source=large_source,
        tokenizer=tokenizer_path,
        selection=selection,
    )


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, large_source: Path, tokenizer_path: Path
) -> Callable[..., tuple[dict[str, str], float]]:
    """`uninterrupted(selection, workers)`: output of such a build, and its duration."""

    @cache
    def run(selection: tuple[str, ...], workers: int = 2) -> tuple[dict[str, str], float]:
        out = tmp_path_factory.mktemp("uninterrupted") / "shards"
        started = time.monotonic()
        Building(out=out, source=large_source, tokenizer=tokenizer_path, selection=selection).run(
            workers
        )
        return contents(out), time.monotonic() - started

    return run


def contents(out: Path) -> dict[str, str]:
    """Hashes of all files except records and locks, partial and staged files included."""
    hidden = out / BUILD_FOLDER
    kept = {*hidden.glob("*.lock"), *hidden.glob("task-?????.json")}
    kept |= {*hidden.glob("selected-?????.json")}
    return {
        str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest()
        for path in sorted({*out.rglob("*"), *hidden.rglob("*")} - kept)
        if path.is_file()
    }


def kill_after(
    delay_s: float, victim: str, process: "subprocess.Popen[str]", generator: random.Random
) -> bool:
    """Kill a build's processes and wait until they are gone; False if it had already ended."""
    try:
        process.wait(delay_s)
    except subprocess.TimeoutExpired:
        workers = workers_of(process.pid)
        if victim == "worker" and workers:
            generator.choice(workers).kill()
        elif victim == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            victim = "parent"
            process.kill()
        _, stderr = process.communicate(timeout=60)  # until no process is left that could write
        if victim == "worker":
            assert process.returncode in (0, LaunchError.exit_code), stderr
            assert process.returncode == 0 or "a worker process was killed" in stderr
        require_nobody_left(process.pid)
        return True
    assert process.returncode == 0, process.communicate()
    return False


def workers_of(pid: int) -> list[psutil.Process]:
    try:
        children = psutil.Process(pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def require_nobody_left(group: int) -> None:
    deadline = time.monotonic() + 5
    while left := list(command_lines_of(group)):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def command_lines_of(group: int) -> Iterator[list[str]]:
    """Only living processes: one may end, and become a zombie, between any two queries."""
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                yield process.cmdline()
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue


@pytest.mark.slow
@with_and_without_selection
@pytest.mark.parametrize("workers", [1, 7])
def test_a_build_killed_at_random_moments_ends_with_the_same_bytes(
    workers: int,
    selection: tuple[str, ...],
    make: Make,
    uninterrupted: Callable[..., tuple[dict[str, str], float]],
) -> None:
    expected, _ = uninterrupted(selection)
    same, duration_s = uninterrupted(selection, workers)
    assert same == expected
    generator = random.Random(f"{SEED} {workers} {selection}")
    first = KILLS * (workers > 1) + bool(selection)  # other victims in other tests
    victims = islice(cycle(["worker", "parent", "all"]), first, None)
    print(f"seed {SEED}, an uninterrupted build takes {duration_s:.2f} s")

    building = make(selection)
    kills = 0
    while kills < KILLS:
        delay_s, victim = generator.uniform(0, 1.1 * duration_s), next(victims)
        killed = kill_after(delay_s, victim, building.start(workers=workers), generator)
        print(f"{building.out.name}: {victim} after {delay_s:.3f} s{'' if killed else ', ended'}")
        assert building.note_what_is_done() == []
        kills += killed
        if not killed:
            assert contents(building.out) == expected
            building = make(selection)

    building.run(workers)
    assert building.note_what_is_done() == []
    assert contents(building.out) == expected


@with_and_without_selection
def test_an_array_in_random_order_with_kills_and_duplicates_ends_with_the_same_bytes(
    selection: tuple[str, ...],
    make: Make,
    uninterrupted: Callable[..., tuple[dict[str, str], float]],
) -> None:
    generator = random.Random(f"{SEED} array {selection}")
    print(f"seed {SEED}")
    building = make(selection)
    order = generator.sample(range(NUM_TASKS), NUM_TASKS)
    # Every third task is done by two processes at the same time.
    waiting = deque(index for index in order for _ in range(1 + (index % 3 == 0)))
    to_be_killed = set(generator.sample(order, 3))

    while waiting:
        at_once = [waiting.popleft() for _ in range(min(4, len(waiting)))]
        processes = [(index, building.start("--task-index", index)) for index in at_once]
        for index, process in processes:
            if index in to_be_killed:
                to_be_killed.remove(index)
                if kill_after(generator.uniform(0, 0.5), "all", process, generator):
                    waiting.append(index)
        for _, process in processes:
            _, stderr = process.communicate(timeout=60)
            assert process.returncode in (0, -signal.SIGKILL), stderr

    assert contents(building.out) == uninterrupted(selection)[0]


@with_and_without_selection
@pytest.mark.parametrize("head_start", [0.0, 0.6])
def test_two_concurrent_builds_of_a_folder_end_with_the_same_bytes(
    head_start: float,
    selection: tuple[str, ...],
    make: Make,
    uninterrupted: Callable[..., tuple[dict[str, str], float]],
) -> None:
    expected, duration_s = uninterrupted(selection)
    building = make(selection)
    first = building.start(workers=2)
    time.sleep(head_start * duration_s)
    second = building.start(workers=2)
    for process in (first, second):
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
    assert contents(building.out) == expected


def test_the_next_run_cleans_up_after_a_build_that_was_killed_beside_a_finished_one(
    make: Make, uninterrupted: Callable[..., tuple[dict[str, str], float]]
) -> None:
    building = make(SELECTION)
    building.run()
    (building.out / STAGED_FOLDER).mkdir()
    (building.out / STAGED_FOLDER / "train-00000-00000.zst").write_bytes(b"a shard")
    (building.out / ".train-00000-00000.zst.0123456789ab.partial").write_bytes(b"half a shard")
    building.run()
    assert contents(building.out) == uninterrupted(SELECTION)[0]


_CHANGES = ("replace", "link", "unlink", "mkdir", "rmdir", "fsync")


def _build_until(steps: int, settings: BuildSettings, model_bytes: bytes, out: Path) -> None:
    """Build in this process, and kill it before the given number of file system changes."""
    left = count(steps, -1)
    process_pool.ProcessPoolExecutor = lambda workers, **_: ThreadPoolExecutor(workers)  # type: ignore

    def killing(change: Callable[..., Any]) -> Callable[..., Any]:
        def changing(*args: Any, **options: Any) -> Any:
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **options)

        return changing

    for name in _CHANGES:
        setattr(os, name, killing(getattr(os, name)))
    codec = TextCodec(model_bytes, Direction.BACKWARD, Unit.TOKEN)
    build_shards(settings, codec, out, workers=1, num_tasks=3)


@with_and_without_selection
def test_a_build_killed_before_any_change_to_the_disk_ends_with_the_same_bytes(
    selection: tuple[str, ...],
    english_documents: list[str],
    codec: Callable[..., TextCodec],
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        texts = english_documents[number * 10 : number * 10 + 20]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (source / f"{number}.jsonl").write_text("".join(lines))
    settings = BuildSettings(
        (WeightedSource(str(source)),),
        codec().format.tokenizer_sha256,
        val_fraction=0.2,
        frame_tokens=64,
        deduplicate=bool(selection),
        limit_tokens=1500 if selection else None,
    )
    # Forked from a process without threads that has already imported the modules.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["data_pipeline.build.command", "psutil", "pytest"])

    def build_until(steps: int, out: Path) -> int | None:
        process = server.Process(
            target=_build_until, args=(steps, settings, codec().model_bytes, out)
        )
        process.start()
        process.join(60)
        return process.exitcode

    assert build_until(-1, tmp_path / "uninterrupted") == 0
    expected = contents(tmp_path / "uninterrupted")
    wrong = []
    for steps in count():
        out = tmp_path / str(steps)
        if build_until(steps, out) == 0:
            break
        assert build_until(-1, out) == 0
        if contents(out) != expected:
            wrong.append(steps)
    assert steps > 30
    assert wrong == []
