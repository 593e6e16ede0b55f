"""Choice of the attention backend, on devices that are only named: this machine may have none."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import BackendError
from megaback.model import attention_choice
from megaback.model.attention import AttentionBackend, Segments, sdpa_attention
from megaback.model.attention_choice import (
    Attention,
    choose_attention,
    definition,
    report_slow_attention,
    require_same_attention,
)
from megaback.model.flash_attention import KERNELS, FlashKernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16


def one_document_too_far(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """Attention that leaks from a document into the next one by a token."""
    lengths = list(segments.lengths)
    lengths[0], lengths[1] = lengths[0] + 1, lengths[1] - 1
    return sdpa_attention(q, k, v, Segments.from_lengths(tuple(lengths), CPU))


def not_a_number(q: Tensor, k: Tensor, v: Tensor, _segments: Segments) -> Tensor:
    return sum(one.mean() for one in (k, v)) * q * float("nan")


def in_bf16(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return definition(q, k, v, segments)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine(varlen=backend, …)`: a device that has these kernels, on this CPU."""

    def make(capability: tuple[int, int] = (9, 0), **backends: AttentionBackend) -> None:
        def load(kernel: FlashKernel) -> AttentionBackend:
            if kernel.name not in backends:
                raise ImportError(f"no {kernel.module}")
            return backends[kernel.name]

        def why_unsupported(kernel: FlashKernel, *_arguments: object) -> str | None:
            return None if kernel.min_capability <= capability else "it needs a newer device"

        monkeypatch.setattr(FlashKernel, "load", load)
        monkeypatch.setattr(attention_choice, "_why_unsupported", why_unsupported)

    return make


@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS])
def test_requesting_a_kernel_on_a_cpu_is_an_error(name: str) -> None:
    with pytest.raises(BackendError, match=rf"attention is {name}, but the device is cpu; .*`pip"):
        choose_attention(name, CPU, BF16, 64)


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_attention_on_a_cpu_is_sdpa(name: str) -> None:
    attention = choose_attention(name, CPU, torch.float32, 64)

    assert (attention.name, attention.backend) == ("sdpa", sdpa_attention)
    assert not attention.is_traceable


def test_a_kernel_in_fp32_is_refused() -> None:
    with pytest.raises(BackendError, match="its kernels do not support float32"):
        choose_attention("flash_attn", CUDA, torch.float32, 64)


def test_a_kernel_with_large_heads_is_refused() -> None:
    with pytest.raises(BackendError, match="256 dimensions, not 320"):
        choose_attention("varlen", CUDA, BF16, 320)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 64), (BF16, 320)])
def test_auto_selects_sdpa_where_no_kernel_can_be_used(dtype: torch.dtype, head_dim: int) -> None:
    assert choose_attention("auto", CUDA, dtype, head_dim).name == "sdpa"


@pytest.mark.parametrize(
    ("capability", "there", "chosen"),
    [
        ((9, 0), ("flash_attn_4", "varlen", "flash_attn"), "flash_attn_4"),
        ((8, 0), ("flash_attn_4", "varlen", "flash_attn"), "varlen"),
        ((9, 0), ("varlen", "flash_attn"), "varlen"),
        ((8, 0), ("flash_attn",), "flash_attn"),
        ((9, 0), (), "sdpa"),
        ((7, 5), ("varlen", "flash_attn"), "sdpa"),
    ],
)
def test_auto_selects_the_first_kernel_that_is_there(
    machine: Callable[..., None],
    capability: tuple[int, int],
    there: tuple[str, ...],
    chosen: str,
) -> None:
    machine(capability, **dict.fromkeys(there, in_bf16))

    attention = choose_attention("auto", CPU, BF16, 32)

    assert attention.name == chosen
    assert attention.is_traceable == (chosen == "varlen")


@pytest.mark.parametrize("wrong", [one_document_too_far, not_a_number])
def test_a_kernel_with_wrong_results_is_skipped_and_refused_by_name(
    machine: Callable[..., None], wrong: AttentionBackend
) -> None:
    machine(varlen=wrong, flash_attn=in_bf16)

    assert choose_attention("auto", CPU, BF16, 32).name == "flash_attn"
    with pytest.raises(BackendError, match="varlen, but its results differ from the definition"):
        choose_attention("varlen", CPU, BF16, 32)


def test_a_kernel_that_fails_is_skipped_with_its_error(machine: Callable[..., None]) -> None:
    def failing(*_arguments: object) -> Tensor:
        raise RuntimeError("no kernel image")

    machine(varlen=failing)
    attention = choose_attention("auto", CPU, BF16, 32)

    assert attention.name == "sdpa"
    assert "varlen: it fails (RuntimeError: no kernel image)" in attention.rejected


def test_sdpa_on_a_gpu_is_reported_with_what_helps(caplog: pytest.LogCaptureFixture) -> None:
    slow = Attention("sdpa", sdpa_attention, rejected=("varlen: it cannot be imported",))
    with caplog.at_level(logging.WARNING):
        report_slow_attention(slow, CPU, BF16, 64)
        report_slow_attention(Attention("sdpa", sdpa_attention), CUDA, BF16, 64)  # by name
        assert not caplog.messages
        report_slow_attention(slow, CUDA, BF16, 64)
        report_slow_attention(slow, CUDA, torch.float32, 64)

    assert "attention is sdpa; `pip install 'torch>=2.11'` has a faster one" in caplog.messages[0]
    assert "varlen: it cannot be imported" in caplog.messages[0]
    assert "training.precision=bf16" in caplog.messages[1]


def test_ranks_that_differ_in_their_attention_are_refused() -> None:
    require_same_attention(["varlen"] * 3)
    with pytest.raises(BackendError, match=r"sdpa on 1 ranks, the first of them 2, varlen on 2"):
        require_same_attention(["varlen", "varlen", "sdpa"])
