"""Prompts and examples as ids: texts to continue, chats, and rows to train on."""

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizerBase

from .chat_megaback import START_PIECE, Chat, ChatFormat, UnsupportedChatError
from .new_text_megaback import NewText, stop_texts
from .piece_index_megaback import PieceIndex
from .pieces_megaback import Pieces
from .streaming_megaback import MegabackStreamer

_NO_LOSS = -100
"""Label of an id without loss, as PyTorch and transformers have it."""


class PromptMethods:
    """The methods of the tokenizer that make and read prompts."""

    direction: str
    unit: str
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    model_max_length: int
    chat_template: str | None
    pad: Callable[..., BatchEncoding]
    _pieces: Pieces
    _encoded: Callable[[str], list[int]]
    _rendered: Callable[[list[int], bool], str]

    @property
    def chat_format(self) -> ChatFormat:
        """Encoder and reader of BackChat's chats."""
        is_backward = self.direction == "backward"
        return ChatFormat(self._pieces.id_of, self._encoded, is_backward=is_backward)

    def prompt(self, text: str | list[str]) -> dict[str, Any]:
        """Arguments of generate: `model.generate(**tokenizer.prompt(text))` continues a text.

        The piece next to the new text is held back, since it would imply that a word ends there;
        the first new id is one that ends with it (backward) or begins with it (forward). A list of
        texts is a batch, padded on the left. Raises ValueError for a text that fills the context.
        """
        parts = [self._prompt_ids(one) for one in _texts(text)]
        first_ids = [first for _, first, _ in parts]
        return self._batch([ids for ids, _, _ in parts], first_ids, self.eos_token_id)

    def chat_prompt(self, given: str | list[str]) -> dict[str, Any]:
        """Arguments of generate, for a fine-tuned model, of a response (backward) or an instruction
        (forward).

        `model.generate(**tokenizer.chat_prompt(text))` writes the other one up to its end marker,
        and `tokenizer.written(ids)` is its text. Raises ValueError for a text that fills the
        context.
        """
        form = self.chat_format
        rows = [form.prompt_ids(text) for text in _texts(given)]
        return self._batch(rows, [self._index.ids] * len(rows), form.stop_id)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = True,  # noqa: ARG002 - no text becomes a marker
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        return_assistant_tokens_mask: bool = False,
        **others: Any,
    ) -> Any:
        """Ids of a chat, or of a list of chats: what a BackChat model reads and writes.

        The messages are one of the user (the instruction) and one of the assistant (the response),
        in this order, or only the one for which the model writes the other. It then ends as a
        prompt, unless `add_generation_prompt` is False. The mask of `assistant_masks` is 1 where
        the model writes. Raises ValueError for chats that the model was not trained on, and
        UnsupportedChatError for text in place of ids, truncation, tools and other templates.
        """
        refused = {
            "tools": tools,
            "documents": documents,
            "continue_final_message": continue_final_message,
            "truncation": truncation and truncation != "do_not_truncate",
            "chat_template": chat_template is not None and chat_template != self.chat_template,
            **others,
        }
        for name, value in refused.items():
            if value:
                raise UnsupportedChatError(
                    f"{name} is not supported: a chat is one instruction and one response, as "
                    "whole ids that no template makes; see chat_prompt() and example()"
                )
        if not tokenize:
            raise UnsupportedChatError(
                "tokenize=False is not supported: in the text of a chat markers would be text, "
                "which no text becomes; use the ids of tokenize=True, or chat_prompt(text)"
            )
        if not conversation:
            raise ValueError(f"the conversation is empty; {self.chat_format}")
        is_batch = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
        chats = conversation if is_batch else [conversation]
        rows, masks = [], []
        for chat in chats:
            row, num_given = self._chat_ids(getattr(chat, "messages", chat), add_generation_prompt)
            rows.append(row)
            masks.append([0] * num_given + [1] * (len(row) - num_given))
        padded = dict(self.pad({"input_ids": rows}, padding=padding, max_length=max_length))
        if return_assistant_tokens_mask:
            padded["assistant_masks"] = [
                _spread(mask, attended)
                for mask, attended in zip(masks, padded["attention_mask"], strict=True)
            ]
        if not is_batch and return_tensors is None:
            padded = {name: values[0] for name, values in padded.items()}
        if return_dict is None:  # True since transformers 5
            stock = inspect.signature(PreTrainedTokenizerBase.apply_chat_template)
            return_dict = bool(stock.parameters["return_dict"].default)
        encoding = BatchEncoding(padded, tensor_type=return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    def example(
        self,
        instruction: str | list[str],
        response: str | list[str],
        input: str | list[str | None] | None = None,  # noqa: A002 - as the columns are called
    ) -> dict[str, Any]:
        """`input_ids`, `attention_mask` and `labels` of an example to fine-tune on.

        They are those of `megaback instruct build`: loss is on the text that the model writes, and
        on its end marker; other labels are -100. Lists give columns, as a batched `map` of
        datasets takes them. Raises ValueError for an empty instruction or response.
        """
        if isinstance(instruction, str) != isinstance(response, str):
            raise TypeError("give an instruction and a response, or a list of each")
        if isinstance(instruction, str):
            columns = self.example([instruction], [response], [input])  # type: ignore[list-item]
            return {name: values[0] for name, values in columns.items()}
        inputs = [None] * len(instruction) if input is None else input
        lengths = len(instruction), len(response), len(inputs)
        if isinstance(inputs, str) or len(set(lengths)) > 1:
            raise ValueError(
                "the columns of instructions, responses and inputs are not as long as each other; "
                "give one of each per example"
            )
        form = self.chat_format
        rows: dict[str, Any] = {"input_ids": [], "attention_mask": [], "labels": []}
        for question, given_input, answer in zip(instruction, inputs, response, strict=True):
            chat = form.example(question, given_input, answer)
            given, written = form.prompt_ids(chat.given), form.written_ids(chat.written or "")
            rows["input_ids"].append(given + written)
            rows["attention_mask"].append([1] * (len(given) + len(written)))
            rows["labels"].append([_NO_LOSS] * len(given) + written)
        return rows

    def written(self, token_ids: Any) -> str | list[str]:
        """The text that a model wrote for a chat, from the whole list of ids.

        Returns a list of texts for a batch.
        """
        ids = np.atleast_1d(as_array(token_ids))
        if ids.ndim > 1:
            return [str(self.written(row)) for row in ids]
        row, form = ids.tolist(), self.chat_format
        if form.written_id not in row:
            raise ValueError(
                f"the ids have no id {form.written_id}, after which the written text begins; pass "
                "the prompt's ids too, as generate returns them"
            )
        begin = row.index(form.written_id) + 1
        end = row.index(form.stop_id, begin) if form.stop_id in row[begin:] else len(row)
        return self._rendered(row[begin:end], False)

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
            is_chat = not given and prompt_ids[:1] == [self._pieces.id_of(START_PIECE)]
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

    def _chat_ids(self, messages: Any, is_prompt: bool | None) -> tuple[list[int], int]:
        """Ids of a chat, and the number of those before the text that the model writes."""
        form = self.chat_format
        chat: Chat = form.read(messages)
        if chat.written is not None:
            if is_prompt:
                raise ValueError(
                    f"add_generation_prompt is True, but the message of {form.written_role!r} is "
                    f"the one that the model writes; omit either"
                )
            given = form.prompt_ids(chat.given)
            return given + form.written_ids(chat.written), len(given)
        if is_prompt is False:
            ids = form.given_ids(chat.given)
        else:
            ids = form.prompt_ids(chat.given)
            self._require_room(len(ids))
        return ids, len(ids)

    @cached_property
    def _index(self) -> PieceIndex:
        by_end = self.direction == "backward" and self.unit == "token"
        return PieceIndex(self._pieces.texts, by_end=by_end)

    @cached_property
    def _ids_between_words(self) -> list[int]:
        """Ids that begin with whitespace, and the end marker."""
        texts = self._pieces.texts
        ids = [i for i in self._index.ids if texts[i][:1].isspace()]
        return sorted([*ids, self.eos_token_id])

    def _prompt_ids(self, text: str) -> tuple[list[int], list[int] | None, bytes]:
        """Ids of a text, the ids allowed next (None for any), and the bytes that are held back."""
        ids = [self.bos_token_id, *self._encoded(text)]
        if len(ids) == 1:
            return ids, None, b""
        if self.direction == "backward" and self.unit == "word":
            return ids, self._ids_between_words, b""
        held_back = self._pieces.texts[ids.pop()]
        return ids, self._index.containing(held_back), held_back

    def _batch(
        self, rows: list[list[int]], first_ids: list[list[int] | None], end_id: int
    ) -> dict[str, Any]:
        """Arguments of `generate`, padded on the left, for texts that end with `end_id`.

        Raises ValueError for a prompt that is too long.
        """
        longest = max(map(len, rows))
        self._require_room(longest)
        padded = [[self.pad_token_id] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        # Not above: encoding and decoding need no torch.
        import torch
        from transformers import LogitsProcessorList

        from .generation_megaback import PromptRules

        rules = PromptRules(longest, first_ids, self.model_max_length, end_id)
        unwanted = [i for i in self._index.ids_without_text if i != end_id]
        return {
            "input_ids": torch.tensor(padded),
            "attention_mask": torch.tensor(mask),
            "logits_processor": LogitsProcessorList([rules]),
            "eos_token_id": end_id,
            "suppress_tokens": unwanted,
        }

    def _require_room(self, num_tokens: int) -> None:
        """Raises ValueError for a prompt that leaves no room in the context."""
        if num_tokens >= self.model_max_length:
            raise ValueError(
                f"the text is {num_tokens} tokens, which leaves no room in the model's context of "
                f"{self.model_max_length} tokens; shorten it"
            )


def as_array(token_ids: Any) -> Any:
    """Ids as an array of the host."""
    if hasattr(token_ids, "detach"):  # a tensor of torch
        token_ids = token_ids.detach().cpu()
    return np.asarray(token_ids, dtype=np.int64)


def _spread(mask: list[int], attended: list[int]) -> list[int]:
    """A mask of a row's ids with 0 for the padding, on either side."""
    values = iter(mask)
    return [next(values) if one else 0 for one in attended]


def _texts(given: str | list[str]) -> list[str]:
    """The given texts as a list. Raises TypeError for anything but one or several strings."""
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise TypeError("expected a string or a non-empty list of strings")
    return texts
