"""`make fuzz`: runs every target for a while, prints the results, and keeps failing inputs.

`--input FILE` runs one kept input again. Without atheris (`pip install atheris`), inputs are
mutated blindly.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import engine  # noqa: E402

FOLDER = HERE.parents[1] / "fuzz"
MODULES = {
    "data_targets": (
        *("shard", "manifest", "task-record", "plan", "redactor", "hostfile", "config"),
        "tokenizer",
    ),
    "source_targets": ("records", "source", "tokenized"),
    "model_targets": ("safetensors", "weight-index", "model-config", "request-body", "request"),
}
NAMES = tuple(name for names in MODULES.values() for name in names)
_GRACE_S = 120.0
"""Additional seconds for writing seeds, and for one input that does not end."""


def target_of(name: str, folder: Path) -> engine.Target:
    module = next(module for module, names in MODULES.items() if name in names)
    target: engine.Target = importlib.import_module(module).TARGETS[name](folder)
    return target


def run_target(name: str, folder: Path, seconds: float, inputs: int, how: str, seed: int) -> None:
    """Run one target in this process. With atheris, the process ends here."""
    folder.mkdir(parents=True, exist_ok=True)
    guided = how == "atheris"
    with TemporaryDirectory(prefix="megaback-fuzz-") as scratch:
        with engine.instrumented() if guided else nullcontext():
            target = target_of(name, Path(scratch))
        trial = engine.Trial(target, folder)
        with engine.limits():
            if guided:
                engine.search(trial, target, seconds, inputs, folder)
            else:
                engine.mutate_blindly(trial, target, seconds, inputs, seed)
        trial.report()


def replay(path: Path) -> int:
    """Run one input again; its folder has the target's name. Returns 1 if it fails."""
    name = path.resolve().parent.name
    with TemporaryDirectory(prefix="megaback-fuzz-") as scratch:
        target = target_of(name, Path(scratch))
        with engine.limits():
            error, seconds = engine.failure_of(target, path.read_bytes())
    if error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
    print(f"{path}: {'fails' if error is not None else 'passes'}, {seconds:.2f} s", flush=True)
    return error is not None


def in_process(name: str, options: argparse.Namespace, folder: Path) -> engine.Result:
    """Run one target in its own process, which may end in any way."""
    words = [sys.executable, str(HERE / "run.py"), "--only", name, "--folder", str(folder)]
    words += ["--seconds", str(options.seconds), "--inputs", str(options.inputs)]
    words += ["--engine", options.engine, "--seed", str(options.seed)]
    report, current = folder / f"{name}.json", folder / f"{name}.current"
    for path in (report, current):
        path.unlink(missing_ok=True)
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(options.seconds + _GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    result = engine.Result(**json.loads(report.read_text())) if report.exists() else engine.Result()
    if code != 0:
        how = "did not end" if code is None else f"ended its process with {code}"
        kept = "before any input"
        if current.exists():
            data = engine.current_input(current)
            kept = str(
                engine.keep(folder / "failures" / name, data, log.read_text(errors="replace"))
            )
        result.failures[f"{how} ({kept}, {log})"] = 1
    return result


def table(results: dict[str, engine.Result]) -> str:
    lines = [f"{'target':<14}{'inputs':>10}{'distinct failures':>19}  slowest input"]
    for name, one in results.items():
        slowest = f"{one.slowest_s:.3f} s, {one.slowest_bytes:,} bytes"
        lines.append(f"{name:<14}{one.inputs:>10,}{len(one.failures):>19}  {slowest}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="per target")
    parser.add_argument("--inputs", type=int, default=1 << 30, help="maximum per target")
    parser.add_argument("--targets", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--engine", choices=("atheris", "blind", "auto"), default="auto")
    parser.add_argument("--seed", type=int, default=time.time_ns() % (1 << 32))
    parser.add_argument("--input", type=Path, help="input to run again")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.input is not None:
        return replay(options.input)
    if options.engine == "auto":
        options.engine = "atheris" if find_spec("atheris") else "blind"
    if options.only is not None:
        rest = (options.seconds, options.inputs, options.engine, options.seed)
        run_target(options.only, options.folder, *rest)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{options.seconds:.0f} s each, engine {options.engine}, seed {options.seed}", flush=True)
    results = {}
    for name in options.targets:
        results[name] = in_process(name, options, options.folder)
        for failure, number in results[name].failures.items():
            print(f"{name}: {number:,} x {failure}", flush=True)
    print(table(results))
    if any(result.failures for result in results.values()):
        print(f"Inputs that failed are in {options.folder / 'failures'}: make fuzz INPUT=FILE")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
