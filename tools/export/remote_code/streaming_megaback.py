"""Streamer for `generate` whose text grows as the model writes it: leftwards, if it is backward."""

from collections.abc import Callable, Iterator, Sequence
from queue import Queue
from typing import Any

from transformers.generation import BaseStreamer

from .new_text_megaback import NewText, stop_texts


class MegabackStreamer(BaseStreamer):  # type: ignore[misc]
    """Text in reading order while it is written; `tokenizer.streamer` makes one.

    Each update is passed to a function or, without one, is an item of the iterator: the new part,
    or the whole text so far. A part precedes the earlier ones if the model is backward, and is
    never a piece of a character.
    """

    def __init__(
        self,
        tokenizer: Any,
        on_text: Callable[[str], None] | None,
        *,
        given: str,
        stop: str | Sequence[str] | None,
        whole: bool,
        timeout_s: float | None,
    ) -> None:
        """Arguments as `tokenizer.streamer` takes them."""
        self._tokenizer = tokenizer
        self._updates: Queue[str | None] = Queue()
        self._on_text = self._updates.put if on_text is None else on_text
        self._whole = whole
        self._timeout_s = timeout_s
        self.expect(given, stop)

    def expect(self, given: str, stop: str | Sequence[str] | None = None) -> None:
        """Be ready for the text after another given one."""
        self._given, self._stops = given, stop_texts(stop)
        self._new_text: NewText | None = None
        self._ids: list[int] = []
        self._shown = ""

    def put(self, value: Any) -> None:
        """Ids of the prompt, then new ones. Raises ValueError for more than one text."""
        if value.ndim > 1 and len(value) > 1:
            raise ValueError(
                f"a streamer takes one text at a time, and {len(value)} were given; generate them "
                "one after another, or without a streamer"
            )
        ids = value.reshape(-1).tolist()
        if self._new_text is None:
            self._new_text = self._tokenizer.new_text(self._given, self._stops, ids)
            return
        if len(ids) > 1:
            raise ValueError(
                f"a streamer takes one text at a time, and {len(ids)} are being written; use "
                "num_return_sequences=1"
            )
        self._ids += ids
        self._update(is_whole=False)

    def end(self) -> None:
        """Pass on the rest, end the iterator, and be ready for another text."""
        self._update(is_whole=True)
        self._updates.put(None)
        self.expect(self._given, self._stops)

    def __iter__(self) -> Iterator[str]:
        """Updates of one text. Raises queue.Empty if one takes longer than `timeout_s`."""
        while (text := self._updates.get(timeout=self._timeout_s)) is not None:
            yield text

    def _update(self, *, is_whole: bool) -> None:
        if self._new_text is None:
            return
        text, _ = self._new_text.read(self._ids, is_whole=is_whole)
        num_new = len(text) - len(self._shown)
        if num_new == 0:
            return
        self._shown = text
        if self._whole:
            self._on_text(self._new_text.joined(text, self._given))
        else:
            leftwards = self._new_text.grows_leftwards
            self._on_text(text[:num_new] if leftwards else text[-num_new:])
