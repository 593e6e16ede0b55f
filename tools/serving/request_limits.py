"""Limits of requests: those set by options, and constants."""

from dataclasses import dataclass

from tools.serving.errors import ProblemError

MAX_ANSWER_NUMBERS = 1 << 18
"""Tokens of an answer times (1 + log-probabilities per token)."""
MAX_ECHOED_CHARACTERS = 1 << 22
MAX_INFILL_TOKENS = 1 << 12
"""Candidates times tokens. The tables of an infill grow with its square, to 300 MB."""
MAX_MEETINGS_AT_ONCE = 2


@dataclass(frozen=True)
class Limits:
    """Limits set by options of `megaback serve`."""

    body_bytes: int = 1 << 20
    open_requests: int = 256
    """Maximum concurrent API requests, waiting ones included."""
    waiting_samples: int = 1024
    tokens: int = 4096
    """Maximum new tokens per sample."""
    request_s: float = 300.0
    """Timeout of a request, after which samples end as they are."""
    body_s: float = 20.0
    """Timeout for a body to arrive."""


def require_answer_size(samples: int, tokens: int, likeliest: int | None, of_what: str) -> None:
    """Raises ProblemError when an answer would have too many tokens and log-probabilities.

    `likeliest`: log-probabilities per token, None for none. `of_what` names the product.
    """
    numbers = samples * tokens * (1 if likeliest is None else 1 + likeliest)
    if numbers > MAX_ANSWER_NUMBERS:
        raise ProblemError(
            400,
            f"{of_what} is {numbers}; the limit per request is {MAX_ANSWER_NUMBERS}",
            "invalid_value",
        )
