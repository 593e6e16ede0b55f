"""Instruction examples from records: Alpaca's columns, or chat messages.

A record with messages has one example per answered user turn; system messages are skipped. Any
other record has one example.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from data_pipeline.common.shown_names import shown_names
from data_pipeline.errors import BadRecordError, ConfigError, SourceUnreadableError
from data_pipeline.sources.chat_messages import Exchanges, looks_like_chat, read_messages
from data_pipeline.text.chat_format import Example

# Column names of other data sets, the most common first.
_LIKELY = {
    "messages": (
        "messages",
        "conversations",
        "conversation",
        "chat",
        "dialogue",
        "dialog",
        "turns",
    ),
    "instruction": ("instruction", "prompt", "question", "query", "problem", "input", "inputs"),
    "output": ("output", "response", "answer", "completion", "target", "solution", "chosen"),
}


def parse_columns(text: str, known: Sequence[str], example: str) -> dict[str, str]:
    """Parse `name=column,…`. Raises ConfigError, which shows `example`."""
    given: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, column = (word.strip() for word in part.partition("="))
        if name not in known or not column or name in given:
            raise ConfigError(
                f"`columns` contains {part!r}; write for example {example}, "
                f"each of {', '.join(known)} at most once"
            )
        given[name] = column
    return given


@dataclass(frozen=True)
class ExampleColumns:
    """Columns or keys of a record's example, or of its chat messages."""

    instruction: str = "instruction"
    input: str = "input"
    """Column of the input, which may be missing or null."""
    output: str = "output"
    messages: str = "messages"
    """Column of chat messages, which takes precedence unless it is missing or null."""

    @classmethod
    def parse(cls, text: str) -> "ExampleColumns":
        """Parse `instruction=prompt,output=answer`. Raises ConfigError."""
        return cls(
            **parse_columns(
                text, [field.name for field in fields(cls)], "instruction=prompt,output=answer"
            )
        )

    def found_in(self, names: Iterable[str], source: str) -> list[str]:
        """The columns that exist. Raises SourceUnreadableError when required ones are missing."""
        names = list(names)
        if self.messages not in names and not {self.instruction, self.output} <= {*names}:
            raise SourceUnreadableError(f"{source}: {self._missing(names)}")
        wanted = (self.instruction, self.input, self.output, self.messages)
        return [name for name in dict.fromkeys(wanted) if name in names]

    def examples(self, record: Mapping[str, object], where: str) -> list[Example]:
        """Examples of a record, at least one. Raises BadRecordError, prefixed with `where`."""
        return self.read(record, where).examples

    def read(self, record: Mapping[str, object], where: str) -> Exchanges:
        """Examples and skipped parts of a record. Raises BadRecordError, prefixed with `where`."""
        messages = record.get(self.messages)
        if messages is not None:
            return read_messages(messages, self.messages, where)
        if not {self.instruction, self.output} <= record.keys():
            if self.messages in record:
                raise _bad_value(None, self.messages, "a list of messages", where)
            missing = f"{where}: {self._missing(record)}"
            place = missing.replace("; ", ", ")  # the place includes the advice
            raise BadRecordError(
                f"{missing}, or remove the record", "no columns with examples", place
            )
        given_input = record.get(self.input)
        example = Example.of(
            _text(record[self.instruction], self.instruction, where),
            "" if given_input is None else _text(given_input, self.input, where),
            _text(record[self.output], self.output, where),
        )
        return Exchanges([example])

    def suggested(self, names: Iterable[str], record: Mapping[str, object] | None = None) -> str:
        """A value of --columns that fits names and contents of the columns; "" if there is none."""
        by_name = {name.casefold(): name for name in names}
        values = record or {}
        chats = [name for name, value in values.items() if looks_like_chat(value)]
        found = {
            role: next((by_name[name] for name in likely if name in by_name), None)
            for role, likely in _LIKELY.items()
        }
        chat = chats[0] if chats else None if values else found["messages"]
        if chat is not None:
            return f"messages={chat}"
        instruction, output = found["instruction"], found["output"]
        if instruction is None or output is None:
            return ""
        return f"instruction={instruction},output={output}"

    def _missing(self, names: Iterable[str] | Mapping[str, object]) -> str:
        record = names if isinstance(names, Mapping) else None
        suggested = self.suggested(names, record)
        return (
            f"no columns {self.instruction!r} and {self.output!r}, and no {self.messages!r}; the "
            f"columns are {shown_names(names)}: rename them, or map them with `columns`"
            f"{suggested and f', perhaps `columns` {suggested}'}"
        )


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise _bad_value(value, column, "text", where)
    return value


def _bad_value(value: object, column: str, wanted: str, where: str) -> BadRecordError:
    found = "null" if value is None else f"of type {type(value).__name__}"
    return BadRecordError(
        f"{where}: column {column!r} is {found}, not {wanted}; fix or remove the record",
        f"column {column!r} is {found}, not {wanted}",
    )
