"""The parts of the GPU test: on a CPU, with made-up answers of PyTorch, and on the fake GPU."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.parts import attention, out_of_memory, resume, sampling, speed, waits
from benchmarks.gpu_test.results import read_checks
from benchmarks.gpu_test.waiting import counted_waits, is_ours
from megaback.config_file import load_config
from megaback.rehearsal.memory_meter import MemoryMeter
from tests.helpers.fake_gpu import gpu, moved, on_fake_gpu


def bench_of(tmp_path: Path, device: str | torch.device = "cpu") -> Bench:
    return Bench(torch.device(device), "smoke", tmp_path, tmp_path / "results.jsonl", 1)


def statuses(bench: Bench) -> dict[str, str]:
    return {one.name: one.status for one in read_checks(bench.results)}


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_backend_that_sees_other_documents_fails(tmp_path: Path, is_wrong: bool) -> None:
    def attend(query: Any, key: Any, value: Any, segments: Any) -> Any:
        if is_wrong:
            lengths = (sum(segments.lengths),)
            segments = attention.Segments.from_lengths(lengths, torch.device("cpu"))
        return attention.sdpa_attention(query, key, value, segments)

    bench = bench_of(tmp_path)
    attention._check_backend(bench, "mine", attend)

    assert statuses(bench)["mine, uneven documents"] == ("failed" if is_wrong else "passed")


def test_waits_are_counted_by_line_of_code(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with counted_waits(torch.device("cuda")) as places:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered …)", stacklevel=1)
        warnings.warn("another", stacklevel=1)

    assert modes == ["warn", "default"]
    assert len(places) == 2
    assert len(set(places)) == 1
    assert places[0].startswith("tests/unit/test_gpu_test_parts.py:")
    assert is_ours(places[0])
    assert not is_ours("deepspeed/runtime/engine.py:3")


def test_runs_that_differ_are_named(tmp_path: Path) -> None:
    for name, losses in (("whole", (1.0, 0.5)), ("cut", (1.0, 0.25))):
        folder = tmp_path / name
        step = folder / "checkpoints" / "step-00000002"
        step.mkdir(parents=True)
        (step / "weights").write_text(f"{losses[1]}")
        (folder / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": number, "loss": loss, "tokens_per_s": hash(name)}) + "\n"
                for number, loss in enumerate(losses, start=1)
            )
        )

    def found(other: str) -> list[str]:
        return list(resume.differences(tmp_path / "whole", tmp_path / other, 2))

    assert found("whole") == []
    assert found("cut") == [
        "metrics differ from step 2",
        "weights of the last checkpoint differs",
    ]


def device_of_80_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda _device: SimpleNamespace(total_memory=80_000_000_000, name="NVIDIA H100 80GB HBM3"),
    )


def test_measured_rows_fit_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_of_80_gb(monkeypatch)
    bench = bench_of(tmp_path)
    bench.size, bench.device = "full", torch.device("cuda")
    rows = {}
    for shape in (speed.XCOAX, speed.BILLION):
        config = speed.fitting(speed._config(bench, shape, "varlen"), bench, shape.vocab_size)
        memory = speed.planned_memory(config, shape.vocab_size, 1, "cuda")
        assert memory.parts.total < 80e9
        rows[shape.name] = config.batch.micro_batch_rows

    assert rows == {"xcoax_100bt": 64, "reverse_1b": 4}


def test_the_run_without_memory_cannot_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device_of_80_gb(monkeypatch)
    monkeypatch.setattr(
        torch.cuda, "memory_snapshot", lambda: [{"is_expandable": True}, {"is_expandable": False}]
    )
    monkeypatch.setattr(out_of_memory.torch, "empty", lambda *_, **__: SimpleNamespace(nbytes=1))
    written: list[Any] = []

    def run_command(_name: str, config: Path) -> SimpleNamespace:
        written.append(load_config(config, ()))
        return SimpleNamespace(returncode=54, stderr="rank 0 on n is out of memory: …", stdout="")

    monkeypatch.setattr(out_of_memory, "run_command", run_command)
    monkeypatch.setattr("benchmarks.gpu_test.runs.shards_of", lambda bench: bench.work)
    bench = bench_of(tmp_path)
    bench.size, bench.device = "full", torch.device("cuda")
    out_of_memory.run(bench)

    assert statuses(bench) == {"expandable segments": "passed", "a run that does not fit": "passed"}
    memory = speed.planned_memory(written[0], 600, 1, "cuda")
    assert memory.parts.total > 2 * 80e9


@on_fake_gpu
def _parts_on_the_fake_gpu(folder: Path) -> None:
    def meter(_device: object) -> Any:
        return SimpleNamespace(wait=lambda: None, peak_bytes=lambda: 1, restart=lambda: None)

    MemoryMeter.of = meter  # type: ignore[assignment,method-assign]  # this process is a fork

    def new_model(shape: Any, _bench: object) -> Any:
        model = sampling.ReverseGPT(shape, sampling._VOCAB_SIZE)
        model.initialize(0)
        return moved(model.to(torch.bfloat16)).eval()

    sampling._new_model = new_model
    sampling.find_spec = lambda _name: None  # type: ignore[assignment]
    bench = bench_of(folder, gpu())
    attention.run(bench)
    sampling.run(bench)
    waits._check_overlap(bench)
    found = statuses(bench)
    assert "failed" not in found.values(), found
    assert found["sdpa, uneven documents"] == "passed"
    assert found["copies during computation"] == "passed"


def test_parts_run_on_the_fake_gpu(tmp_path: Path) -> None:
    """No tensor is left on the host, and no stream uses what it has not waited for."""
    _parts_on_the_fake_gpu(tmp_path)
