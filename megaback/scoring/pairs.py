"""Records of scoring: questions and their answers."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from data_pipeline.common.shown_names import shown_names
from data_pipeline.errors import BadRecordError
from data_pipeline.sources.columns import ExampleColumns, parse_columns


@dataclass(frozen=True)
class Pair:
    """Two texts in reading order: a question and an answer, or two passages."""

    question: str
    answer: str


@dataclass(frozen=True)
class PairColumns:
    """Keys of a pair in a record.

    A record without them may have `instruction`, `input` and `output` instead, which are combined
    as in training.
    """

    question: str = "question"
    answer: str = "answer"

    @classmethod
    def parse(cls, text: str) -> "PairColumns":
        """Read `question=prompt,answer=completion`. Raises ConfigError for anything else."""
        return cls(
            **parse_columns(
                text, [field.name for field in fields(cls)], "question=prompt,answer=completion"
            )
        )

    def pair(self, record: Mapping[str, object], where: str) -> Pair:
        """Raises BadRecordError, which begins with `where`."""
        if not {self.question, self.answer} & record.keys() and "output" in record:
            (example, *others) = ExampleColumns(messages="").examples(record, where)
            assert not others
            return Pair(example.instruction, example.response)
        return Pair(
            *(
                text_of(record, column, where, ", or name the keys of the texts in `columns`")
                for column in (self.question, self.answer)
            )
        )


def text_of(record: Mapping[str, object], column: str, where: str, otherwise: str = "") -> str:
    """A text that is not blank. Raises BadRecordError.

    `otherwise`: another advice than to fix or remove a line without the column.
    """
    if column not in record:
        raise BadRecordError(
            f"{where}: no {column!r}; the keys are {shown_names(record)}: fix or remove the "
            f"line{otherwise}"
        )
    value = record[column]
    if not isinstance(value, str):
        found = "null" if value is None else f"of type {type(value).__name__}"
        raise BadRecordError(f"{where}: {column!r} is {found}, not text; fix or remove the line")
    if not value.strip():
        raise BadRecordError(f"{where}: {column!r} is empty; fix or remove the line")
    return value
