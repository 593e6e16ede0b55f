"""From a record to instruction examples: Alpaca's columns, or the messages of a chat.

A record with messages gives an example for each message of the user that the assistant answers
next; what a system says is left out. Any other record gives one example.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from data_pipeline.chat_format import Example
from data_pipeline.errors import BadRecordError, ConfigError, SourceUnreadableError

_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")
# The keys of a message: OpenAI's, and those of ShareGPT.
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value")


@dataclass(frozen=True)
class ExampleColumns:
    """The columns or keys in which a record holds an example, or the messages of a chat."""

    instruction: str = "instruction"
    input: str = "input"
    """It need not be there, and may be null."""
    output: str = "output"
    messages: str = "messages"
    """Read where it is there and not null."""

    @classmethod
    def parse(cls, text: str) -> "ExampleColumns":
        """Read `instruction=prompt,output=answer`. Raises ConfigError for anything else."""
        known = [field.name for field in fields(cls)]
        given: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, _, column = (word.strip() for word in part.partition("="))
            if name not in known or not column or name in given:
                raise ConfigError(
                    f"--columns has {part!r}; write for example instruction=prompt,output=answer, "
                    f"each of {', '.join(known)} at most once"
                )
            given[name] = column
        return cls(**given)

    def found_in(self, names: Iterable[str], source: str) -> list[str]:
        """Those of the columns that are there. Raises SourceUnreadableError when too few are."""
        names = list(names)
        if self.messages not in names and not {self.instruction, self.output} <= {*names}:
            raise SourceUnreadableError(f"{source}: {self._missing(names)}")
        wanted = (self.instruction, self.input, self.output, self.messages)
        return [name for name in dict.fromkeys(wanted) if name in names]

    def examples(self, record: Mapping[str, object], where: str) -> list[Example]:
        """The examples of a record, at least one. Raises BadRecordError, beginning with `where`."""
        messages = record.get(self.messages)
        if messages is not None:
            examples = list(_answered(messages, self.messages, where))
            if not examples:
                raise BadRecordError(
                    f"{where}: no message of a user in {self.messages!r} that the assistant "
                    "answers next; mend or remove the record"
                )
            return examples
        if not {self.instruction, self.output} <= record.keys():
            raise BadRecordError(f"{where}: {self._missing(record)}, or remove the record")
        given_input = record.get(self.input)
        return [
            Example.of(
                _text(record[self.instruction], self.instruction, where),
                "" if given_input is None else _text(given_input, self.input, where),
                _text(record[self.output], self.output, where),
            )
        ]

    def _missing(self, names: Iterable[str]) -> str:
        return (
            f"no columns {self.instruction!r} and {self.output!r}, and no {self.messages!r}; the "
            f"columns are {', '.join(names) or 'none'}: name those that hold them with --columns"
        )


def _answered(messages: object, column: str, where: str) -> Iterator[Example]:
    if not isinstance(messages, list):
        raise _bad_value(messages, column, "a list of messages", where)
    asked: str | None = None
    for message in messages:
        if not isinstance(message, dict):
            raise _bad_value(message, column, "a list of messages", where)
        role = _one_of(message, _ROLE_KEYS, column, where)
        content = _one_of(message, _CONTENT_KEYS, column, where)
        if role in _ASSISTANT and asked is not None:
            yield Example.of(asked, "", content)
        asked = content if role in _USER else None


def _one_of(message: Mapping[str, object], keys: tuple[str, ...], column: str, where: str) -> str:
    value = next((message[key] for key in keys if message.get(key) is not None), None)
    if not isinstance(value, str):
        raise BadRecordError(
            f"{where}: a message in {column!r} has no text under {' or '.join(map(repr, keys))}; "
            "mend or remove the record"
        )
    return value


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise _bad_value(value, column, "text", where)
    return value


def _bad_value(value: object, column: str, wanted: str, where: str) -> BadRecordError:
    found = "null" if value is None else f"of type {type(value).__name__}"
    return BadRecordError(
        f"{where}: column {column!r} is {found}, not {wanted}; mend or remove the record"
    )
