"""Commands on the device: doctor, a run, its export, samples and scores in fp32 and bf16."""

import json
from pathlib import Path

from benchmarks.gpu_test.bench import WANTS_A_GPU, Bench
from benchmarks.gpu_test.claims import DEVICES, GRAPHS, PREFLIGHT, SAMPLE, SCORES
from benchmarks.gpu_test.runs import last_lines, run_command, run_config
from megaback.distributed.visible_devices import count_devices

MAX_FP32_NATS = 1e-3
MAX_BF16_NATS = 0.1


def run(bench: Bench) -> None:
    bench.require(
        "number of devices",
        count_devices() == bench.num_devices,
        f"{count_devices()} are counted, torch has {bench.num_devices}",
        DEVICES,
    )
    device = bench.device.type
    with bench.attempt("doctor", PREFLIGHT):
        _check_doctor(bench)
    run_path, model = bench.work / "commands", bench.work / "model"
    config = run_config(bench, run_path, training={"steps": 4, "compile": "off"})
    with bench.attempt("train and convert"):
        _require_success(bench, "train", None, "train", config)
        _require_success(bench, "convert", None, "convert", run_path, "--out", model, "--overwrite")
    with bench.attempt("samples", SAMPLE):
        _check_samples(bench, model, device)
    with bench.attempt("scores", SAMPLE):
        _check_scores(bench, model, device)


def _check_doctor(bench: Bench) -> None:
    """Doctor's facts of this device; a machine without Slurm, say, is not ready for all."""
    done = run_command("doctor")
    lines = [line.split(None, 1) for line in done.stdout.splitlines() if line.strip()]
    found = {" ".join(rest).partition(":")[0]: word for word, *rest in lines}
    claim = "train on GPUs" if bench.is_gpu else "train on CPUs"
    missing = [what for what, word in found.items() if word == "no"]
    bench.require(
        f"doctor: {claim}",
        found.get(claim) == "yes",
        f"exit {done.returncode}; no: {', '.join(missing)}",
        PREFLIGHT,
    )


def _check_samples(bench: Bench, model: Path, device: str) -> None:
    """Greedy samples, which CUDA graphs do not change."""
    texts = {}
    words = ("sample", model, "--ending", "and so it was.", "-n", 2, "--max-new-tokens", 20)
    for options in (
        ("--dtype", "float32"),
        ("--dtype", "float32", "--no-cuda-graphs"),
        ("--dtype", "bfloat16"),
        ("--dtype", "bfloat16", "--compile"),
    ):
        name = f"sample {' '.join(options)}"
        if "--compile" in options and not bench.is_gpu:
            bench.skip(name, WANTS_A_GPU, SAMPLE)
            continue
        texts[options] = _require_success(
            bench, name, SAMPLE, *words, "--device", device, "--temperature", 0, *options
        )
    with_graphs, without, *_ = texts.values()
    bench.require(
        "sample: graphs", with_graphs == without, "the same text with and without them", GRAPHS
    )


def _require_success(bench: Bench, name: str, claim: str | None, *words: object) -> str:
    """The output of a command."""
    done = run_command(*words)
    end = "" if done.returncode == 0 else f": {last_lines(done.stderr + done.stdout)}"
    bench.require(name, done.returncode == 0, f"exit {done.returncode}{end}", claim)
    return done.stdout


def _check_scores(bench: Bench, model: Path, device: str) -> None:
    """Scores of the device against those of a CPU in fp32."""
    pairs = bench.work / "pairs.jsonl"
    lines = [{"question": f"Why {n} boats?", "answer": "Because of the rain."} for n in range(5)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    exact = _scores(bench, model, pairs, "cpu", "float32")
    for dtype, bound in (("float32", MAX_FP32_NATS), ("bfloat16", MAX_BF16_NATS)):
        found = _scores(bench, model, pairs, device, dtype)
        difference = max(abs(one - other) for one, other in zip(found, exact, strict=True))
        bench.require(
            f"score in {dtype}",
            difference <= bound,
            f"those of a CPU in float32, at most {bound} nats per token off",
            SAMPLE if dtype == "float32" else SCORES,
            max_difference_nats_per_token=difference,
        )


def _scores(bench: Bench, model: Path, pairs: Path, device: str, dtype: str) -> list[float]:
    """Log-probabilities per token."""
    out = bench.work / f"scores-{device}-{dtype}.jsonl"
    words = ("--out", out, "--overwrite", "--form", "plain", "--device", device, "--dtype", dtype)
    done = run_command("score", model, "--in", pairs, *words)
    if done.returncode:
        raise RuntimeError(f"score --device {device}: {last_lines(done.stderr)}")
    text = out.read_text(encoding="utf-8")
    return [json.loads(line)["score"]["per_token"] for line in text.splitlines()]
