"""flash-attn's varlen kernel against PyTorch's attention, and a real run, on a CUDA device."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from megaback.model.attention import Segments, attention_backend, flash_attention, sdpa_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
needs_flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed"
)
LENGTHS = (1, 7, 128, 300, 64)


def heads(num_heads: int, seed: int) -> Tensor:
    """Packed bf16 heads of 64 that require gradients: shape (T, num_heads, 64)."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (sum(LENGTHS), num_heads, 64)
    values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    return values.requires_grad_()


@needs_flash
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_flash_attention_equals_sdpa_in_every_segment(num_kv_heads: int) -> None:
    segments = Segments.from_lengths(LENGTHS, torch.device("cuda"))
    packed = (heads(8, 0), heads(num_kv_heads, 1), heads(num_kv_heads, 2))

    flash = flash_attention(*packed, segments).split(LENGTHS)
    sdpa = sdpa_attention(*packed, segments).split(LENGTHS)

    for one, other in zip(flash, sdpa, strict=True):
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


@needs_flash
@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_flash_attention_has_the_gradients_of_sdpa_in_every_segment(num_kv_heads: int) -> None:
    segments = Segments.from_lengths(LENGTHS, torch.device("cuda"))
    direction = heads(8, 3).detach()
    gradients = []
    for attend in (flash_attention, sdpa_attention):
        packed = (heads(8, 0), heads(num_kv_heads, 1), heads(num_kv_heads, 2))
        attend(*packed, segments).backward(direction)
        gradients.append([part for tensor in packed for part in tensor.grad.split(LENGTHS)])

    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=5e-2, rtol=5e-2)


@needs_flash
def test_flash_attention_is_chosen_where_available() -> None:
    assert attention_backend("auto", torch.device("cuda"), torch.bfloat16, 64) == (
        "flash_attn",
        flash_attention,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_of_five_steps_on_a_gpu_learns(stage: int, tiny_shards: Path, tmp_path: Path) -> None:
    config = {
        "run": str(tmp_path / "run"),
        "data": {"shards": str(tiny_shards)},
        "model": {"num_layers": 2, "width": 128, "num_heads": 2, "num_kv_heads": 1},
        "batch": {"context_tokens": 64, "global_batch_rows": 16, "micro_batch_rows": 8},
        "optimizer": {"learning_rate": 3e-3},
        "training": {"steps": 5, "precision": "bf16"},
        "zero": {"stage": stage},
        "hardware": {"device": "cuda", "processes": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    result = subprocess.run(
        [sys.executable, "-m", "megaback", "train", tmp_path / "config.yaml"],
        capture_output=True,
        text=True,
        timeout=280,
    )

    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    val_losses = [line["val_loss"] for line in map(json.loads, lines) if "val_loss" in line]
    assert val_losses[0] == pytest.approx(math.log(600), abs=0.1)
    assert val_losses[-1] < val_losses[0] - 0.1
