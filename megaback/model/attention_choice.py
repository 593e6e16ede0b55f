"""Choice of an attention backend for a device, and its check against the definition.

A kernel counts as there if its function can be imported and its results, forward and backward, on a
small packed batch are those of the definition. A backend that is requested by name and cannot be
used is an error; `auto` takes the first that can.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipeline.errors import BackendError
from megaback.model.attention import AttentionBackend, Segments, sdpa_attention
from megaback.model.flash_attention import KERNELS, VARLEN, FlashKernel

_LOG = logging.getLogger("megaback.model")

_MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Attention:
    """An attention backend."""

    name: str
    backend: AttentionBackend
    is_traceable: bool = False
    """Whether torch.compile traces it, as part of one graph."""
    rejected: tuple[str, ...] = ()
    """Each kernel that `auto` has tried before, with the reason why it cannot be used."""


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Attention:
    """The backend of a name, or with `auto` the fastest that a device has.

    Raises BackendError when it is requested by name and cannot be used.
    """
    rejected: list[str] = []
    for kernel in KERNELS:
        if name not in ("auto", kernel.name):
            continue
        reason = why_unusable(kernel, device, dtype, head_dim)
        if reason is None:
            return Attention(kernel.name, kernel.load(), kernel.is_traceable, tuple(rejected))
        if name == kernel.name:
            raise BackendError(
                f"hardware.attention is {name}, but {reason}; use sdpa, or bf16 on a CUDA machine "
                f"after `{kernel.install}`"
            )
        rejected.append(f"{kernel.name}: {reason}")
    return Attention("sdpa", sdpa_attention, rejected=tuple(rejected))


def report_slow_attention(
    attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int
) -> None:
    """Warn where `auto` ends at sdpa on a GPU, with what would help."""
    if attention.name == "sdpa" and attention.rejected and device.type != "cpu":
        helps = f"`{VARLEN.install}` has a faster one"
        if dtype is torch.float32:
            helps = "with training.precision=bf16 there are faster ones"
        elif head_dim > _MAX_HEAD_DIM:
            helps = "more, smaller heads have a faster one"
        _LOG.warning("attention is sdpa; %s (%s)", helps, "; ".join(attention.rejected))


def require_same_attention(names: Sequence[str]) -> None:
    """Raises BackendError unless all ranks, whose backends these are, have chosen the same one."""
    if len(set(names)) > 1:
        chosen = ", ".join(
            f"{name} on {names.count(name)} ranks, the first of them {names.index(name)}"
            for name in sorted(set(names))
        )
        raise BackendError(
            f"ranks differ in their attention: {chosen}; install the same packages on all nodes, "
            "or name one in hardware.attention"
        )


def why_unusable(
    kernel: FlashKernel, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Reason why a kernel cannot be used; None if it can."""
    reason = _why_unsupported(kernel, device, dtype, head_dim)
    if reason is not None:
        return reason
    try:
        backend = kernel.load()
    except Exception as error:  # noqa: BLE001 (a broken installation may raise anything)
        return f"it cannot be imported ({' '.join(str(error).split())})"
    return _why_wrong(backend, device, dtype, head_dim)


def _why_unsupported(
    kernel: FlashKernel, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels do not support {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_HEAD_DIM:
        return f"its heads have at most {_MAX_HEAD_DIM} dimensions, not {head_dim}"
    capability = torch.cuda.get_device_capability(device)
    if capability < kernel.min_capability:
        required, found = (
            ".".join(map(str, version)) for version in (kernel.min_capability, capability)
        )
        return f"it needs compute capability {required}, and the device has {found}"
    return None


_CHECKED_LENGTHS = (1, 7, 130, 62)
_MAX_ERROR = 0.05
"""Maximum difference, as a part of the largest value. Rounding to bf16 gives a hundredth."""


def _why_wrong(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Reason why a kernel's results on packed documents cannot be trusted, if any.

    The last segments are empty, and heads share keys and values.
    """
    generator = torch.Generator().manual_seed(0)
    query_THE, key_TKE, value_TKE, direction_THE = (
        torch.randn(sum(_CHECKED_LENGTHS), heads, head_dim, generator=generator).to(device, dtype)
        for heads in (4, 2, 2, 4)
    )
    inputs = (query_THE, key_TKE, value_TKE)
    edges = torch.tensor((0, *_CHECKED_LENGTHS, 0, 0, 0, 0)).cumsum(0, dtype=torch.int32)
    segments = Segments(edges.to(device), _CHECKED_LENGTHS, 2 * max(_CHECKED_LENGTHS))
    try:
        found = with_gradients(backend, inputs, direction_THE, segments)
    except Exception as error:  # noqa: BLE001 (kernels raise errors of any type)
        return f"it fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    exact = with_gradients(
        definition, tuple(one.float() for one in inputs), direction_THE.float(), segments
    )
    errors = [
        float((one.float() - other).abs().max() / other.abs().max())
        for one, other in zip(found, exact, strict=True)
    ]
    if all(error <= _MAX_ERROR for error in errors):  # a NaN is not
        return None
    return f"its results differ from the definition by {max(errors):.2g} of the largest value"


def with_gradients(
    backend: AttentionBackend,
    inputs: tuple[Tensor, ...],
    direction_THE: Tensor,
    segments: Segments,
) -> tuple[Tensor, ...]:
    """Result of a backend, and the gradients of its inputs for that of the result."""
    with torch.enable_grad():
        query_THE, key_TKE, value_TKE = leaves = [one.detach().requires_grad_() for one in inputs]
        attended_THE = backend(query_THE, key_TKE, value_TKE, segments)
        gradients = torch.autograd.grad(attended_THE, leaves, direction_THE)
    return attended_THE.detach(), *gradients


def definition(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments) -> Tensor:
    """softmax(q k' / sqrt(E)) v over the tokens of a segment up to each one, with a whole mask.

    Memory is quadratic in the tokens. S are the tokens as keys.
    """
    repeats = query_THE.shape[1] // key_TKE.shape[1]
    key_SHE, value_SHE = (one.repeat_interleave(repeats, dim=1) for one in (key_TKE, value_TKE))
    places_T = torch.arange(len(query_THE), device=query_THE.device, dtype=torch.int32)
    segment_T = torch.searchsorted(segments.cu_seqlens[1:].contiguous(), places_T, right=True)
    is_seen_TS = (segment_T[:, None] == segment_T) & (places_T[:, None] >= places_T)
    scores_HTS = torch.einsum("the,she->hts", query_THE, key_SHE) / math.sqrt(key_SHE.shape[-1])
    weights_HTS = scores_HTS.masked_fill(~is_seen_TS, -math.inf).softmax(dim=-1)
    return torch.einsum("hts,she->the", weights_HTS, value_SHE)
