"""How likely a model finds a continuation, in nats: many of them in one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import Tensor

from megaback.attention import Segments
from megaback.model import ReverseGPT

_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class Continuation:
    """Ids that are given, at least one, and ids that go on from them."""

    given: Sequence[int]
    written: Sequence[int]


def in_packs(continuations: Sequence[Continuation]) -> list[list[int]]:
    """Numbers of continuations that fit one forward pass together, short ones with short ones."""
    by_length = sorted(range(len(continuations)), key=lambda i: _num_tokens(continuations[i]))
    return _cut(by_length, continuations)


@torch.inference_mode()
def log_probabilities(model: ReverseGPT, continuations: Sequence[Continuation]) -> list[float]:
    """log P(written | given) of each, summed over its ids, in nats.

    Continuations are packed side by side without seeing each other, in the order given. The terms
    are of fp32, their sums of fp64: a long text loses nothing by being long.
    """
    packs = _cut(range(len(continuations)), continuations)
    return [
        one for pack in packs for one in _of_pack(model, [continuations[number] for number in pack])
    ]


def _num_tokens(one: Continuation) -> int:
    return len(one.given) + len(one.written)


def _cut(numbers: Sequence[int], continuations: Sequence[Continuation]) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for number in numbers:
        tokens = _num_tokens(continuations[number])
        if tokens > room:
            packs.append([])
            room = _TOKENS_AT_ONCE
        packs[-1].append(number)
        room = max(0, room - tokens)
    return packs


def _of_pack(model: ReverseGPT, pack: Sequence[Continuation]) -> list[float]:
    device = next(model.parameters()).device
    # The last id of each is a target only.
    read = [[*one.given, *one.written][:-1] for one in pack]
    lengths = tuple(map(len, read))
    ids_T = torch.tensor([i for ids in read for i in ids], device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    hidden_TD = model.hidden(ids_T, positions_T, Segments.from_lengths(lengths, device))
    num_written = [len(one.written) for one in pack]
    parts = torch.split(hidden_TD, list(lengths))
    hidden_WD = torch.cat([part[-count:] for part, count in zip(parts, num_written, strict=True)])
    targets_W = torch.tensor([i for one in pack for i in one.written], device=device)
    logits_WV: Tensor = model.lm_head(hidden_WD).float()
    nats_W = F.cross_entropy(logits_WV, targets_W, reduction="none").double()
    return [-float(nats.sum()) for nats in torch.split(nats_W.cpu(), num_written)]
