"""BackChat's chat template: an instruction and its response between markers, as ids.

A backward model reads `<|im_start|><|response|>` response `<|im_end|><|im_start|><|instruction|>`
and writes instruction `<|im_end|>`. A forward model reads the instruction and writes the response.
Loss is on the written part and its end marker only. The texts are encoded by `TextCodec`, so that a
marker spelled in a text stays text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.text.codec import Direction, Prompt, TextCodec
from data_pipeline.text.encoder import Ids

START_PIECE = "<|im_start|>"
STOP_PIECE = "<|im_end|>"
INSTRUCTION_PIECE = "<|instruction|>"
RESPONSE_PIECE = "<|response|>"


@dataclass(frozen=True)
class Example:
    """An instruction, with its input if it has one, and its response."""

    instruction: str
    response: str

    @classmethod
    def of(cls, instruction: str, given_input: str, response: str) -> "Example":
        """Strip instruction, input and response; join the first two with a space.

        >>> Example.of("Identity the odd one out.", "Twitter, Telegram", "Telegram").instruction
        'Identity the odd one out. Twitter, Telegram'
        """
        parts = [part for part in (instruction.strip(), given_input.strip()) if part]
        return cls(" ".join(parts), response.strip())


@dataclass(frozen=True)
class EncodedExample:
    """Ids in the model's reading order, of which the first `num_given` carry no loss."""

    ids: Ids
    num_given: int


@dataclass(frozen=True)
class ParsedExample:
    """Texts decoded from ids. A part that is missing or not yet begun is None."""

    instruction: str | None
    response: str | None
    is_complete: bool
    """Whether both are present, with the end marker of the last one."""


class ChatFormat:
    """Encodes and parses examples with one codec."""

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self.start_id = codec.chat_ids[START_PIECE]
        self.stop_id = codec.chat_ids[STOP_PIECE]
        self.instruction_id = codec.chat_ids[INSTRUCTION_PIECE]
        self.response_id = codec.chat_ids[RESPONSE_PIECE]
        self.writes_instruction = codec.format.direction is Direction.BACKWARD
        """Whether instructions are written for given responses; False with a forward codec."""
        self.given_id, self.written_id = self.response_id, self.instruction_id
        if not self.writes_instruction:
            self.given_id, self.written_id = self.written_id, self.given_id

    def encode(self, example: Example) -> EncodedExample:
        """Ids of one example, markers included."""
        (encoded,) = self.encode_all([example])
        return encoded

    def encode_all(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """`encode` of each example, faster; call it with batches of `encoder.in_batches`."""
        ids = iter(
            self.codec.encode_all(
                [text for example in examples for text in self._given_and_written(example)]
            )
        )
        encoded = []
        for _ in examples:
            given, written = next(ids), next(ids)
            num_given = len(given) + 5
            whole = np.empty(num_given + len(written) + 1, dtype=self.codec.id_dtype)
            whole[:2] = self.start_id, self.given_id
            whole[2 : num_given - 3] = given
            whole[num_given - 3 : num_given] = self.stop_id, self.start_id, self.written_id
            whole[num_given:-1] = written
            whole[-1] = self.stop_id
            encoded.append(EncodedExample(whole, num_given))
        return encoded

    def prompt_ids(self, given: str) -> list[int]:
        """Ids before the written text, up to and with its role marker.

        `encode(example).ids` is `prompt_ids` of the given text and `written_ids` of the other. An
        empty `given` makes an unconditional prompt.
        """
        text_ids = self.codec.encode(given).tolist()
        opening, turn = (self.start_id, self.given_id), (self.stop_id, self.start_id)
        return [*opening, *text_ids, *turn, self.written_id]

    def written_ids(self, written: str) -> list[int]:
        """Ids of a text after any prompt, with the end marker: those that carry loss."""
        return [*self.codec.encode(written).tolist(), self.stop_id]

    def prompt(self, given: str) -> Prompt:
        """Prompt for sampling: at least one id of text follows, up to the end marker."""
        writable = self.codec.writable_ids(self.stop_id)
        first = writable[writable != self.stop_id]
        return Prompt(self.prompt_ids(given), first, self.stop_id)

    def parse(self, ids: Sequence[int] | npt.NDArray[Any]) -> ParsedExample:
        """Decode a whole example, or a prompt and an unfinished text.

        Padding after an example is ignored. Raises ValueError for ids of another form.
        """
        all_ids = [int(piece_id) for piece_id in ids]
        while all_ids and all_ids[-1] == self.codec.end_id:
            all_ids.pop()
        given, given_end = self._part(all_ids, 0, self.given_id)
        if given_end == len(all_ids):
            return self._parsed(given, None, is_complete=False)
        written, written_end = self._part(all_ids, given_end, self.written_id)
        if written_end != len(all_ids):
            raise ValueError(f"the example ends at {written_end}, and more ids follow")
        return self._parsed(given, written, is_complete=all_ids[-1] == self.stop_id)

    def _part(self, ids: Sequence[int], start: int, role_id: int) -> tuple[str, int]:
        """Text of one part and its end position."""
        if list(ids[start : start + 2]) != [self.start_id, role_id]:
            piece = self.codec.piece(role_id)
            raise ValueError(f"not an example: {START_PIECE}{piece} is missing at {start}")
        stop = start + 2
        while stop < len(ids) and ids[stop] != self.stop_id:
            stop += 1
        text_ids = ids[start + 2 : stop]
        if {self.start_id, self.given_id, self.written_id} & set(text_ids):
            raise ValueError(f"not an example: the text at {start + 2} contains a marker")
        return self.codec.render(text_ids), min(stop + 1, len(ids))

    def _given_and_written(self, example: Example) -> tuple[str, str]:
        if self.writes_instruction:
            return example.response, example.instruction
        return example.instruction, example.response

    def _parsed(self, given: str, written: str | None, *, is_complete: bool) -> ParsedExample:
        if self.writes_instruction:
            return ParsedExample(written, given, is_complete)
        return ParsedExample(given, written, is_complete)
