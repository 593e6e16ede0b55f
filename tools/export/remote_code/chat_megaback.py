"""BackChat's chats: one instruction and its response, as ids in which no text is a marker.

A backward model reads the response and writes the instruction; a forward model, the reverse.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

START_PIECE = "<|im_start|>"
STOP_PIECE = "<|im_end|>"
_INSTRUCTION_PIECE = "<|instruction|>"
_RESPONSE_PIECE = "<|response|>"
_ROLES = {"user": "an instruction", "assistant": "a response"}


class UnsupportedChatError(NotImplementedError, ValueError):
    """Refusal of what chats cannot express. Servers try one at startup, and expect ValueError."""


@dataclass(frozen=True)
class Chat:
    """A given text, and the one that the model writes for it, unless it is yet to write it."""

    given: str
    written: str | None


class ChatFormat:
    """Encodes chats with the pieces of a vocabulary, in the model's direction."""

    def __init__(
        self, id_of: Callable[[str], int], encode: Callable[[str], list[int]], *, is_backward: bool
    ) -> None:
        self._encode = encode
        self.start_id, self.stop_id = id_of(START_PIECE), id_of(STOP_PIECE)
        self.given_role, self.written_role = "assistant", "user"
        given_piece, written_piece = _RESPONSE_PIECE, _INSTRUCTION_PIECE
        if not is_backward:
            self.given_role, self.written_role = self.written_role, self.given_role
            given_piece, written_piece = written_piece, given_piece
        self.given_id, self.written_id = id_of(given_piece), id_of(written_piece)

    def given_ids(self, given: str) -> list[int]:
        """Ids of the given text and its markers."""
        return [self.start_id, self.given_id, *self._encode(given), self.stop_id]

    def prompt_ids(self, given: str) -> list[int]:
        """Ids before the text that the model writes, up to and with its role marker."""
        return [*self.given_ids(given), self.start_id, self.written_id]

    def written_ids(self, written: str) -> list[int]:
        """Ids of the text that the model writes, with its end marker: those that carry loss."""
        return [*self._encode(written), self.stop_id]

    def example(
        self, instruction: str | None, given_input: str | None, response: str | None
    ) -> Chat:
        """The chat of an example. Raises ValueError if instruction or response is empty."""
        instruction, given_input, response = (
            (text or "").strip() for text in (instruction, given_input, response)
        )
        question = " ".join(part for part in (instruction, given_input) if part)
        for text, name in ((question, "instruction"), (response, "response")):
            if not text:
                raise ValueError(f"the {name} is empty; skip examples without one")
        texts = {"user": question, "assistant": response}
        return Chat(texts[self.given_role], texts[self.written_role])

    def read(self, messages: Sequence[Any]) -> Chat:
        """The chat of messages in the order of a conversation. Raises ValueError for any other."""
        found: dict[str, str] = {}
        for message in messages:
            role, text = _role_and_text(message)
            if role not in _ROLES:
                raise ValueError(
                    f"a message has the role {role!r}, which this model was not trained on; {self}"
                )
            if role in found:
                raise ValueError(f"there is more than one message of {role!r}; {self}")
            if "assistant" in found:
                raise ValueError(f"a message of the user follows one of the assistant; {self}")
            if not text.strip():
                raise ValueError(f"the message of {role!r} is empty; give it a text")
            found[role] = text.strip()
        if self.given_role not in found:
            raise ValueError(f"there is no message of {self.given_role!r}; {self}")
        return Chat(found[self.given_role], found.get(self.written_role))

    def messages(self, chat: Chat) -> list[dict[str, str]]:
        """Messages of a chat in the order of a conversation."""
        texts = {self.given_role: chat.given, self.written_role: chat.written}
        return [
            {"role": role, "content": text} for role in _ROLES if (text := texts[role]) is not None
        ]

    def __str__(self) -> str:
        given, written = self.given_role, self.written_role
        return (
            f"this model writes one message of {written!r} ({_ROLES[written]}) for one of "
            f"{given!r} ({_ROLES[given]}): give [{{'role': {given!r}, 'content': …}}], and to "
            "train both, the user's first"
        )


def _role_and_text(message: Any) -> tuple[str, str]:
    """Role and text of a message. Raises ValueError."""
    role = message.get("role") if isinstance(message, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = None if None in parts else "\n".join(map(str, parts))
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(
            f"{message!r:.80} is not a message of text; give {{'role': …, 'content': …}}"
        )
    unknown = [key for key, value in message.items() if value and key not in ("role", "content")]
    if unknown:
        raise ValueError(f"a message has {unknown[0]!r}, which this model was not trained on")
    return role, content
