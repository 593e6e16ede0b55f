"""Attention kernels against PyTorch's attention, and real runs, on a CUDA device."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from megaback.model.attention import Segments, padded_boundaries, sdpa_attention
from megaback.model.attention_choice import choose_attention, why_unusable
from megaback.model.flash_attention import KERNELS, FlashKernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
LENGTHS = (1, 7, 128, 300, 64)


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> FlashKernel:
    """Every kernel that can be used here."""
    found: FlashKernel = request.param
    reason = why_unusable(found, torch.device("cuda"), torch.bfloat16, 64)
    if reason is not None:
        pytest.skip(f"{found.name}: {reason}")
    return found


def padded_segments() -> Segments:
    """Segments with empty ones at the end, as in training."""
    edges = padded_boundaries(
        Segments.from_lengths(LENGTHS, torch.device("cpu")).cu_seqlens.numpy()
    )
    return Segments(torch.from_numpy(edges).cuda(), LENGTHS, 2 * max(LENGTHS))


def heads(num_heads: int, seed: int) -> Tensor:
    """Packed bf16 heads of 64 that require gradients: shape (T, num_heads, 64)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (sum(LENGTHS), num_heads, 64)
    values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    return values.requires_grad_()


@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_a_kernel_equals_sdpa_in_every_segment(kernel: FlashKernel, num_kv_heads: int) -> None:
    segments = padded_segments()
    packed = (heads(8, 0), heads(num_kv_heads, 1), heads(num_kv_heads, 2))

    found = kernel.load()(*packed, segments).split(LENGTHS)
    sdpa = sdpa_attention(*packed, segments).split(LENGTHS)

    for one, other in zip(found, sdpa, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_a_kernel_has_the_gradients_of_sdpa_in_every_segment(
    kernel: FlashKernel, num_kv_heads: int
) -> None:
    segments = padded_segments()
    direction = heads(8, 3).detach()
    gradients = []
    for attend in (kernel.load(), sdpa_attention):
        packed = (heads(8, 0), heads(num_kv_heads, 1), heads(num_kv_heads, 2))
        attend(*packed, segments).backward(direction)
        gradients.append([part for tensor in packed for part in tensor.grad.split(LENGTHS)])

    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)


def test_auto_chooses_a_kernel() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("it needs Ampere or newer")
    assert choose_attention("auto", device, torch.bfloat16, 64).name != "sdpa"


def train(run: Path, shards: Path, stage: int, steps: int, **training: object) -> list[float]:
    """Losses of a run on one GPU."""
    config = {
        "run": str(run),
        "data": {"shards": str(shards)},
        "model": {"num_layers": 2, "width": 128, "num_heads": 2, "num_kv_heads": 1},
        "batch": {"context_tokens": 64, "global_batch_rows": 16, "micro_batch_rows": 8},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": steps, "precision": "bf16", **training},
        "zero": {"stage": stage},
        "hardware": {"device": "cuda", "processes": 1},
        "checkpoint": {"every_steps": 3, "background": False},
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    result = subprocess.run(
        [sys.executable, "-m", "megaback", "train", path],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert result.returncode == 0, result.stderr
    assert "compiled the model again" not in result.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compiled", ["auto", "off"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_on_a_gpu_learns(
    stage: int, compiled: str, tiny_shards: Path, tmp_path: Path
) -> None:
    losses = train(tmp_path / "run", tiny_shards, stage, 5, compile=compiled)

    assert losses[0] == pytest.approx(math.log(600), abs=0.1)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("compiled", ["auto", "off"])
def test_a_resumed_run_on_a_gpu_repeats_an_undisturbed_one_bit_for_bit(
    compiled: str, tiny_shards: Path, tmp_path: Path
) -> None:
    whole = train(tmp_path / "whole", tiny_shards, 1, 6, compile=compiled, seed=4)
    train(tmp_path / "cut", tiny_shards, 1, 6, compile=compiled, seed=4)
    newest = max((tmp_path / "cut" / "checkpoints").glob("step-*"))
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()

    assert train(tmp_path / "cut", tiny_shards, 1, 6, compile=compiled, seed=4) == whole
