"""Selection of distinct texts, and of the instructions that become examples."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tools.backtranslation.proposals import Text
from tools.backtranslation.row_forms import Form, example_columns

Record = dict[str, Any]
"""A text with its proposals: see `BackTranslator.records`."""


def different_texts(positions_and_texts: Iterable[tuple[str, str]]) -> Iterator[Text]:
    """Stripped texts without duplicates; the first position of each is kept."""
    seen: set[bytes] = set()
    for position, text in positions_and_texts:
        stripped = text.strip()
        digest = _digest(stripped)
        if digest not in seen:
            yield Text(len(seen), position, stripped)
            seen.add(digest)


@dataclass(frozen=True)
class Choice:
    """At most `keep` best instructions per text, with a score of at least `min_score`."""

    keep: int = 1
    min_score: float | None = None
    form: Form = "alpaca"

    def examples(
        self, records: Callable[[], Iterable[Record]], counts: Counter[str]
    ) -> Iterator[Record]:
        """Rows of `form`, in the order of the texts; outcomes are added to `counts`.

        The records are read twice: an instruction proposed for several texts is assigned to the
        one for which it has the highest score.
        """
        best: dict[bytes, tuple[float, int]] = {}
        for record in records():
            for proposal in self._passing(record):
                digest, rank = _rank(record, proposal)
                best[digest] = min(rank, best.get(digest, rank))
        for record in records():
            counts["texts"] += 1
            passing = self._passing(record)
            if not passing:
                counts[record.get("excluded", "below --min-score")] += 1
            for proposal in passing:
                digest, rank = _rank(record, proposal)
                if best[digest] != rank:
                    counts["the instruction fits another text better"] += 1
                else:
                    counts["examples"] += 1
                    yield self._example(record, proposal)

    def _passing(self, record: Record) -> list[Record]:
        return [
            proposal
            for proposal in record.get("proposals", [])[: self.keep]
            if self.min_score is None or proposal["score"] >= self.min_score
        ]

    def _example(self, record: Record, proposal: Record) -> Record:
        known = {name: value for name, value in proposal.items() if value is not None}
        return {
            **example_columns(self.form, known.pop("instruction"), record["text"]),
            **known,
            "source": record["position"],
        }


def _rank(record: Record, proposal: Record) -> tuple[bytes, tuple[float, int]]:
    """Digest of an instruction, ignoring case and whitespace, and its rank; lower is better."""
    same = " ".join(proposal["instruction"].casefold().split())
    return _digest(same), (-proposal["score"], record["index"])


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
