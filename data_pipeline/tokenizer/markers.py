"""Markers for a tokenizer of another model: the control pieces that it lacks are added.

Documents' and chats' markers become special tokens: those that the file has stay, its own markers
of a text's beginning and end are renamed, and the others take its reserved tokens, or ids after the
last. Settings that change text are removed, and named. Equal files give equal bytes.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import TokenizerError
from data_pipeline.text.codec import BEGIN_PIECE, CHAT_PIECES, END_PIECE, Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import TOKENIZER_JSON_NAME, file_name_of
from data_pipeline.text.tokenizer_json import NFC_NORMALIZERS, fields_of

_SAME_MARKER = {
    BEGIN_PIECE: ("<|begin_of_text|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>"),
    END_PIECE: ("<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
}
"""Other models' names of a text's first and last marker."""
_RESERVED = re.compile(r"<\W?(reserved|unused|extra|place.?holder).*\d+\W?>")


@dataclass(frozen=True)
class MarkedTokenizer:
    """A tokenizer that `TextCodec` can use, and how it differs from the file that was given."""

    content: bytes
    vocab_size: int
    """Number of ids: the rows that the embedding needs."""
    marker_ids: dict[str, int]
    renamed: dict[str, str]
    """Previous spelling of each marker that took an existing special token."""
    num_added: int
    """Number of new ids: the last ones, those of unused tokens included."""
    removed: tuple[str, ...]
    """Settings that were removed, with what that changes."""


def with_markers(content: bytes, num_rows: int | None = None) -> MarkedTokenizer:
    """Add the control pieces that a tokenizer lacks.

    `num_rows`: rows of the model's embedding; ids up to it that the tokenizer lacks become unused
    special tokens, so that both sizes are equal. If the markers need more rows than it has,
    `vocab_size` is larger than `num_rows`, and the model needs new rows for the last ids. Raises
    TokenizerError for a tokenizer that is not supported, or that has more ids than rows.
    """
    if file_name_of(content) != TOKENIZER_JSON_NAME:
        return _require_rows(_usable(content, {}, 0, ()), num_rows)
    fields = fields_of(content)
    num_before = 1 + max(
        *fields["model"]["vocab"].values(), *(token["id"] for token in fields["added_tokens"])
    )
    if num_rows is not None and num_before > num_rows:
        raise _too_many(num_before, num_rows)
    removed = tuple(_without_changes(fields))
    markers = _Markers(fields, num_before)
    for piece in (BEGIN_PIECE, END_PIECE, *CHAT_PIECES):
        markers.provide(piece)
    while num_rows is not None and markers.next_id < num_rows:
        markers.add(f"<|unused_{markers.next_id}|>")
    num_added = markers.next_id - num_before
    if removed or markers.is_changed:
        fields["added_tokens"].sort(key=lambda token: token["id"])
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        content = text.encode("utf-8", "surrogatepass")
    return _usable(content, markers.renamed, num_added, removed)


class _Markers:
    """Special tokens of a parsed file, which is changed in place."""

    def __init__(self, fields: dict[str, Any], next_id: int) -> None:
        self._vocab: dict[str, int] = fields["model"]["vocab"]
        self._added: list[dict[str, Any]] = fields["added_tokens"]
        self.next_id = next_id
        self.renamed: dict[str, str] = {}
        self.is_changed = False

    def provide(self, piece: str) -> None:
        """Make a piece a special token."""
        of_content = {token["content"]: token for token in self._added}
        if piece in of_content:
            self.is_changed |= not of_content[piece]["special"]
            of_content[piece]["special"] = True
        elif piece in self._vocab:
            self._append(piece, self._vocab[piece])
        else:
            taken = [content for content in _SAME_MARKER.get(piece, ()) if content in of_content]
            free = (token["content"] for token in self._added if self._is_reserved(token))
            previous = next(iter(taken), next(free, None))
            if previous is None:
                self.add(piece)
            else:
                self._rename(of_content[previous], piece)

    def add(self, piece: str) -> None:
        """Add a special token with the next id."""
        self._append(piece, self.next_id)
        self.next_id += 1

    def _is_reserved(self, token: Mapping[str, Any]) -> bool:
        return bool(token["special"]) and _RESERVED.fullmatch(token["content"]) is not None

    def _rename(self, token: dict[str, Any], piece: str) -> None:
        previous = token["content"]
        if previous in self._vocab:
            self._vocab[piece] = self._vocab.pop(previous)
        token.update(content=piece, special=True)
        self.renamed[piece] = previous
        self.is_changed = True

    def _append(self, piece: str, piece_id: int) -> None:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        self._added.append({"id": piece_id, "content": piece, **flags, "special": True})
        self.is_changed = True


def _without_changes(fields: dict[str, Any]) -> list[str]:
    """Remove settings that are not needed for the ids of text; what that changes."""
    removed = []
    if fields.get("normalizer") in NFC_NORMALIZERS:
        fields["normalizer"] = None
        removed.append("normalizer NFC: text in another normal form keeps it, with other ids")
    for name in ("truncation", "padding"):
        if fields.get(name):
            fields[name] = None
            removed.append(f"{name}: texts keep their length")
    return removed


def _usable(
    content: bytes, renamed: dict[str, str], num_added: int, removed: tuple[str, ...]
) -> MarkedTokenizer:
    """The result, once `TextCodec` has accepted it."""
    codec = TextCodec(content, Direction.FORWARD, Unit.TOKEN)
    ids = {BEGIN_PIECE: codec.begin_id, END_PIECE: codec.end_id, **codec.chat_ids}
    return MarkedTokenizer(content, codec.vocab_size, ids, renamed, num_added, removed)


def _require_rows(marked: MarkedTokenizer, num_rows: int | None) -> MarkedTokenizer:
    if num_rows is not None and num_rows != marked.vocab_size:
        raise _too_many(marked.vocab_size, num_rows)
    return marked


def _too_many(num_ids: int, num_rows: int) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer has {num_ids:,} ids, but the embedding {num_rows:,} rows; give the "
        "tokenizer of that model, and its number of rows"
    )
