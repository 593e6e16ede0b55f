"""What one client may take: those limits that are chosen, and those that hold for all servers."""

from dataclasses import dataclass

from tools.serving.errors import ProblemError

MAX_ANSWER_NUMBERS = 1 << 18
"""Tokens of an answer, each with the probabilities that are told of it."""
MAX_ECHOED_CHARACTERS = 1 << 22
MAX_INFILL_TOKENS = 1 << 12
"""Candidates times tokens. The tables of a meeting grow with its square: to 300 MB."""
MAX_MEETINGS_AT_ONCE = 2


@dataclass(frozen=True)
class Limits:
    """What one client may take."""

    body_bytes: int = 1 << 20
    open_requests: int = 256
    """Of the API, answered or waiting at the same time."""
    waiting_samples: int = 1024
    tokens: int = 4096
    """Of one sample."""
    request_s: float = 300.0
    """After which samples end as they are."""
    body_s: float = 20.0
    """Within which a request has to be there."""


def require_answer_size(samples: int, tokens: int, likeliest: int | None, of_what: str) -> None:
    """Raises ProblemError when all samples together, with what is told of each token, are large.

    `likeliest` ids are told at each place, None if nothing is; `of_what` says what is multiplied.
    """
    numbers = samples * tokens * (1 if likeliest is None else 1 + likeliest)
    if numbers > MAX_ANSWER_NUMBERS:
        raise ProblemError(
            400,
            f"{of_what} is {numbers}; at most {MAX_ANSWER_NUMBERS} are written for one request",
            "invalid_value",
        )
