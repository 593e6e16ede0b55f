"""Tokenizer for transformers of a model that writes backward; encoding and decoding reverse.

`megaback convert --to hf` puts this file, and those that it imports from beside it, into the folder
that it writes, and `AutoTokenizer` loads them from there (`trust_remote_code=True`). They need
transformers and the library of the vocabulary (sentencepiece or tokenizers), not megaback.
`tokenizer(text)` gives ids in the order in which the model reads them, after the begin marker;
`tokenizer.decode(ids)` gives the text in the order in which a person does. No text becomes a
control id, whatever it spells. Sides of padding and truncation are those of ids: with a backward
model, the left ones are the last ones of the text. Uses that cannot give
correct results raise an error.
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizer

# Before version 5, transformers finds only files that this one imports, not what those import.
from .chat_megaback import UnsupportedChatError
from .new_text_megaback import reverse_words
from .piece_index_megaback import PieceIndex  # noqa: F401
from .pieces_megaback import BEGIN_PIECE, END_PIECE, VOCABULARY_NAME, Pieces
from .prompts_megaback import PromptMethods, as_array
from .streaming_megaback import MegabackStreamer  # noqa: F401

if TYPE_CHECKING:  # copied by transformers, and imported only by what needs torch
    from .generation_megaback import PromptRules  # noqa: F401

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

# Modules of trainers that encode texts: they spell the end marker in the text, take a prompt's ids
# for the first ones of prompt and completion, and learn all of a chat.
_TEXT_TRAINERS = {
    "trl.data_utils": "TRL",
    "trl.trainer.sft_trainer": "TRL",
    "trl.trainer.dpo_trainer": "TRL",
    "trl.trainer.kto_trainer": "TRL",
    "trl.trainer.reward_trainer": "TRL",
    "llamafactory.data": "LLaMA-Factory",
    "axolotl.prompt_tokenizers": "axolotl",
    "axolotl.prompt_strategies": "axolotl",
    "axolotl.utils.data": "axolotl",
}
"""Packages and modules, and the name of the program."""


class MegabackTokenizer(PromptMethods, PreTrainedTokenizer):  # type: ignore[misc]
    """Tokenizer that encodes and decodes in the model's direction."""

    vocab_files_names = {"vocab_file": VOCABULARY_NAME}
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__")
        self._refuse_text_trainers(caller)
        self._refuse_forward_only(caller)
        return super().__call__(*args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Ids of a text: see the module."""
        self._refuse_text_trainers(sys._getframe(1).f_globals.get("__name__"))
        return super().encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """Text in the order in which a person reads it; no spaces are cleaned up."""
        self._refuse_forward_only(sys._getframe(1).f_globals.get("__name__"))
        return super().decode(*args, **kwargs)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """Ids of a chat: see `PromptMethods.apply_chat_template`."""
        caller = sys._getframe(1).f_globals.get("__name__")
        self._refuse_text_trainers(caller)
        self._refuse_forward_only(caller)
        return super().apply_chat_template(*args, **kwargs)

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
        """Copy the vocabulary, and the file that keeps stock classes from reading it."""
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

    def _refuse_text_trainers(self, caller: str | None) -> None:
        """Raises NotImplementedError for a caller that encodes rows for training in its own way."""
        for module, program in _TEXT_TRAINERS.items():
            if f"{caller}.".startswith(f"{module}."):
                raise NotImplementedError(
                    f"{program} cannot encode texts and messages with this tokenizer, to which a "
                    "spelled marker is text; give it rows with `input_ids` and `labels`: those of "
                    "example(instruction, response), or for a document as both "
                    "[*tokenizer(text).input_ids, tokenizer.eos_token_id]"
                )

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
        if key == "chat_template" and value != self.__dict__.get(key, value):
            raise UnsupportedChatError(
                "this tokenizer cannot take another chat template: the chats of its model are ids "
                "that no template makes; use apply_chat_template, chat_prompt() or example()"
            )
        if key.endswith("_token") and value is not None and "_pieces" in self.__dict__:
            self._require_pieces([value])
        super().__setattr__(key, value)

    def _require_pieces(self, tokens: Any) -> None:
        known = self.get_vocab()
        for token in map(str, tokens):
            if token and token not in known:
                raise ValueError(
                    f"this tokenizer cannot add {token!r}: its vocabulary is fixed, "
                    "and no text becomes a marker; pad with its pad_token"
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

    def _in_order(self, first: list[int], second: list[int] | None) -> list[int]:
        parts = (first, second or [])
        if self.direction == "backward":
            parts = parts[::-1]
        return [*parts[0], *parts[1]]

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
        ids = np.atleast_1d(as_array(token_ids))
        num_ids = len(self._pieces.texts)
        if unknown := ids[(ids < 0) | (ids >= num_ids)].tolist():
            raise ValueError(
                f"id {unknown[0]} is not in the vocabulary of {num_ids} ids; labels without loss "
                "(-100) have no text"
            )
        return self._rendered(ids.tolist(), names_controls=not skip_special_tokens)

    def _convert_token_to_id(self, token: str) -> int:
        return self._pieces.id_of(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces.spelling(index)


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
