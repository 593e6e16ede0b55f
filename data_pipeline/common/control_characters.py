"""Text that a terminal shows and never obeys: control characters written as escapes.

A piece of a stranger's tokenizer, a document, a file's name or a server's reply may hold sequences
that move the cursor, hide text, change the window's title or reorder what is read.
"""

import re

_OBEYED = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # C0 and C1 but for tab and newline, and DEL
    "\u202a-\u202e\u2066-\u2069"  # bidirectional embeddings, overrides and isolates
    "\u206a-\u206f\ufff9-\ufffb"  # deprecated format characters, interlinear annotations
    "\U000e0000-\U000e007f"  # tags: text that is not seen
    "\ud800-\udfff]"  # lone surrogates, also those of names that are not UTF-8
    "|\r(?!\n)"  # a carriage return that would overwrite its line
)
"""Joiners, zero-width spaces and direction marks stay: Persian, Thai, Arabic and emoji need them,
and they move nothing but their neighbors."""


def escaped(text: str) -> str:
    r"""Text without control characters, each written as in Python (`\x1b`, `\u202e`).

    Text that was escaped already stays as it is.
    """
    return _OBEYED.sub(_written_out, text)


def on_one_line(text: str) -> str:
    """As `escaped`, newlines too: a name with one cannot begin a line that looks like ours."""
    return escaped(text).replace("\r", "\\x0d").replace("\n", "\\n")


def _written_out(found: re.Match[str]) -> str:
    number = ord(found[0])
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
