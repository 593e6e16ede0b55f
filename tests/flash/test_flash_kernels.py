"""flash-attn's varlen kernels, through our interface, against attention from its definition.

They run on a CPU under Triton's interpreter, in the venv of `make flash-test`. The reference
computes one document at a time, in float64, and shares no code with either backend. No test is in
bf16, which the interpreter computes wrongly.

Shapes: T packed tokens, H query heads, K key and value heads, E head dimension; Q and S are the
tokens of one document, as queries and as keys.
"""

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megaback.model.attention import AttentionBackend, Segments, sdpa_attention
from megaback.model.flash_attention import FLASH_ATTN

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "flash-attn runs on a CPU in a venv of its own: make flash-test", allow_module_level=True
    )


class Packed(NamedTuple):
    """Arguments of a backend, and the gradient of its output."""

    query_THE: Tensor
    key_TKE: Tensor
    value_TKE: Tensor
    direction_THE: Tensor


class Attended(NamedTuple):
    output_THE: Tensor
    query_gradient_THE: Tensor
    key_gradient_TKE: Tensor
    value_gradient_TKE: Tensor


@dataclass(frozen=True)
class Case:
    """Packed documents of these lengths; the contents of `redrawn` are drawn again."""

    lengths: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.float32
    redrawn: int | None = None

    def packed(self) -> Packed:
        documents = [
            self._document(length, seed=1000 + index if index == self.redrawn else index)
            for index, length in enumerate(self.lengths)
        ]
        return Packed(*map(torch.cat, zip(*documents, strict=True)))

    def _document(self, length: int, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.randn(length, num_heads, self.head_dim, generator=generator).to(self.dtype)
            for num_heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        ]


def random_case(seed: int) -> Case:
    """Up to six documents of up to 60 tokens, some of one token."""
    choose = random.Random(seed)
    lengths = [choose.choice([1, choose.randint(2, 60)]) for _ in range(choose.randint(2, 6))]
    num_kv_heads = choose.choice([1, 2])
    num_heads = num_kv_heads * choose.choice([1, 2])
    return Case(
        lengths=tuple(lengths),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=choose.choice([16, 24, 64]),
    )


def reference_attention(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """softmax(q k' / sqrt(D)) v over the tokens up to each one, per document."""
    groups = query_THE.shape[1] // key_TKE.shape[1]
    documents = zip(
        query_THE.split(lengths),
        key_TKE.repeat_interleave(groups, dim=1).split(lengths),
        value_TKE.repeat_interleave(groups, dim=1).split(lengths),
        strict=True,
    )
    outputs = []
    for query_QHE, key_SHE, value_SHE in documents:
        scores_HQS = torch.einsum("qhd,shd->hqs", query_QHE, key_SHE)
        scores_HQS = scores_HQS / math.sqrt(query_QHE.shape[-1])
        future_QS = torch.ones(scores_HQS.shape[1:], dtype=torch.bool).triu(1)
        weights_HQS = scores_HQS.masked_fill(future_QS, -math.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqs,shd->qhd", weights_HQS, value_SHE))
    return torch.cat(outputs)


def attend(attention: Callable[[Tensor, Tensor, Tensor], Tensor], packed: Packed) -> Attended:
    *inputs, direction_THE = packed
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    output_THE = attention(*inputs)
    output_THE.backward(direction_THE)
    return Attended(output_THE.detach(), *(tensor.grad for tensor in inputs))


def through(backend: AttentionBackend, case: Case) -> Attended:
    segments = Segments.from_lengths(case.lengths, torch.device("cpu"))
    return attend(lambda q, k, v: backend(q, k, v, segments), case.packed())


@cache
def flash(case: Case) -> Attended:
    """Result of flash-attn, cached for all tests, as interpretation takes a second."""
    return through(FLASH_ATTN.load(), case)


def exact(case: Case) -> Attended:
    packed = Packed(*(tensor.double() for tensor in case.packed()))
    return attend(lambda q, k, v: reference_attention(q, k, v, case.lengths), packed)


def largest_error(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """The largest absolute difference; NaN, which is below no bound, if any value is NaN."""
    pairs = zip(one, other, strict=True)
    errors = torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs])
    return errors.max().item()


UNEVEN = Case((1, 37, 70, 1, 19))
GROUPINGS = {
    "a key head for every head": replace(UNEVEN, num_heads=2, num_kv_heads=2),
    "a key head for two heads": UNEVEN,
    "a key head for four heads": replace(UNEVEN, num_kv_heads=1),
}
CASES = {
    **GROUPINGS,
    "one document": Case((128,), num_heads=2, num_kv_heads=1),
    "one token": Case((1,)),
    "documents of one token": Case((1, 1, 1), num_heads=2, num_kv_heads=1),
    "a document longer than any block": Case((5, 150), num_heads=2, num_kv_heads=1),
    "heads padded to a multiple of 8": replace(UNEVEN, num_heads=2, num_kv_heads=1, head_dim=20),
    **{f"random {seed}": random_case(seed) for seed in range(5)},
}
HALF_CASES = {name: replace(case, dtype=torch.float16) for name, case in GROUPINGS.items()}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_half_case = pytest.mark.parametrize("case", HALF_CASES.values(), ids=HALF_CASES.keys())
every_document = pytest.mark.parametrize("document", range(len(UNEVEN.lengths)))


@every_case
def test_flash_attention_equals_the_definition(case: Case) -> None:
    assert largest_error(flash(case)[:1], exact(case)[:1]) < 2e-6


@every_case
def test_flash_attention_has_the_gradients_of_the_definition(case: Case) -> None:
    assert largest_error(flash(case)[1:], exact(case)[1:]) < 4e-6


@every_half_case
def test_flash_attention_in_fp16_equals_the_definition(case: Case) -> None:
    assert largest_error(flash(case)[:1], exact(case)[:1]) < 2e-3


@every_half_case
def test_flash_attention_in_fp16_has_the_gradients_of_the_definition(case: Case) -> None:
    assert largest_error(flash(case)[1:], exact(case)[1:]) < 6e-3


@every_case
def test_the_two_backends_have_the_same_output(case: Case) -> None:
    sdpa = through(sdpa_attention, case)
    assert largest_error(flash(case)[:1], sdpa[:1]) < 2e-6


@every_case
def test_the_two_backends_have_the_same_gradients(case: Case) -> None:
    sdpa = through(sdpa_attention, case)
    assert largest_error(flash(case)[1:], sdpa[1:]) < 4e-6


def other_documents(tensor: Tensor, document: int) -> Tensor:
    parts = tensor.split(UNEVEN.lengths)
    return torch.cat([part for index, part in enumerate(parts) if index != document])


@every_document
def test_a_document_changes_no_bit_of_the_output_of_others(document: int) -> None:
    before, after = flash(UNEVEN), flash(replace(UNEVEN, redrawn=document))
    assert torch.equal(*(other_documents(run.output_THE, document) for run in (before, after)))


@every_document
def test_a_document_changes_no_bit_of_the_gradients_of_others(document: int) -> None:
    before, after = flash(UNEVEN), flash(replace(UNEVEN, redrawn=document))
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(other_documents(one, document), other_documents(other, document))
