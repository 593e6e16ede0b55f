"""One model's scores of all joins of its own halves with those of the other model.

One forward pass per half, its own and the other's, instead of one per join.

Shapes: I halves of this model, A their cuts, J halves of the other model, B their cuts, C ids, W
written ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megaback.inference.likelihood import (
    Continuation,
    next_log_probability_steps,
    token_log_probability_steps,
)
from megaback.inference.steps import Steps
from megaback.model.gpt import ReverseGPT

Floats = npt.NDArray[np.float64]
TOKENS_AT_ONCE = 512
"""Maximum tokens per forward pass, each layer of which is a step."""


@dataclass(frozen=True)
class Half:
    """Ids in the reading order of the model that wrote them, after the ids of its prompt."""

    ids: tuple[int, ...]
    is_given: bool = False
    """Whether it is only the token that the prompt holds back: the other model wrote all."""

    def new_tokens(self, cut: int) -> int:
        """Number of generated ids before a cut."""
        return 0 if self.is_given else cut


@dataclass(frozen=True, kw_only=True)
class JoinScores:
    """One model's log-probabilities in nats, by halves and by cuts from 1 on, padded."""

    own_IA: Floats
    """Log-probabilities of the ids of its own half, up to the cut."""
    next_IAC: npt.NDArray[np.float32]
    """Log-probability of each of C ids as the one after the cut: by far the largest table."""
    column_JB: npt.NDArray[np.int64]
    """Index among the C of the other half's id next to the cut."""
    rest_JB: Floats
    """Log-probability of the ids after it, as if the join were at the end of the other half."""
    tokens_after: int
    """Number of ids after both halves."""

    def of_own(self, half: int) -> Floats:
        """log P(everything after the prompt), for joins of one of its halves: (A, J, B)."""
        joined_AJB: Floats = self.next_IAC[half][:, self.column_JB] + self.rest_JB
        joined_AJB += self.own_IA[half][:, None, None]
        return joined_AJB

    def of_other(self, half: int) -> Floats:
        """The same for one half of the other model: (B, I, A)."""
        at_B = self.column_JB[half]
        joined_IAB: Floats = (
            self.next_IAC[:, :, at_B] + self.rest_JB[half] + self.own_IA[:, :, None]
        )
        return joined_IAB.transpose(2, 0, 1)


def score_half_steps(
    model: ReverseGPT,
    prompt: Sequence[int],
    halves: Sequence[Half],
    other_prompt: Sequence[int],
    others: Sequence[Half],
) -> Steps[JoinScores]:
    """A model's tables of its own halves and the other's; the first of each is the given one."""
    ids = sorted({one for half in others for one in half.ids})
    column = {one: number for number, one in enumerate(ids)}
    longest = max(len(half.ids) for half in halves)
    longest_other = max(len(half.ids) for half in others)
    own_IA = np.zeros((len(halves), longest))
    next_IAC = np.zeros((len(halves), longest, len(ids)), dtype=np.float32)
    continuations = [Continuation(prompt, half.ids) for half in halves]
    found = yield from next_log_probability_steps(model, continuations, ids, TOKENS_AT_ONCE)
    for number, (own_W, next_WC) in enumerate(found):
        own_IA[number, : len(own_W)] = own_W.double().numpy().cumsum()
        next_IAC[number, : len(own_W)] = next_WC.numpy()
    del found
    column_JB = np.zeros((len(others), longest_other), dtype=np.int64)
    rest_JB = np.zeros((len(others), longest_other))
    given = [*prompt, *halves[0].ids]
    after = list(reversed(other_prompt[1:]))
    continuations = [Continuation(given, [*reversed(half.ids), *after]) for half in others]
    logs = yield from token_log_probability_steps(model, continuations, TOKENS_AT_ONCE)
    for number, (half, logs_W) in enumerate(zip(others, logs, strict=True)):
        column_JB[number, : len(half.ids)] = [column[one] for one in half.ids]
        # The rest after each id, the last one first.
        last_first_W: Floats = logs_W.numpy()[::-1]
        remaining_W = np.concatenate([[0.0], last_first_W.cumsum()])[len(after) : -1]
        rest_JB[number, : len(half.ids)] = remaining_W
    return JoinScores(
        own_IA=own_IA,
        next_IAC=next_IAC,
        column_JB=column_JB,
        rest_JB=rest_JB,
        tokens_after=len(after),
    )
