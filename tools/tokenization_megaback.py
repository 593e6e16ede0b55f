"""The tokenizer of a model that writes backwards, for transformers: it reverses by itself.

`megaback convert --to hf` puts this file into the folder that it writes, and `AutoTokenizer` loads
it from there (`trust_remote_code=True`). It needs transformers and sentencepiece, not megaback.
`tokenizer(text)` gives ids in the order in which the model reads them, after the begin marker;
`tokenizer.decode(ids)` gives the text in the order in which a person does. No text becomes a
control id, whatever it spells.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizer

_SPACE_SYMBOL = "\u2581"
_STOP_PIECE = "<|im_end|>"
# What SentencePiece cannot give back is spelled in byte pieces.
_SPELLED_IN_BYTES = re.compile(f"([{_SPACE_SYMBOL}\ud800-\udfff]+)")
_RUNS = re.compile(r"\s+|\S+")


def reverse_words(text: str) -> str:
    """Reverse the sequence of words and of the whitespace between them: its own inverse."""
    return "".join(reversed(_RUNS.findall(text)))


class FirstIds(LogitsProcessor):  # type: ignore[misc]
    """Lets the first new id be one of a few, so that the given text stays whole."""

    def __init__(self, given_tokens: int, first_ids: list[int]) -> None:
        self.given_tokens = given_tokens
        self.first_ids = first_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[-1] != self.given_tokens:
            return scores
        allowed = torch.full_like(scores, -torch.inf)
        allowed[:, self.first_ids] = 0
        return scores + allowed


class MegabackTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """SentencePiece, read in the model's direction."""

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, vocab_file: str, direction: str = "backward", unit: str = "token", **kwargs: Any
    ) -> None:
        self.vocab_file = vocab_file
        self.direction, self.unit = direction, unit
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        bos_id, eos_id = self._pieces.bos_id(), self._pieces.eos_id()
        kwargs.setdefault("bos_token", self._pieces.id_to_piece(bos_id))
        kwargs.setdefault("eos_token", self._pieces.id_to_piece(eos_id))
        kwargs.setdefault("pad_token", kwargs["eos_token"])
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(direction=direction, unit=unit, **kwargs)

    def prompt(self, text: str) -> dict[str, Any]:
        """What `model.generate(**tokenizer.prompt(text))` goes on from a given text with.

        The piece next to the text to come is held back, as by itself it says that a word ends
        there; the first new id is one that ends with it (backward) or begins with it.
        """
        ids = [self.bos_token_id, *self._encoded(text)]
        given: dict[str, Any] = {}
        if len(ids) > 1:
            if self._reverses_words:
                first_ids = [
                    i
                    for i in self._writable
                    if i == self.eos_token_id or self._bytes(i)[:1].isspace()
                ]
            else:
                held_back = self._bytes(ids.pop())
                contains = bytes.endswith if self._reverses_ids else bytes.startswith
                first_ids = [i for i in self._writable if contains(self._bytes(i), held_back)]
            given["logits_processor"] = LogitsProcessorList([FirstIds(len(ids), first_ids)])
        input_ids = torch.tensor([ids])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **given}

    def chat_prompt(self, given: str) -> dict[str, Any]:
        """What a fine-tuned model is given: a response (backward) or an instruction (forward).

        `model.generate(**tokenizer.chat_prompt(text))` writes the other one up to its end marker,
        and `tokenizer.written(ids)` is its text.
        """
        given_role, written_role = "<|response|>", "<|instruction|>"
        if self.direction != "backward":
            given_role, written_role = written_role, given_role
        start_id, stop_id, given_id, written_id = map(
            self._pieces.piece_to_id, ("<|im_start|>", _STOP_PIECE, given_role, written_role)
        )
        text_ids = self._encoded(given)
        ids = [start_id, given_id, *text_ids, stop_id, start_id, written_id]
        input_ids = torch.tensor([ids])
        with_text = [i for i in range(self.vocab_size) if self._bytes(i)]
        unwanted = set(range(self.vocab_size)) - {*with_text, stop_id}
        return {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "eos_token_id": stop_id,
            "suppress_tokens": sorted(unwanted),
            "logits_processor": LogitsProcessorList([FirstIds(len(ids), with_text)]),
        }

    def written(self, token_ids: Any) -> str:
        """The text that a model wrote after a `chat_prompt`, of the whole list of ids."""
        ids = np.atleast_1d(np.asarray(token_ids, dtype=np.int64)).tolist()
        role = "<|instruction|>" if self.direction == "backward" else "<|response|>"
        begin = ids.index(self._pieces.piece_to_id(role)) + 1
        stop_id = self._pieces.piece_to_id(_STOP_PIECE)
        end = ids.index(stop_id, begin) if stop_id in ids[begin:] else len(ids)
        return self._rendered(ids[begin:end], names_controls=False)

    @property
    def vocab_size(self) -> int:
        return int(self._pieces.vocab_size())

    def get_vocab(self) -> dict[str, int]:
        return {self._pieces.id_to_piece(i): i for i in range(self.vocab_size)}

    def tokenize(self, text: str, **_kwargs: Any) -> list[str]:
        """Pieces in the order in which the model reads them."""
        return [self._pieces.id_to_piece(i) for i in self._encoded(text)]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The begin marker, then the ids."""
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for the begin marker, and for any other control id."""
        ids = [*token_ids_0, *(token_ids_1 or [])]
        mask = [int(self._pieces.is_control(i)) for i in ids]
        return mask if already_has_special_tokens else [1, *mask]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """All of one type."""
        return [0] * (1 + len(token_ids_0) + len(token_ids_1 or []))

    def num_special_tokens_to_add(self, pair: bool = False) -> int:  # noqa: ARG002
        return 1

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text, in the order in which a person reads, of pieces in the model's order."""
        return self._rendered([self._convert_token_to_id(token) for token in tokens], True)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy the SentencePiece model."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        if target.absolute() != Path(self.vocab_file).absolute():
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    @property
    def _reverses_words(self) -> bool:
        return bool(self.direction == "backward" and self.unit == "word")

    @property
    def _reverses_ids(self) -> bool:
        return bool(self.direction == "backward" and self.unit == "token")

    @property
    def _writable(self) -> list[int]:
        ids = range(self.vocab_size)
        return [i for i in ids if i == self.eos_token_id or self._bytes(i)]

    def _encoded(self, text: str) -> list[int]:
        if self._reverses_words:
            text = reverse_words(text)
        ids: list[int] = []
        for index, part in enumerate(_SPELLED_IN_BYTES.split(text)):
            if index % 2:
                raw = part.encode("utf-8", "surrogatepass")
                ids += [self._pieces.piece_to_id(f"<0x{value:02X}>") for value in raw]
            else:
                ids += self._pieces.encode(part)
        return ids[::-1] if self._reverses_ids else ids

    def _bytes(self, piece_id: int, names_controls: bool = False) -> bytes:
        piece: str = self._pieces.id_to_piece(piece_id)
        if self._pieces.is_byte(piece_id):
            return bytes([int(piece[3:5], 16)])
        if self._pieces.is_control(piece_id) or self._pieces.is_unknown(piece_id):
            return piece.encode() if names_controls else b""
        return piece.replace(_SPACE_SYMBOL, " ").encode()

    def _rendered(self, ids: list[int], names_controls: bool) -> str:
        if self._reverses_ids:
            ids = ids[::-1]
        raw = b"".join(self._bytes(i, names_controls) for i in ids)
        try:
            text = raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = raw.decode("utf-8", "replace")
        return reverse_words(text) if self._reverses_words else text

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_kwargs: Any) -> str:
        ids = np.atleast_1d(np.asarray(token_ids, dtype=np.int64)).tolist()
        return self._rendered(ids, names_controls=not skip_special_tokens)

    def _convert_token_to_id(self, token: str) -> int:
        return int(self._pieces.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self._pieces.id_to_piece(index))
