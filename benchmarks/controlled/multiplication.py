"""Products of two numbers as texts, after section 4 of Zhang et al., "Reversal Blessing" (2025).

`m*n=p` is forward X and `p=m*n` reverse X; m and n have the same number of digits. A question has
the true text and texts with one digit changed. The entropies are exact: every pair is equally
likely, so given its product a pair is uniform over the product's factorizations.
"""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

NUM_WRONG = 3
HELD_OUT_FRACTION = 0.1
MAX_HELD_OUT = 5_000
"""Maximum number of held-out pairs, in which m*n and n*m are one."""


class Form(str, Enum):
    """Order of the equation in the text."""

    FORWARD_X = "forward-x"
    REVERSE_X = "reverse-x"


@dataclass(frozen=True)
class Product:
    """A pair of factors."""

    m: int
    n: int

    @property
    def p(self) -> int:
        return self.m * self.n

    def text(self, form: Form) -> str:
        if form is Form.FORWARD_X:
            return f"{self.m}*{self.n}={self.p}"
        return f"{self.p}={self.m}*{self.n}"


@dataclass(frozen=True)
class Split:
    """Products to train on, and held-out ones: no pair is in both, in either order."""

    train: tuple[Product, ...]
    held_out: tuple[Product, ...]


def split_products(digits: int, max_pairs: int, seed: int) -> Split:
    """At most `max_pairs` pairs with m <= n, shuffled, each with its exchange n*m.

    A tenth is held out, at most MAX_HELD_OUT.
    """
    low, high = 10 ** (digits - 1), 10**digits
    count = high - low
    total = count * (count + 1) // 2
    numbers = random.Random(seed).sample(range(total), min(max_pairs, total))
    num_held_out = min(math.ceil(HELD_OUT_FRACTION * len(numbers)), MAX_HELD_OUT)
    pairs = [_pair(number, low) for number in numbers]
    order = random.Random(seed + 1)
    return Split(
        train=_in_both_orders(pairs[num_held_out:], order),
        held_out=_in_both_orders(pairs[:num_held_out], order),
    )


def _pair(number: int, low: int) -> Product:
    """The pair of a number: pairs are counted by their larger factor."""
    larger = (math.isqrt(8 * number + 1) - 1) // 2
    return Product(low + number - larger * (larger + 1) // 2, low + larger)


def _in_both_orders(pairs: Sequence[Product], order: random.Random) -> tuple[Product, ...]:
    both = list(dict.fromkeys(x for one in pairs for x in (one, Product(one.n, one.m))))
    order.shuffle(both)
    return tuple(both)


def wrong_choices(text: str, generator: random.Random) -> tuple[str, ...]:
    """NUM_WRONG different texts that differ from this one in one digit, which may become zero."""
    changes = [
        text[:at] + new + text[at + 1 :]
        for at, old in enumerate(text)
        if old.isdigit()
        for new in "0123456789"
        if new != old
    ]
    return tuple(generator.sample(changes, NUM_WRONG))


def factorizations(p: int, digits: int) -> list[tuple[int, int]]:
    """All (m, n) with m * n = p, both of that many digits; m*n and n*m are two."""
    low, high = 10 ** (digits - 1), 10**digits
    return [(m, p // m) for m in range(low, high) if p % m == 0 and low <= p // m < high]


def factor_entropy(digits: int) -> float:
    """H(m, n | p) in nats over all pairs: the mean log of the number of factorizations."""
    low, high = 10 ** (digits - 1), 10**digits
    counts = np.zeros(high * high, dtype=np.uint16)
    factors = np.arange(low, high)
    for m in factors:
        counts[m * factors] += 1  # the products of one m are different
    counts = counts[counts > 1].astype(np.float64)
    return float((counts * np.log(counts)).sum()) / len(factors) ** 2


@dataclass(frozen=True)
class Scoring:
    """One way to score a form: what the model is given, and what it predicts.

    A text is cut in two after `num_first` of its parts m, *, n, =, p; the reading direction
    decides which half is given.
    """

    name: str
    form: Form
    is_forward: bool
    num_first: int
    is_ambiguous: bool
    """Whether the predicted part is m*n, of which a product may have several."""

    def halves(self, equation: str) -> tuple[str, str]:
        """The texts before and after the cut."""
        parts = re.findall(r"\d+|[*=]", equation)
        return "".join(parts[: self.num_first]), "".join(parts[self.num_first :])


SCORINGS = (
    Scoring("L2R", Form.FORWARD_X, True, 4, False),
    Scoring("R2L(m,n)", Form.FORWARD_X, False, 3, True),
    Scoring("R2L(m)", Form.FORWARD_X, False, 1, False),
    Scoring("R2L", Form.REVERSE_X, False, 1, False),
    Scoring("L2R(m,n)", Form.REVERSE_X, True, 2, True),
    Scoring("L2R(n)", Form.REVERSE_X, True, 4, False),
)
"""The columns of the published table, in its order."""


@dataclass(frozen=True)
class Published:
    """4 digits, 2 billion parameters: accuracy in percent with its error, entropies in nats."""

    test: tuple[float, float]
    train: tuple[float, float]
    test_nats: float
    train_nats: float
    theoretical_nats: float


PUBLISHED = {
    "L2R": Published((99.81, 0.15), (99.76, 0.15), 0.06, 0.06, 0.0),
    "R2L(m,n)": Published((59.71, 1.99), (59.03, 1.66), 1.18, 1.17, 1.49),
    "R2L(m)": Published((60.93, 0.88), (61.22, 1.12), 0.08, 0.08, 0.0),
    "R2L": Published((100.0, 0.0), (100.0, 0.0), 0.0, 0.0, 0.0),
    "L2R(m,n)": Published((97.82, 0.35), (97.90, 0.42), 0.84, 0.83, 1.49),
    "L2R(n)": Published((99.85, 0.10), (99.98, 0.04), 0.01, 0.01, 0.0),
}


@dataclass(frozen=True)
class Question:
    """The two sides of a true equation, and wrong texts for the right side in each draw."""

    left: str
    right: str
    draws: tuple[tuple[str, ...], ...]

    @property
    def candidates(self) -> list[str]:
        """The right side and all its wrong texts, each once; the right one first."""
        return list(dict.fromkeys([self.right, *(text for draw in self.draws for text in draw)]))


def questions(products: Sequence[Product], form: Form, num_draws: int, seed: int) -> list[Question]:
    """A question per product; its choices are drawn `num_draws` times."""
    generator = random.Random(seed)
    made = []
    for product in products:
        left, right = product.text(form).split("=")
        draws = tuple(wrong_choices(right, generator) for _ in range(num_draws))
        made.append(Question(left, right, draws))
    return made


def accuracies(asked: Sequence[Question], scores: Sequence[dict[str, float]]) -> list[float]:
    """Fraction of questions whose right side has the highest score, per draw; ties are wrong."""
    num_draws = len(asked[0].draws)
    right = [0] * num_draws
    for question, score in zip(asked, scores, strict=True):
        for number, draw in enumerate(question.draws):
            right[number] += all(score[question.right] > score[wrong] for wrong in draw)
    return [count / len(asked) for count in right]
