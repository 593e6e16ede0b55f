"""Passages of prose, and three kinds of damage to them: the text of data selection by quality."""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

_SENTENCE_END = re.compile(r"(?<=[.!?;])\s+")
_MIN_SENTENCES = 6
_INSERTIONS = 3
"""Number of boilerplate sentences that are inserted into a passage."""
_BOILERPLATE = (
    "Click here to subscribe to our newsletter and get the latest updates in your inbox.",
    "This site uses cookies; by continuing to browse you agree to our use of cookies.",
    "Copyright 2019. All rights reserved. Terms of Service. Privacy Policy. Contact Us.",
    "Share this: Facebook Twitter Pinterest Email Print More.",
    "You must be logged in to post a comment.",
    "Related posts: Top 10 Tips. Read more. Leave a reply. Your email will not be published.",
    "Home About Us Products Services Blog FAQ Sitemap Search for:",
    "Advertisement. Continue reading below. Sign up for free shipping on orders over $50!",
)
_MARKUP = (
    ("<p>", "</p>"),
    ('<div class="content">', "</div>"),
    ('<a href="/index.html">', "</a>"),
    ("<b>", "</b>"),
    ("<li>", "</li>&nbsp;"),
    ("[[", "|thumb]]"),
)


class Damage(str, Enum):
    """Kinds of damage."""

    SHUFFLED = "sentences shuffled"
    BOILERPLATE = "boilerplate inserted"
    MARKUP = "markup inserted"


def passages(text: str, characters: int, max_passages: int) -> Iterator[list[str]]:
    """The first passages of a document, as sentences: each as long as `characters` or a sentence
    more, and of _MIN_SENTENCES or more."""
    found, sentences, length = 0, list[str](), 0
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        sentences.append(sentence)
        length += len(sentence) + 1
        if length >= characters:
            if len(sentences) >= _MIN_SENTENCES:
                yield sentences
                found += 1
                if found == max_passages:
                    return
            sentences, length = [], 0


def damaged(sentences: Sequence[str], kind: Damage, generator: random.Random) -> list[str]:
    """Sentences with damage of one kind."""
    changed = list(sentences)
    if kind is Damage.SHUFFLED:
        while changed == list(sentences):
            generator.shuffle(changed)
    elif kind is Damage.BOILERPLATE:
        for line in generator.sample(_BOILERPLATE, _INSERTIONS):
            changed.insert(generator.randint(0, len(changed)), line)
    else:
        for place in generator.sample(range(len(changed)), len(changed) // 2):
            opening, closing = generator.choice(_MARKUP)
            changed[place] = opening + changed[place] + closing
    return changed


def mixture(
    clean: Iterable[Sequence[str]], generator: random.Random
) -> list[tuple[str, Damage | None]]:
    """Texts of passages, a third of which are damaged, the kinds in turn; None: clean."""
    texts = list(clean)
    chosen = generator.sample(range(len(texts)), len(texts) // 3)
    kinds = {number: list(Damage)[at % len(Damage)] for at, number in enumerate(chosen)}
    return [
        (
            " ".join(damaged(one, kinds[number], generator) if number in kinds else one),
            kinds.get(number),
        )
        for number, one in enumerate(texts)
    ]
