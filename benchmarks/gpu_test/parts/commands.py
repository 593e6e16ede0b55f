"""Commands on the device: doctor, a run, its export, samples and scores in fp32 and bf16."""

import json
from pathlib import Path

from benchmarks.gpu_test.bench import WANTS_A_GPU, Bench
from benchmarks.gpu_test.claims import DEVICES, PREFLIGHT, SAMPLE
from benchmarks.gpu_test.runs import last_lines, run_command, run_config
from megaback.distributed.visible_devices import count_devices

_MAX_NATS = 0.01
"""Difference of a score in fp32 from that on a CPU."""


def run(bench: Bench) -> None:
    bench.require(
        "number of devices",
        count_devices() == bench.num_devices,
        f"{count_devices()} are counted, torch has {bench.num_devices}",
        DEVICES,
    )
    device = bench.device.type
    with bench.attempt("doctor", PREFLIGHT):
        _require_success(bench, "doctor", PREFLIGHT, "doctor")
    run_path, model = bench.work / "commands", bench.work / "model"
    config = run_config(bench, run_path, training={"steps": 4, "compile": "off"})
    with bench.attempt("train and convert"):
        _require_success(bench, "train", None, "train", config)
        _require_success(bench, "convert", None, "convert", run_path, "--out", model, "--overwrite")
    for dtype, options in (("float32", ()), ("bfloat16", ()), ("bfloat16", ("--compile",))):
        if options and not bench.is_gpu:
            bench.skip("sample --compile", WANTS_A_GPU, SAMPLE)
            continue
        name = f"sample, {' '.join((dtype, *options))}"
        words = ("sample", model, "--ending", "and so it was.", "-n", 2, "--max-new-tokens", 20)
        with bench.attempt(name, SAMPLE):
            _require_success(
                bench, name, SAMPLE, *words, "--device", device, "--dtype", dtype, *options
            )
    with bench.attempt("score", SAMPLE):
        _check_scores(bench, model, device)


def _require_success(bench: Bench, name: str, claim: str | None, *words: object) -> None:
    done = run_command(*words)
    end = "" if done.returncode == 0 else f": {last_lines(done.stderr + done.stdout)}"
    bench.require(name, done.returncode == 0, f"exit {done.returncode}{end}", claim)


def _check_scores(bench: Bench, model: Path, device: str) -> None:
    """Scores of the device against those of a CPU."""
    pairs = bench.work / "pairs.jsonl"
    lines = [{"question": f"Why {n} boats?", "answer": "Because of the rain."} for n in range(5)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    scores = {}
    for place in (device, "cpu"):
        out = bench.work / f"scores-{place}.jsonl"
        words = ("--out", out, "--overwrite", "--form", "plain", "--device", place)
        done = run_command("score", model, "--in", pairs, *words)
        if done.returncode:
            raise RuntimeError(f"score --device {place}: {last_lines(done.stderr)}")
        text = out.read_text(encoding="utf-8")
        scores[place] = [json.loads(line)["score"]["log_probability"] for line in text.splitlines()]
    difference = max(
        abs(one - other) for one, other in zip(scores[device], scores["cpu"], strict=True)
    )
    bench.require(
        "score",
        difference <= _MAX_NATS,
        f"those of a CPU, at most {_MAX_NATS} nats off",
        SAMPLE,
        max_difference_nats=difference,
    )
