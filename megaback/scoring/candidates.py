"""Records of reranking: questions with several candidate answers."""

from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.common.number_ranges import NUMBER
from data_pipeline.errors import BadRecordError
from data_pipeline.sources.jsonl import Record
from megaback.scoring.pairs import text_of


@dataclass(frozen=True)
class Candidate:
    """An answer, its given score, and whether it is correct; None for what the record lacks."""

    answer: str
    given_score: float | None
    is_right: bool | None


@dataclass(frozen=True)
class Question:
    """A question, and at least one candidate answer."""

    text: str
    candidates: tuple[Candidate, ...]

    @property
    def is_labeled(self) -> bool:
        """Whether the record has `correct` for every candidate."""
        return all(one.is_right is not None for one in self.candidates)


def question_of(record: Record, score_column: str | None) -> Question:
    """Read `question` and `candidates`: texts, or objects with `answer`.

    An object may have `correct` (true or false), and must have a number under `score_column`, if
    that is given. Raises BadRecordError, which begins with the record's place.
    """
    where = record.where
    text = text_of(record.fields, "question", where)
    candidates = record.fields.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise BadRecordError(
            f"{where}: 'candidates' is not a list of answers; fix or remove the line"
        )
    found = []
    for number, candidate in enumerate(candidates):
        place = f"{where}: candidate {number}"
        fields = {"answer": candidate} if isinstance(candidate, str) else candidate
        if not isinstance(fields, dict):
            raise BadRecordError(
                f"{place} is neither a text nor an object with 'answer'; fix or remove the line"
            )
        answer = text_of(fields, "answer", place)
        found.append(Candidate(answer, _score(fields, score_column, place), _right(fields, place)))
    return Question(text, tuple(found))


def _score(fields: Mapping[str, object], column: str | None, place: str) -> float | None:
    if column is None:
        return None
    value = fields.get(column)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            score = float(value)
        except OverflowError:
            score = float("nan")
        if NUMBER.problem(score) is None:
            return score
    raise BadRecordError(
        f"{place} has no finite number under {column!r}; fix or remove the line, or omit "
        "`forward_column`"
    )


def _right(fields: Mapping[str, object], place: str) -> bool | None:
    value = fields.get("correct")
    if value is None or isinstance(value, bool):
        return value
    raise BadRecordError(f"{place}: 'correct' is {value!r}, not true or false; fix the line")
