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


@torch.inference_mode()
def log_probabilities(model: ReverseGPT, continuations: Sequence[Continuation]) -> list[float]:
    """log P(written | given) of each, summed over its ids, in nats.

    Continuations are packed side by side without seeing each other, in the order given.
    """
    return [
        -float(_nats(model, one, hidden_WD).sum()) for one, hidden_WD in _read(model, continuations)
    ]


@torch.inference_mode()
def token_log_probabilities(
    model: ReverseGPT, continuations: Sequence[Continuation]
) -> list[Tensor]:
    """log P(id | given and written before it) of each written id: shape (W,) each."""
    return [-_nats(model, one, hidden_WD) for one, hidden_WD in _read(model, continuations)]


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
        model.lm_head(hidden_WD).float().log_softmax(-1)[:, chosen_C]
        for _, hidden_WD in _read(model, longer)
    ]


def _nats(model: ReverseGPT, one: Continuation, hidden_WD: Tensor) -> Tensor:
    targets_W = torch.tensor(list(one.written), dtype=torch.long, device=hidden_WD.device)
    logits_WV: Tensor = model.lm_head(hidden_WD).float()
    return F.cross_entropy(logits_WV, targets_W, reduction="none")


def _read(
    model: ReverseGPT, continuations: Sequence[Continuation]
) -> Iterator[tuple[Continuation, Tensor]]:
    """Each continuation with the hidden states that its written ids are predicted from."""
    start = 0
    while start < len(continuations):
        stop, tokens = start, 0
        while stop < len(continuations):
            one = continuations[stop]
            tokens += len(one.given) + len(one.written)
            if stop > start and tokens > _TOKENS_AT_ONCE:
                break
            stop += 1
        yield from _read_pack(model, continuations[start:stop])
        start = stop


def _read_pack(
    model: ReverseGPT, pack: Sequence[Continuation]
) -> Iterator[tuple[Continuation, Tensor]]:
    device = next(model.parameters()).device
    # The last id of each is a target only.
    read = [[*one.given, *one.written][:-1] for one in pack]
    lengths = tuple(map(len, read))
    ids_T = torch.tensor([i for ids in read for i in ids], device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    hidden_TD = model.hidden(ids_T, positions_T, Segments.from_lengths(lengths, device))
    for one, of_one in zip(pack, torch.split(hidden_TD, list(lengths)), strict=True):
        yield one, of_one[len(one.given) - 1 :]
