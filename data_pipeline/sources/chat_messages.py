"""Extraction of instruction examples from chat messages.

Consecutive messages of one role are one turn, joined by a blank line. Everything skipped is
recorded with its cause.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipeline.errors import BadRecordError
from data_pipeline.text.chat_format import Example

_USER = {"user", "human", "prompter"}
_ASSISTANT = {
    *("assistant", "gpt", "chatgpt", "bing", "bard", "model"),
    *("ai", "bot", "chatbot", "claude", "gemini"),
}
_SYSTEM = {"system", "developer"}
_TOOL = {"tool", "function", "observation", "ipython", "tool_call", "function_call"}
# Keys of messages of OpenAI, ShareGPT and Open Assistant.
_ROLE_KEYS = ("role", "from")
_CONTENT_KEYS = ("content", "value", "text")
_CALL_KEYS = ("tool_calls", "function_call")

_UNANSWERED = "question without an answer"
_UNASKED = "answer without a question"
_ANSWER_WITHOUT_TEXT = "exchange whose answer has no text, such as a tool call"
_QUESTION_WITHOUT_TEXT = "exchange whose question has no text"
_UNKNOWN_ROLE = "exchange with a message of an unknown role"
_OF_TOOL = "tool message and the answer to it"
_OF_SYSTEM = "system message"
_PART = "part of a message that is not text"


@dataclass
class Exchanges:
    """Exchanges of one chat, and its skipped parts."""

    examples: list[Example] = field(default_factory=list)
    excluded: list[tuple[str, str]] = field(default_factory=list)
    """Cause and place of each skipped part."""


def read_messages(messages: object, column: str, where: str) -> Exchanges:
    """Exchanges of a chat, at least one. Raises BadRecordError, prefixed with `where`."""
    values = messages if isinstance(messages, list) else [messages]
    odd = [value for value in values if not isinstance(value, dict)]
    if odd or not isinstance(messages, list):
        kind = type((odd or [messages])[0]).__name__
        found = "null" if odd and odd[0] is None else f"of type {kind}"
        cause = f"column {column!r} is {found}, not a list of messages"
        raise BadRecordError(f"{where}: {cause}; fix or remove the record", cause)
    reader = _Reader(where)
    for message in messages:
        reader.read(message)
    reader.end_exchange()
    exchanges = reader.found
    if not exchanges.examples:
        causes = Counter(cause for cause, _ in exchanges.excluded if cause != _OF_SYSTEM)
        why = causes.most_common(1)[0][0] if causes else "no user message"
        first = next((place for cause, place in exchanges.excluded if cause == why), where)
        raise BadRecordError(
            f"{first}: no user message in {column!r} has an answer ({why}); "
            "fix or remove the record",
            f"no exchange in {column!r}: {why}",
        )
    return exchanges


def looks_like_chat(value: object) -> bool:
    """Whether a value is a list of messages, with any roles."""
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(message, dict)
        and any(key in message for key in _ROLE_KEYS)
        and any(key in message for key in _CONTENT_KEYS)
        for message in value
    )


class _Reader:
    """Reads one chat, message by message."""

    def __init__(self, where: str) -> None:
        self.found = Exchanges()
        self._where = where
        self._question: list[str] = []
        self._answer: list[str] = []
        self._is_excluded = False
        """Whether everything up to the next user message is skipped."""

    def read(self, message: Mapping[str, object]) -> None:
        role = next((message[key] for key in _ROLE_KEYS if message.get(key) is not None), None)
        name = role.strip().casefold() if isinstance(role, str) else None
        if name in _SYSTEM:
            self._note(_OF_SYSTEM)
        elif name in _USER:
            self._read_user(message)
        elif name in _ASSISTANT:
            self._read_assistant(message)
        elif name in _TOOL:
            self._exclude(_OF_TOOL)
        else:
            self._exclude(_UNKNOWN_ROLE, f"role {role!r}")

    def end_exchange(self) -> None:
        """Keep the current exchange if it has an answer."""
        if self._answer:
            texts = (_joined(self._question), "", _joined(self._answer))
            self.found.examples.append(Example.of(*texts))
        elif self._question:
            self._note(_UNANSWERED)
        self._question, self._answer, self._is_excluded = [], [], False

    def _read_user(self, message: Mapping[str, object]) -> None:
        if self._answer or self._is_excluded:
            self.end_exchange()
        text = self._text(message)
        if text is None:
            self._exclude(_QUESTION_WITHOUT_TEXT)
        else:
            self._question.append(text)

    def _read_assistant(self, message: Mapping[str, object]) -> None:
        if self._is_excluded:
            return
        text = self._text(message) if self._question else None
        if text is None:
            self._exclude(_ANSWER_WITHOUT_TEXT if self._question else _UNASKED)
        else:
            self._answer.append(text)

    def _exclude(self, cause: str, details: str = "") -> None:
        """Skip a message and, if there is no answer yet, its exchange."""
        if self._is_excluded:
            return
        if not self._answer:
            self._question = []  # counted once, by this cause
        self.end_exchange()
        self._note(cause, details)
        self._is_excluded = True

    def _note(self, cause: str, details: str = "") -> None:
        place = f"{self._where}: {details}" if details else self._where
        self.found.excluded.append((cause, place))

    def _text(self, message: Mapping[str, object]) -> str | None:
        content = next(
            (message[key] for key in _CONTENT_KEYS if message.get(key) is not None), None
        )
        if isinstance(content, str):
            is_call = not content and any(message.get(key) for key in _CALL_KEYS)
            return None if is_call else content
        if not isinstance(content, list):
            return None
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                texts.append(text)
            else:
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                self._note(_PART, f"type {kind!r}")
        return "\n".join(texts) if texts else None


def _joined(texts: list[str]) -> str:
    return "\n\n".join(text for text in texts if text)
