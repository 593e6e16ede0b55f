"""Arithmetic on a CPU that is not done: its results are allocated as usual, and are zeros.

Matrix products, attention and random weights take most of a rehearsal's time, and processors
without bf16 arithmetic need minutes for one product in bf16. Memory, collectives and checks do not
depend on the values.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def arithmetic_skipped() -> Iterator[None]:
    """Replace kernels of this process by ones that write zeros."""
    replacements: dict[str, Callable[..., Any]] = {
        "mm": _product,
        "bmm": _product,
        "addmm": _sum_with_product,
        "addmm.out": _into,
        "baddbmm": _sum_with_product,
        "normal_": _in_place,
        "uniform_": _in_place,
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    }
    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of each replaced kernel
            for name, function in replacements.items():
                library.impl(name, function, "CPU")
        yield


def _product(left: Tensor, right: Tensor) -> Tensor:
    return _zeros((*left.shape[:-1], right.shape[-1]), left.dtype)


def _sum_with_product(_addend: Tensor, left: Tensor, right: Tensor, **_factors: Any) -> Tensor:
    return _product(left, right)


def _into(_addend: Tensor, _left: Tensor, _right: Tensor, *, out: Tensor, **_: Any) -> Tensor:
    return out


def _in_place(tensor: Tensor, *_parameters: float, **_generator: Any) -> Tensor:
    return tensor.zero_()


def _attention(
    query_BHTD: Tensor, _key: Tensor, _value: Tensor, *_options: Any, **_named: Any
) -> tuple[Tensor, Tensor]:
    """Result and the logarithms of its denominators, in the kernel's layout."""
    return torch.empty_like(query_BHTD).zero_(), _like_attended(query_BHTD[..., 0].float())


def _attention_backward(
    _gradient: Tensor,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    *_others: Any,
    **_named: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return _like_attended(query_BHTD), _like_attended(key_BHTD), _like_attended(value_BHTD)


def _like_attended(tensor_BHT: Tensor) -> Tensor:
    """Zeros in the order of (batch, token, head)."""
    batch, heads, tokens, *rest = tensor_BHT.shape
    return _zeros((batch, tokens, heads, *rest), tensor_BHT.dtype).transpose(1, 2)


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros that are written, so that their memory is resident."""
    return torch.empty(tuple(shape), dtype=dtype).zero_()
