"""Escaping of control characters in terminal output.

Untrusted tokenizers, documents, file names and server replies may contain sequences that move the
cursor, hide text, change the window's title or reorder text.
"""

import re

_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # C0 and C1 except tab and newline, and DEL
    "\u202a-\u202e\u2066-\u2069"  # bidirectional embeddings, overrides and isolates
    "\u206a-\u206f\ufff9-\ufffb"  # deprecated format characters, interlinear annotations
    "\U000e0000-\U000e007f"  # tags: invisible text
    "\ud800-\udfff]"  # lone surrogates, also in names that are not UTF-8
    "|\r(?!\n)"  # a carriage return that would overwrite its line
)
"""Escaped characters. Joiners, zero-width spaces and direction marks are not among them: Persian,
Thai, Arabic and emoji need them, and they affect only adjacent characters."""


def escaped(text: str) -> str:
    r"""Text with control characters as Python escapes (`\x1b`, `\u202e`); idempotent."""
    return _CONTROL.sub(_written_out, text)


def on_one_line(text: str) -> str:
    """As `escaped`, with newlines too, so that no name can forge a log line."""
    return escaped(text).replace("\r", "\\x0d").replace("\n", "\\n")


def _written_out(found: re.Match[str]) -> str:
    number = ord(found[0])
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
