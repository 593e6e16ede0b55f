"""Log-likelihoods of continuations in nats, many of them in one forward pass.

Each function has an equivalent in steps (`megaback.inference.steps`): with `tokens_at_once`, a
forward pass has at most that many tokens, or one continuation. A device is given the next pass
before the host waits for the results of the one before.

Shapes: T tokens of a pass, D width, W written ids, C ids, S = 1 + C numbers.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import Tensor

from megaback.inference.steps import Steps, finish
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.model.rotary import Rotary
from megaback.model.sending import Arriving, sent

_TOKENS_AT_ONCE = 8192
_PASSES_AHEAD = 1
_LOGIT_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Continuation:
    """Given ids (at least one), and the ids that continue them."""

    given: Sequence[int]
    written: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """log P(written | given) in nats, and whether greedy decoding would write the same ids."""

    log_probability: float
    is_greedy: bool


def in_packs(continuations: Sequence[Continuation]) -> list[list[int]]:
    """Batches of indices of continuations that fit one forward pass, sorted by length."""
    by_length = sorted(range(len(continuations)), key=lambda i: _num_tokens(continuations[i]))
    return _cut(by_length, continuations, _TOKENS_AT_ONCE)


def log_probabilities(model: ReverseGPT, continuations: Sequence[Continuation]) -> list[float]:
    """log P(written | given) of each, summed over its ids, in nats.

    Continuations are packed in their order, without attention across them. Terms are in fp32 and
    sums in fp64, so long texts lose no precision.
    """
    return finish(log_probability_steps(model, continuations))


def log_probability_steps(
    model: ReverseGPT, continuations: Sequence[Continuation], tokens_at_once: int = _TOKENS_AT_ONCE
) -> Steps[list[float]]:
    """`log_probabilities` in steps."""
    terms = yield from token_log_probability_steps(model, continuations, tokens_at_once)
    return [float(terms_W.sum()) for terms_W in terms]


@torch.inference_mode()
def begun_log_probabilities(
    model: ReverseGPT, continuations: Sequence[Continuation]
) -> Callable[[], list[float]]:
    """`log_probabilities` that a device is computing; the function waits for them."""
    passes = [
        (pack, finish(_launch(model, pack, _TOKENS_AT_ONCE)))
        for pack in _packs(continuations, _TOKENS_AT_ONCE)
    ]
    return lambda: [float(terms_W.sum()) for one in passes for terms_W in _terms(*one)]


@torch.inference_mode()
def begun_likelihoods(
    model: ReverseGPT, continuations: Sequence[Continuation]
) -> Callable[[], list[Likelihood]]:
    """`begun_log_probabilities`, and whether each written id is the likeliest one at its place."""
    passes = []
    for pack in _packs(continuations, _TOKENS_AT_ONCE):
        hidden_WD = finish(_read(model, pack))
        ids = [written_id for one in pack for written_id in one.written]
        targets_W = sent(torch.tensor(ids, dtype=torch.long), hidden_WD.device)
        found = [hidden_WD.new_empty((0, 2), dtype=torch.float32)]
        for part_WD, part_W in zip(
            torch.split(hidden_WD, _LOGIT_ROWS_AT_ONCE),
            torch.split(targets_W, _LOGIT_ROWS_AT_ONCE),
            strict=True,
        ):
            logits_WV = model.lm_head(part_WD).float()
            is_likeliest_W = logits_WV.argmax(-1) == part_W
            nats_W = F.cross_entropy(logits_WV, part_W, reduction="none")
            found.append(torch.stack([nats_W, is_likeliest_W.float()], dim=1))
        passes.append((pack, Arriving(torch.cat(found))))
    return lambda: [one for pack, found in passes for one in _likelihoods(pack, found)]


def _likelihoods(pack: Sequence[Continuation], found: Arriving) -> list[Likelihood]:
    parts = torch.split(found.result().double(), [len(one.written) for one in pack])
    return [Likelihood(-float(part_W2[:, 0].sum()), bool(part_W2[:, 1].all())) for part_W2 in parts]


def token_log_probabilities(
    model: ReverseGPT, continuations: Sequence[Continuation]
) -> list[Tensor]:
    """log P(id | given and written before it) of each written id: shape (W,) each, fp64, on CPU."""
    return finish(token_log_probability_steps(model, continuations))


@torch.inference_mode()
def token_log_probability_steps(
    model: ReverseGPT, continuations: Sequence[Continuation], tokens_at_once: int = _TOKENS_AT_ONCE
) -> Steps[list[Tensor]]:
    """`token_log_probabilities` in steps."""
    found: list[Tensor] = []
    waiting: deque[tuple[list[Continuation], Arriving]] = deque()
    for pack in _packs(continuations, tokens_at_once):
        waiting.append((pack, (yield from _launch(model, pack, tokens_at_once))))
        if len(waiting) > _PASSES_AHEAD:
            found += _terms(*waiting.popleft())
    for one in waiting:
        found += _terms(*one)
    return found


def _launch(
    model: ReverseGPT, pack: Sequence[Continuation], tokens_at_once: int
) -> Steps[Arriving]:
    """log P of each written id of a pack, in fp32: shape (W,)."""
    hidden_WD = yield from _read(model, pack)
    ids = [written_id for one in pack for written_id in one.written]
    targets_W = sent(torch.tensor(ids, dtype=torch.long), hidden_WD.device)
    nats = [hidden_WD.new_empty(0, dtype=torch.float32)]
    for part_WD, part_W in zip(
        torch.split(hidden_WD, tokens_at_once),
        torch.split(targets_W, tokens_at_once),
        strict=True,
    ):
        nats.append(model.lm_head(part_WD, part_W))  # in chunks, and in fp32
        yield
    return Arriving(torch.cat(nats))


def _terms(pack: Sequence[Continuation], nats: Arriving) -> Sequence[Tensor]:
    lengths = [len(one.written) for one in pack]
    return torch.split(-nats.result().double(), lengths)


@torch.inference_mode()
def next_log_probability_steps(
    model: ReverseGPT,
    continuations: Sequence[Continuation],
    ids: Sequence[int],
    tokens_at_once: int = _TOKENS_AT_ONCE,
) -> Steps[list[tuple[Tensor, Tensor]]]:
    """Per continuation: log P of its written ids, shape (W,), and of C ids after each, (W, C), on
    the CPU.

    Row k, column c is log P(ids[c] | given and the first k + 1 written ids).
    """
    # One more id, whose value does not matter, so that the last written id is read.
    longer = [Continuation(one.given, [*one.written, 0]) for one in continuations]
    device = next(model.parameters()).device
    chosen_C = sent(torch.tensor(list(ids), dtype=torch.long), device)
    launched: list[tuple[list[Continuation], Arriving]] = []
    for pack in _packs(longer, tokens_at_once):
        hidden_WD = yield from _read(model, pack)
        written = [written_id for one in pack for written_id in one.written]
        written_W1 = sent(torch.tensor(written, dtype=torch.long), device)[:, None]
        logs = []
        for part_WD, part_W1 in zip(
            torch.split(hidden_WD, tokens_at_once),
            torch.split(written_W1, tokens_at_once),
            strict=True,
        ):
            logs_WV = model.lm_head(part_WD).float().log_softmax(-1)
            of_written_W1 = logs_WV.gather(1, part_W1)
            logs.append(torch.cat([of_written_W1, logs_WV.index_select(1, chosen_C)], dim=1))
            yield
        launched.append((pack, Arriving(torch.cat(logs))))
    found: list[tuple[Tensor, Tensor]] = []
    for pack, arriving in launched:
        parts = torch.split(arriving.result(), [len(one.written) for one in pack])
        found += [(part_WS[:-1, 0], part_WS[1:, 1:]) for part_WS in parts]
    return found


def _num_tokens(one: Continuation) -> int:
    return len(one.given) + len(one.written)


def _cut(
    numbers: Sequence[int], continuations: Sequence[Continuation], tokens_at_once: int
) -> list[list[int]]:
    packs: list[list[int]] = []
    room = 0
    for number in numbers:
        tokens = _num_tokens(continuations[number])
        if tokens > room:
            packs.append([])
            room = tokens_at_once
        packs[-1].append(number)
        room = max(0, room - tokens)
    return packs


def _packs(continuations: Sequence[Continuation], tokens_at_once: int) -> list[list[Continuation]]:
    numbers = _cut(range(len(continuations)), continuations, tokens_at_once)
    return [[continuations[number] for number in pack] for pack in numbers]


def _read(model: ReverseGPT, pack: Sequence[Continuation]) -> Steps[Tensor]:
    """Hidden states that predict the written ids: shape (W, D). A step is a layer.

    As `ReverseGPT.hidden` computes them.
    """
    device = next(model.parameters()).device
    # The last id of each is a target only.
    read = [[*one.given, *one.written][:-1] for one in pack]
    lengths = tuple(map(len, read))
    ids_T = sent(torch.tensor([i for ids in read for i in ids], dtype=torch.long), device)
    # Made on the host: on the device, it would be a kernel for each text.
    positions_T = sent(torch.cat([torch.arange(length) for length in lengths]), device)
    segments = Segments.from_lengths(lengths, device)
    rotary = Rotary.at(positions_T, model.shape)
    hidden_TD: Tensor = model.model.embed_tokens(ids_T)
    for block in model.model.layers:
        hidden_TD = block(hidden_TD, rotary, segments)
        yield
    parts = zip(pack, torch.split(model.model.norm(hidden_TD), list(lengths)), strict=True)
    return torch.cat([part_TD[len(one.given) - 1 :] for one, part_TD in parts])
