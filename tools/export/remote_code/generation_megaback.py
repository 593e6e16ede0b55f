"""Generation by a model that writes backward: rules of its prompts, stop texts, its pipeline."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, Pipeline, StoppingCriteria, StoppingCriteriaList

from .chat_megaback import Chat
from .new_text_megaback import NewText, stop_texts

_LENGTHS = {"max_new_tokens", "max_length", "generation_config"}
_OF_THE_PROMPT = {"logits_processor", "suppress_tokens"}
"""Arguments of `generate` that a prompt has, to which others are added."""
_MAX_NEW_TOKENS = 256


class PromptRules(LogitsProcessor):  # type: ignore[misc]
    """Constrains the first new id to fit the prompt, and ends rows at the end of the context."""

    def __init__(
        self,
        given_tokens: int,
        first_ids: list[list[int] | None],
        context_tokens: int,
        end_id: int,
    ) -> None:
        """`first_ids`: per prompt, the ids allowed as its first new one; None for any."""
        self.given_tokens = given_tokens
        self.first_ids = first_ids
        self.context_tokens = context_tokens
        self.end_id = end_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_first = input_ids.shape[-1] == self.given_tokens
        is_last = input_ids.shape[-1] >= self.context_tokens - 1
        if not is_first and not is_last:
            return scores
        allowed = torch.full_like(scores, -torch.inf)
        # Beams, or several samples of a prompt.
        rows_each = max(1, len(scores) // len(self.first_ids))
        for row in range(len(scores)):
            first_ids = self.first_ids[row // rows_each] if is_first else [self.end_id]
            allowed[row, slice(None) if first_ids is None else first_ids] = 0
        return scores + allowed


class StopAtText(StoppingCriteria):  # type: ignore[misc]
    """Ends rows whose new text contains a stop text."""

    def __init__(self, given_tokens: int, new_texts: list[NewText]) -> None:
        """`new_texts`: one per prompt."""
        self.given_tokens = given_tokens
        self.new_texts = new_texts

    def __call__(
        self, input_ids: torch.Tensor, _scores: torch.Tensor, **_kwargs: Any
    ) -> torch.Tensor:
        rows_each = max(1, len(input_ids) // len(self.new_texts))
        written = input_ids[:, self.given_tokens :].tolist()
        are_stopped = [
            self.new_texts[row // rows_each].read(ids, is_whole=False)[1]
            for row, ids in enumerate(written)
        ]
        return torch.tensor(are_stopped, dtype=torch.bool, device=input_ids.device)


class MegabackTextGeneration(Pipeline):  # type: ignore[misc]
    """`pipeline("megaback-reverse", model=FOLDER, trust_remote_code=True)`: text in reading order.

    Takes an ending, or a beginning if the model is a forward one; or the messages of a chat
    without the one that the model writes; or a list of these, in batches of `batch_size`. `stop` is
    a text or several, before which (in the model's direction) the new text ends; `streamer` is one
    of `tokenizer.streamer`. Other options than these and `return_full_text` are passed to
    `generate`; without a length among them, at most 256 tokens are new.
    """

    def _sanitize_parameters(
        self,
        return_full_text: bool | None = None,
        stop: str | Sequence[str] | None = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        shown = {} if return_full_text is None else {"return_full_text": return_full_text}
        if stop is not None:
            generate_kwargs["stops"] = stop_texts(stop)
        return {}, generate_kwargs, shown

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
            inputs = list(inputs)  # also a tuple, and a column of datasets
            if not inputs:
                return []
            if isinstance(inputs[0], dict):
                return super().__call__([inputs], *args, **kwargs)[0]
        return super().__call__(inputs, *args, **kwargs)

    def preprocess(self, text: Any) -> dict[str, Any]:
        """The given text, also of a chat.

        Raises TypeError for anything else, and ValueError for a chat of another form.
        """
        if isinstance(text, str):
            return {"given": text, "is_chat": False}
        messages = getattr(text, "messages", text)
        if not isinstance(messages, list | tuple):
            raise TypeError(
                f"give a text, the messages of a chat, or a list of these, not {messages!r:.80}"
            )
        chat = self.tokenizer.chat_format.read(messages)
        if chat.written is not None:
            raise ValueError(f"the chat has both messages already; {self.tokenizer.chat_format}")
        return {"given": chat.given, "is_chat": True}

    def _forward(
        self, inputs: dict[str, Any], stops: tuple[str, ...] = (), **generate_kwargs: Any
    ) -> dict[str, Any]:
        given, is_chat = inputs["given"], inputs["is_chat"]
        texts = [given] if isinstance(given, str) else given
        are_chats = [is_chat] if isinstance(given, str) else is_chat
        if len(set(are_chats)) > 1:
            raise ValueError("a batch has texts and chats; give one kind at a time")
        if are_chats[0]:
            prompt = self.tokenizer.chat_prompt(texts)
            held_by = [""] * len(texts)
        else:
            prompt = self.tokenizer.prompt(texts)
            held_by = texts
        new_texts = [self.tokenizer.new_text(text, stops) for text in held_by]
        given_tokens = prompt["input_ids"].shape[1]
        for name in ("input_ids", "attention_mask"):
            prompt[name] = prompt[name].to(self.device)
        if not _LENGTHS & generate_kwargs.keys():
            room = self.tokenizer.model_max_length - given_tokens
            generate_kwargs["max_new_tokens"] = min(_MAX_NEW_TOKENS, room)
        # Not by its class: transformers loads the tokenizer's copy of it apart from the pipeline's.
        if (expect := getattr(generate_kwargs.get("streamer"), "expect", None)) is not None:
            expect(held_by[0], stops)
        if stops:
            theirs = generate_kwargs.pop("stopping_criteria", None) or []
            ours = StopAtText(given_tokens, new_texts)
            prompt["stopping_criteria"] = StoppingCriteriaList([*theirs, ours])
        for name in _OF_THE_PROMPT & generate_kwargs.keys():
            prompt[name] = [*prompt[name], *(generate_kwargs.pop(name) or [])]
        if set_twice := sorted(prompt.keys() & generate_kwargs.keys()):
            raise ValueError(
                f"{', '.join(set_twice)} cannot be given, since a prompt of this model sets it"
            )
        ids = self.model.generate(**prompt, **generate_kwargs)
        ids = getattr(ids, "sequences", ids)  # with return_dict_in_generate
        rows_each = len(ids) // len(texts)
        new = ids[:, given_tokens:].tolist()
        written = [
            [new_text.read(row)[0] for row in new[number * rows_each : (number + 1) * rows_each]]
            for number, new_text in enumerate(new_texts)
        ]
        return {
            "given": given,
            "is_chat": is_chat,
            "written": written[0] if isinstance(given, str) else written,
        }

    def postprocess(
        self, outputs: dict[str, Any], return_full_text: bool = True
    ) -> list[dict[str, Any]]:
        given, written = outputs["given"], outputs["written"]
        if not return_full_text:
            return [{"generated_text": text} for text in written]
        if outputs["is_chat"]:
            form = self.tokenizer.chat_format
            return [{"generated_text": form.messages(Chat(given, text))} for text in written]
        joined = self.tokenizer.new_text("").joined
        return [{"generated_text": joined(text, given)} for text in written]
