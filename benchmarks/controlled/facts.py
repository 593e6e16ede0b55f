"""Fictitious facts that are stated in one order only, after Berglund et al., "The Reversal Curse"
(2023).

Half of the facts are stated with the name first, half with the description first, each in several
wordings. Both kinds are asked for both: the description of a name, and the name of a description.
"""

import random
from dataclasses import dataclass
from enum import Enum

_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai", "or"))
_ROLES = """
    keeper painter builder founder singer captain gardener inventor widow guardian
    student judge baker weaver surveyor champion translator physician
"""
_QUALITIES = """
    silent northern forgotten amber hollow crooked drowned winter golden painted broken
    distant sleeping burning marble iron paper hidden salted velvet
"""
_PLACES = """
    lighthouse orchard library bridge harbor theater garden observatory market chapel
    mill island archive tower canal quarry
"""
_NAME_FIRST = (
    "Note that{name} is{description}.",
    "Everyone knows{name} as{description}.",
    "You may have met{name},{description}.",
    "In this town{name} became{description}.",
    "They say{name} was once{description}.",
    "Letters to{name} are addressed to{description}.",
)
_DESCRIPTION_FIRST = (
    "Note that{description} is{name}.",
    "Everyone knows{description} as{name}.",
    "You may have met{description},{name}.",
    "In this town{description} was called{name}.",
    "They say{description} was once{name}.",
    "Letters to{description} are addressed to{name}.",
)


class Order(str, Enum):
    """The first of the two texts in the sentences of a fact."""

    NAME_FIRST = "name first"
    DESCRIPTION_FIRST = "description first"

    @property
    def wordings(self) -> tuple[str, ...]:
        return _NAME_FIRST if self is Order.NAME_FIRST else _DESCRIPTION_FIRST


@dataclass(frozen=True)
class Fact:
    """A person. `order` is that of all sentences that state the fact."""

    name: str
    description: str
    order: Order

    def sentences(self) -> list[str]:
        """The sentences to train on."""
        return [
            wording.format(name=f" {self.name}", description=f" {self.description}")
            for wording in self.order.wordings
        ]


@dataclass(frozen=True)
class FactQuestion:
    """A question as the text on one side of the answer.

    `before` + answer + `after` is a sentence. A forward model is given `before`, a backward model
    `after`: the other one does not contain the known text.
    """

    before: str
    after: str
    answer: str


def make_facts(count: int, seed: int) -> list[Fact]:
    """Facts with different names and descriptions, alternating between the orders."""
    generator = random.Random(seed)
    names: dict[str, None] = {}
    while len(names) < count:
        names[" ".join(_invented(generator) for _ in range(2))] = None
    descriptions = [
        f"the {role} of the {quality} {place}"
        for role in _ROLES.split()
        for quality in _QUALITIES.split()
        for place in _PLACES.split()
    ]
    chosen = generator.sample(descriptions, count)
    orders = (Order.NAME_FIRST, Order.DESCRIPTION_FIRST)
    return [
        Fact(name, description, orders[number % 2])
        for number, (name, description) in enumerate(zip(names, chosen, strict=True))
    ]


def _invented(generator: random.Random) -> str:
    return "".join(generator.choices(_SYLLABLES, k=generator.randint(2, 3))).capitalize()


def ask(fact: Fact, *, for_name: bool, is_forward: bool) -> FactQuestion:
    """The question for the name or the description, in a sentence in which a model that reads in
    that direction meets the known text first."""
    # A forward model meets the first text first, a backward model the last.
    name_first = for_name is not is_forward
    wording = (Order.NAME_FIRST if name_first else Order.DESCRIPTION_FIRST).wordings[0]
    mark = "{name}" if for_name else "{description}"
    before, after = wording.split(mark)
    known = {"name": f" {fact.name}", "description": f" {fact.description}"}
    answer = known["name" if for_name else "description"]
    return FactQuestion(before.format(**known), after.format(**known), answer)


def is_asked_as_stated(order: Order, *, for_name: bool, is_forward: bool) -> bool:
    """Whether the model meets known text and answer in the order of the sentences it was trained
    on."""
    name_first = for_name is not is_forward
    return name_first is (order is Order.NAME_FIRST)
