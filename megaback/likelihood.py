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


@torch.inference_mode()
def log_probabilities(model: ReverseGPT, continuations: Sequence[Continuation]) -> list[float]:
    """log P(written | given) of each, summed over its ids, in nats.

    Continuations are packed side by side without seeing each other, in the order given.
    """
    results: list[float] = []
    start = 0
    while start < len(continuations):
        stop, tokens = start, 0
        while stop < len(continuations):
            one = continuations[stop]
            tokens += len(one.given) + len(one.written)
            if stop > start and tokens > _TOKENS_AT_ONCE:
                break
            stop += 1
        results += _of_pack(model, continuations[start:stop])
        start = stop
    return results


def _of_pack(model: ReverseGPT, pack: Sequence[Continuation]) -> list[float]:
    device = next(model.parameters()).device
    # The last id of each is a target only.
    read = [[*one.given, *one.written][:-1] for one in pack]
    lengths = tuple(map(len, read))
    ids_T = torch.tensor([i for ids in read for i in ids], device=device)
    positions_T = torch.cat([torch.arange(length, device=device) for length in lengths])
    hidden_TD = model.hidden(ids_T, positions_T, Segments.from_lengths(lengths, device))
    sums = []
    for one, of_one in zip(pack, torch.split(hidden_TD, list(lengths)), strict=True):
        hidden_WD = of_one[len(one.given) - 1 :]
        targets_W = torch.tensor(list(one.written), dtype=torch.long, device=device)
        logits_WV: Tensor = model.lm_head(hidden_WD).float()
        sums.append(-float(F.cross_entropy(logits_WV, targets_W, reduction="sum")))
    return sums
