"""The fuzzer finds planted bugs, and a few hundred inputs of each target find none."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[1] / "fuzz"
sys.path.append(str(FUZZ))

import engine  # noqa: E402
import mutations  # noqa: E402
import run as fuzz  # noqa: E402

SMOKE_INPUTS = 100


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    yield
    assert engine.signal.getitimer(engine.signal.ITIMER_PROF) == (0.0, 0.0)


def try_planted(tmp_path: Path, run: Callable[[bytes], None]) -> engine.Result:
    """Result of 300 inputs mutated from one."""
    target = engine.Target("planted", run, [b"a seed"], mutations.mutate_bytes, (ValueError,))
    trial = engine.Trial(target, tmp_path)
    with engine.limits():
        engine.mutate_blindly(trial, target, seconds=20, inputs=300, seed=1)
    return trial.result


def test_an_unexpected_exception_is_kept_once_per_line(tmp_path: Path) -> None:
    def run(data: bytes) -> None:
        if len(data) > 6:
            raise IndexError("too long")
        if data != b"a seed":
            raise ValueError("allowed")

    result = try_planted(tmp_path, run)
    ((name, number),) = result.failures.items()
    kept = [path for path in (tmp_path / "failures/planted").iterdir() if not path.suffix]
    assert name.startswith("IndexError at test_fuzz.py:")
    assert (result.inputs, len(kept)) == (300, min(number, engine.INPUTS_OF_A_FAILURE))
    assert all(len(path.read_bytes()) > 6 for path in kept)


def test_an_input_that_takes_too_much_time_or_memory_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_SECONDS", 0.2)

    def slow(data: bytes) -> None:
        ends_s = time.process_time() + 3 * (len(data) == 6)
        while time.process_time() < ends_s:
            pass

    def large(_data: bytes) -> None:
        bytearray(2 * engine.MAX_BYTES)

    target = engine.Target("slow", slow, [b"a seed"], mutations.mutate_bytes, ())
    with engine.limits():
        error, seconds = engine.failure_of(target, b"a seed")
        assert isinstance(error, engine.TooSlowError)
        assert 0.1 <= seconds < 1.5  # the alarm uses another clock
        assert engine.failure_of(target, b"")[0] is None
    assert list(try_planted(tmp_path, large).failures) == [
        f"MemoryError at test_fuzz.py:{large.__code__.co_firstlineno + 1}"
    ]


def test_an_input_that_ends_the_process_is_kept(tmp_path: Path) -> None:
    code = f"""
import os, sys
sys.path[:0] = [{str(FUZZ)!r}]
from pathlib import Path
import engine
target = engine.Target("planted", lambda data: data == b"end" and os._exit(3), [], None, ())
trial = engine.Trial(target, Path({str(tmp_path)!r}))
for data in (b"a", b"b", b"end"):
    trial.try_one(data)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 3
    assert engine.current_input(tmp_path / "planted.current") == b"end"


def test_mutations_are_the_same_for_the_same_seed_and_differ_from_their_input() -> None:
    data = b'{"a": [1, {"b": "text"}], "c": null}'
    for mutate in (mutations.mutate_bytes, mutations.mutate_json, mutations.mutate_lines):
        made = [mutate(data, random.Random(seed)) for seed in range(200)]
        assert made == [mutate(data, random.Random(seed)) for seed in range(200)]
        assert len(set(made) - {data}) > 100, mutate


@pytest.mark.parametrize("module", fuzz.MODULES)
def test_a_few_inputs_of_each_target_find_nothing(module: str, tmp_path: Path) -> None:
    names = fuzz.MODULES[module]
    code = f"""
import sys
sys.path[:0] = [{str(FUZZ)!r}, {str(FUZZ.parents[1])!r}]
from pathlib import Path
import run
if __name__ == "__main__":
    for name in {names!r}:
        run.run_target(name, Path({str(tmp_path)!r}), 20, {SMOKE_INPUTS}, "blind", 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in names:
        result = engine.Result(**fuzz.json.loads((tmp_path / f"{name}.json").read_text()))
        assert result.failures == {}, name
        assert result.inputs >= SMOKE_INPUTS, name


def test_an_input_can_be_tried_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "redactor"
    folder.mkdir()
    (folder / "0123").write_bytes(b"https://user:password@host/x")
    assert fuzz.replay(folder / "0123") == 0
    assert "passes" in capfd.readouterr().out
