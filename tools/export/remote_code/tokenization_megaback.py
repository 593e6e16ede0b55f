"""Tokenizer for transformers of a model that writes backward; encoding and decoding reverse.

`megaback convert --to hf` puts this file, and those that it imports from beside it, into the folder
that it writes, and `AutoTokenizer` loads them from there (`trust_remote_code=True`). They need
transformers and sentencepiece, not megaback.
`tokenizer(text)` gives ids in the order in which the model reads them, after the begin marker;
`tokenizer.decode(ids)` gives the text in the order in which a person does. No text becomes a
control id, whatever it spells. Sides of padding and truncation are those of ids: with a backward
model, the left ones are the last ones of the text. Uses that cannot give
correct results raise an error.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessorList, PreTrainedTokenizer

from .generation_megaback import PromptRules
from .new_text_megaback import NewText, reverse_words, stop_texts
from .pieces_megaback import BEGIN_PIECE, END_PIECE, Pieces
from .streaming_megaback import MegabackStreamer

_START_PIECE = "<|im_start|>"
_STOP_PIECE = "<|im_end|>"
_REFUSAL_NAME = "tokenizer.json"
"""A file beside the vocabulary that no library can load, so that stock classes raise an error."""
_OTHER_SIDE = {"only_first": "only_second", "only_second": "only_first"}
# Modules of transformers that assume that text grows at its end, and what to use instead.
_FORWARD_ONLY = {
    "transformers.pipelines.text_generation": "the stock text-generation pipeline, which puts new "
    "text behind the given one: use pipeline('megaback-reverse', model=FOLDER, "
    "trust_remote_code=True), or prompt() and decode()",
    "transformers.generation.streamers": "a TextStreamer: this model's text grows at its beginning;"
    " use tokenizer.streamer()",
    "transformers.generation.stopping_criteria": "stop_strings, which are looked for at the end of "
    "a text: use `stop` of pipeline('megaback-reverse', …)",
}

# Modules of TRL that encode texts for training: they spell the end marker in the text, and take a
# prompt's ids for the first ones of prompt and completion.
_TEXT_TRAINERS = {
    f"trl.{name}"
    for name in (
        "data_utils",
        "trainer.sft_trainer",
        "trainer.dpo_trainer",
        "trainer.kto_trainer",
        "trainer.reward_trainer",
    )
}


class MegabackTokenizer(PreTrainedTokenizer):  # type: ignore[misc]
    """Tokenizer that encodes and decodes in the model's direction."""

    # Not *.model: stock classes would load a file of that name, and read forward.
    vocab_files_names = {"vocab_file": "megaback.spm"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self, vocab_file: str, direction: str = "backward", unit: str = "token", **kwargs: Any
    ) -> None:
        if kwargs.get("add_bos_token") is False or kwargs.get("add_eos_token"):
            raise ValueError(
                "this tokenizer adds the begin marker and no end marker: pass "
                "add_special_tokens=False where you want none, and append eos_token_id yourself"
            )
        self.vocab_file = vocab_file
        self.direction, self.unit = direction, unit
        self._pieces = Pieces(vocab_file)
        kwargs.setdefault("bos_token", BEGIN_PIECE)
        kwargs.setdefault("eos_token", END_PIECE)
        kwargs.setdefault("pad_token", kwargs["eos_token"])
        kwargs.setdefault("padding_side", "left")
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(direction=direction, unit=unit, **kwargs)

    def prompt(self, text: str | list[str]) -> dict[str, Any]:
        """Arguments of generate: `model.generate(**tokenizer.prompt(text))` continues a text.

        The piece next to the new text is held back, since it would imply that a word ends there;
        the first new id is one that ends with it (backward) or begins with it (forward). A list of
        texts is a batch, padded on the left. Raises ValueError for a text that fills the context.
        """
        texts = _texts(text)
        parts = [self._prompt_ids(one) for one in texts]
        first_ids = [first for _, first, _ in parts]
        return self._batch([ids for ids, _, _ in parts], first_ids, self.eos_token_id)

    def new_text(
        self,
        given: str,
        stop: str | Sequence[str] | None = None,
        prompt_ids: list[int] | None = None,
    ) -> NewText:
        """Reader of the text that a model writes after `prompt(given)`, from its new ids.

        `prompt_ids` are the ids that it was given, if they may be others: those of a chat, or of
        `tokenizer(given)`. Raises ValueError for ids of another text.
        """
        ids, _, held_back = self._prompt_ids(given)
        if prompt_ids is not None and prompt_ids != ids:
            is_chat = not given and prompt_ids[:1] == [self._pieces.id_of(_START_PIECE)]
            if not is_chat and prompt_ids != [self.bos_token_id, *self._encoded(given)]:
                raise ValueError(
                    f"the model was given another text than {given!r:.80}; pass the given text: "
                    "tokenizer.streamer(given=text), or none for a chat"
                )
            held_back = b""
        texts = self._pieces.texts
        return NewText(texts, self.direction, self.unit, held_back, stop_texts(stop))

    def streamer(
        self,
        on_text: Callable[[str], None] | None = None,
        *,
        given: str = "",
        stop: str | Sequence[str] | None = None,
        whole: bool = False,
        timeout_s: float | None = None,
    ) -> MegabackStreamer:
        """Streamer of `generate` that passes each new part of the text to a function.

        A part precedes the earlier ones if the model is backward; with `whole`, the text so far is
        passed in place of it. Without a function, the parts are the streamer's items, for a thread
        that iterates while another one generates. `given` is the text that `prompt` was given.
        """
        return MegabackStreamer(
            self, on_text, given=given, stop=stop, whole=whole, timeout_s=timeout_s
        )

    def chat_prompt(self, given: str | list[str]) -> dict[str, Any]:
        """Arguments of generate, for a fine-tuned model, of a response (backward) or an instruction
        (forward).

        `model.generate(**tokenizer.chat_prompt(text))` writes the other one up to its end marker,
        and `tokenizer.written(ids)` is its text. Raises ValueError for a text that fills the
        context.
        """
        given_role, written_role = "<|response|>", "<|instruction|>"
        if self.direction != "backward":
            given_role, written_role = written_role, given_role
        start_id, stop_id, given_id, written_id = map(
            self._pieces.id_of, (_START_PIECE, _STOP_PIECE, given_role, written_role)
        )
        rows = [
            [start_id, given_id, *self._encoded(text), stop_id, start_id, written_id]
            for text in _texts(given)
        ]
        with_text = [i for i, text in enumerate(self._pieces.texts) if text]
        unwanted = set(range(self.vocab_size)) - {*with_text, stop_id}
        return {
            **self._batch(rows, [with_text] * len(rows), stop_id),
            "eos_token_id": stop_id,
            "suppress_tokens": sorted(unwanted),
        }

    def written(self, token_ids: Any) -> str | list[str]:
        """The text that a model wrote after a `chat_prompt`, from the whole list of ids.

        Returns a list of texts for a batch.
        """
        ids = np.atleast_1d(_array(token_ids))
        if ids.ndim > 1:
            return [str(self.written(row)) for row in ids]
        row = ids.tolist()
        role = "<|instruction|>" if self.direction == "backward" else "<|response|>"
        begin = row.index(self._pieces.id_of(role)) + 1
        stop_id = self._pieces.id_of(_STOP_PIECE)
        end = row.index(stop_id, begin) if stop_id in row[begin:] else len(row)
        return self._rendered(row[begin:end], names_controls=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__")
        if caller in _TEXT_TRAINERS:
            raise NotImplementedError(
                "TRL cannot encode texts with this tokenizer, to which a spelled marker is text; "
                "give it rows with `input_ids` and `labels`: for a document both are "
                "[*tokenizer(text).input_ids, tokenizer.eos_token_id]"
            )
        self._refuse_forward_only(caller)
        return super().__call__(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Text in the order in which a person reads it; no spaces are cleaned up."""
        self._refuse_forward_only(sys._getframe(1).f_globals.get("__name__"))
        return super().decode(*args, **kwargs)

    def apply_chat_template(self, *_args: Any, **_kwargs: Any) -> Any:
        """Always raises NotImplementedError; use `chat_prompt` instead."""
        raise NotImplementedError(
            "this tokenizer encodes no text as a marker, so chat templates are not supported; use "
            "chat_prompt(text), which returns the arguments of generate(), and written(ids)"
        )

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        self._refuse_forward_only(sys._getframe(1).f_globals.get("__name__"))
        return {self._pieces.spelling(i): i for i in range(self.vocab_size)}

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **_kwargs: Any
    ) -> list[str]:
        """Pieces in the order in which the model reads them."""
        texts = [text] if pair is None else [text, pair]
        if self.direction == "backward":
            texts.reverse()
        ids = [i for one in texts for i in self._encoded(one)]
        if add_special_tokens:
            ids.insert(0, self.bos_token_id)
        return [self._pieces.spelling(i) for i in ids]

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; a backward model reads the second text of a pair first."""
        if pair_ids is not None and not add_special_tokens and self.direction == "backward":
            ids, pair_ids = pair_ids, ids
            given = kwargs.get("truncation", False)
            kwargs["truncation"] = _OTHER_SIDE.get(str(getattr(given, "value", given)), given)
        return super().prepare_for_model(
            ids, pair_ids, add_special_tokens=add_special_tokens, **kwargs
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The begin marker, then the ids in the order in which the model reads the two texts."""
        return [self.bos_token_id, *self._in_order(token_ids_0, token_ids_1)]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for the begin marker, and for any other control id."""
        ids = [*token_ids_0, *(token_ids_1 or [])]
        if not already_has_special_tokens:
            ids = self._in_order(token_ids_0, token_ids_1)
        mask = [int(self._pieces.is_control(i)) for i in ids]
        return mask if already_has_special_tokens else [1, *mask]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 for the begin marker and the first text, 1 for the second one of a pair."""
        second = None if token_ids_1 is None else [1] * len(token_ids_1)
        return [0, *self._in_order([0] * len(token_ids_0), second)]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:  # noqa: ARG002
        return 1

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text in reading order, from pieces in the model's order."""
        return self._rendered([self._convert_token_to_id(token) for token in tokens], True)

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Copy the SentencePiece model, and the file that keeps stock classes from reading it."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        source = Path(self.vocab_file)
        target = Path(save_directory) / f"{prefix}{self.vocab_files_names['vocab_file']}"
        copies = {source: target}
        if (refusal := source.with_name(_REFUSAL_NAME)).is_file():
            copies[refusal] = target.with_name(f"{prefix}{_REFUSAL_NAME}")
        for one, copy in copies.items():
            if one.absolute() != copy.absolute():
                shutil.copyfile(one, copy)
        return tuple(map(str, copies.values()))

    def _refuse_forward_only(self, caller: str | None) -> None:
        """Raises NotImplementedError for a caller that needs text that grows at its end."""
        if self.direction == "backward" and caller in _FORWARD_ONLY:
            raise NotImplementedError(
                f"a model that writes backwards cannot be used with {_FORWARD_ONLY[caller]}"
            )

    def add_special_tokens(self, special_tokens_dict: dict[str, Any], *args: Any, **kw: Any) -> int:
        """Accept tokens of the vocabulary. Raises ValueError for any other."""
        for given in special_tokens_dict.values():
            self._require_pieces(given if isinstance(given, list | tuple) else [given])
        return int(super().add_special_tokens(special_tokens_dict, *args, **kw))

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        self._require_pieces(new_tokens or [])
        return int(super()._add_tokens(new_tokens, special_tokens=special_tokens))

    def __setattr__(self, key: str, value: Any) -> None:
        if key.endswith("_token") and value is not None and "_pieces" in self.__dict__:
            self._require_pieces([value])
        super().__setattr__(key, value)

    def _require_pieces(self, tokens: Any) -> None:
        known = self.get_vocab()
        for token in map(str, tokens):
            if token and token not in known:
                raise ValueError(
                    f"this tokenizer cannot add {token!r}: its vocabulary is that of its "
                    "SentencePiece model, and no text becomes a marker; pad with its pad_token"
                )

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        _require_known(kwargs)
        return super()._encode_plus(*args, **kwargs)

    def _batch_encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        """Counterpart of `_encode_plus` in transformers 4."""
        _require_known(kwargs)
        return super()._batch_encode_plus(*args, **kwargs)

    @property
    def _reverses_words(self) -> bool:
        return bool(self.direction == "backward" and self.unit == "word")

    @property
    def _reverses_ids(self) -> bool:
        return bool(self.direction == "backward" and self.unit == "token")

    @property
    def _writable(self) -> list[int]:
        texts = self._pieces.texts
        return [i for i, text in enumerate(texts) if i == self.eos_token_id or text]

    def _in_order(self, first: list[int], second: list[int] | None) -> list[int]:
        parts = (first, second or [])
        if self.direction == "backward":
            parts = parts[::-1]
        return [*parts[0], *parts[1]]

    def _prompt_ids(self, text: str) -> tuple[list[int], list[int] | None, bytes]:
        """Ids of a text, the ids allowed next (None for any), and the bytes that are held back."""
        ids = [self.bos_token_id, *self._encoded(text)]
        if len(ids) == 1:
            return ids, None, b""
        texts = self._pieces.texts
        if self._reverses_words:
            first_ids = [
                i for i in self._writable if i == self.eos_token_id or texts[i][:1].isspace()
            ]
            return ids, first_ids, b""
        held_back = texts[ids.pop()]
        contains = bytes.endswith if self._reverses_ids else bytes.startswith
        return ids, [i for i in self._writable if contains(texts[i], held_back)], held_back

    def _batch(
        self, rows: list[list[int]], first_ids: list[list[int] | None], end_id: int
    ) -> dict[str, Any]:
        """Arguments of `generate`, padded on the left. Raises ValueError for a prompt that is too
        long."""
        longest = max(map(len, rows))
        if longest >= self.model_max_length:
            raise ValueError(
                f"the text is {longest} tokens, which leaves no room in the model's context of "
                f"{self.model_max_length} tokens; shorten it"
            )
        padded = [[self.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        rules = PromptRules(longest, first_ids, self.model_max_length, end_id)
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": torch.tensor(mask),
            "logits_processor": LogitsProcessorList([rules]),
        }

    def _encoded(self, text: str) -> list[int]:
        if self._reverses_words:
            text = reverse_words(text)
        ids = self._pieces.encode(text)
        return ids[::-1] if self._reverses_ids else ids

    def _rendered(self, ids: list[int], names_controls: bool) -> str:
        if self._reverses_ids:
            ids = ids[::-1]
        texts = self._pieces.texts
        if names_controls:
            parts = [texts[i] or self._pieces.spelling(i).encode() for i in ids]
        else:
            parts = [texts[i] for i in ids]
        raw = b"".join(parts)
        try:
            text = raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = raw.decode("utf-8", "replace")
        return reverse_words(text) if self._reverses_words else text

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **_kwargs: Any) -> str:
        ids = np.atleast_1d(_array(token_ids)).tolist()
        return self._rendered(ids, names_controls=not skip_special_tokens)

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.id_of(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces.spelling(index)


def _texts(given: str | list[str]) -> list[str]:
    """The given texts as a list. Raises TypeError for anything but one or several strings."""
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError("expected a string or a non-empty list of strings")
    return texts


def _array(token_ids: Any) -> Any:
    if isinstance(token_ids, torch.Tensor):
        token_ids = token_ids.detach().cpu()
    return np.asarray(token_ids, dtype=np.int64)


def _require_known(kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for options that have no meaning for reversed ids."""
    if kwargs.get("is_split_into_words"):
        raise NotImplementedError(
            "is_split_into_words is not supported: the whitespace between words is unknown; pass "
            "the text itself"
        )
    if kwargs.get("return_offsets_mapping"):
        raise NotImplementedError(
            "return_offsets_mapping is not supported by this tokenizer; leave it False"
        )
