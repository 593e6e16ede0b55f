"""How likely a model finds a continuation, in nats: many of them in one forward pass."""

from collections.abc import Iterator, Sequence
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
    return [float(terms_W.sum()) for terms_W in token_log_probabilities(model, continuations)]


@torch.inference_mode()
def token_log_probabilities(
    model: ReverseGPT, continuations: Sequence[Continuation]
) -> list[Tensor]:
    """log P(id | given and written before it) of each written id: shape (W,) each, fp64, on CPU."""
    found: list[Tensor] = []
    for pack, hidden_WD in _read(model, continuations):
        ids = [written_id for one in pack for written_id in one.written]
        targets_W = torch.tensor(ids, dtype=torch.long, device=hidden_WD.device)
        logits_WV: Tensor = model.lm_head(hidden_WD).float()
        nats_W = F.cross_entropy(logits_WV, targets_W, reduction="none").double().cpu()
        found += torch.split(-nats_W, [len(one.written) for one in pack])
    return found


@torch.inference_mode()
def next_log_probabilities(
    model: ReverseGPT, continuations: Sequence[Continuation], ids: Sequence[int]
) -> list[Tensor]:
    """What could stand in a written id's place, or after the last one: shape (W + 1, C) each.

    Row k, column c is log P(ids[c] | given and the first k written ids).
    """
    # An id that is never looked at, so that the last one written is read.
    longer = [Continuation(one.given, [*one.written, 0]) for one in continuations]
    chosen_C = torch.tensor(list(ids), dtype=torch.long, device=next(model.parameters()).device)
    return [
        model.lm_head(part_WD).float().log_softmax(-1)[:, chosen_C]
        for pack, hidden_WD in _read(model, longer)
        for part_WD in torch.split(hidden_WD, [len(one.written) for one in pack])
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


def _read(
    model: ReverseGPT, continuations: Sequence[Continuation]
) -> Iterator[tuple[list[Continuation], Tensor]]:
    """Packs, each with the hidden states that its written ids are predicted from."""
    device = next(model.parameters()).device
    for numbers in _cut(range(len(continuations)), continuations):
        pack = [continuations[number] for number in numbers]
        # The last id of each is a target only.
        read = [[*one.given, *one.written][:-1] for one in pack]
        lengths = tuple(map(len, read))
        ids_T = torch.tensor([i for ids in read for i in ids], device=device)
        positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
        hidden_TD = model.hidden(ids_T, positions_T, Segments.from_lengths(lengths, device))
        parts = zip(pack, torch.split(hidden_TD, list(lengths)), strict=True)
        yield pack, torch.cat([part_TD[len(one.given) - 1 :] for one, part_TD in parts])
