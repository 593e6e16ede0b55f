"""Generation by a model that writes backward: rules of its prompts, and its pipeline."""

from typing import Any

import torch
from transformers import LogitsProcessor, Pipeline


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


class MegabackTextGeneration(Pipeline):  # type: ignore[misc]
    """`pipeline("text-generation", model=FOLDER, trust_remote_code=True)`, in reading order.

    Options other than `return_full_text` are passed to `generate`.
    """

    def _sanitize_parameters(
        self, return_full_text: bool = True, **generate_kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, generate_kwargs, {"return_full_text": return_full_text}

    def preprocess(self, text: str) -> dict[str, Any]:
        return {"given": text}

    def _forward(self, inputs: dict[str, Any], **generate_kwargs: Any) -> dict[str, Any]:
        prompt = self.tokenizer.prompt(inputs["given"])
        tensors = {
            name: prompt.pop(name).to(self.device) for name in ("input_ids", "attention_mask")
        }
        return {**inputs, "ids": self.model.generate(**tensors, **prompt, **generate_kwargs)}

    def postprocess(
        self, outputs: dict[str, Any], return_full_text: bool = True
    ) -> list[dict[str, str]]:
        given, texts = outputs["given"], []
        for ids in outputs["ids"]:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if not return_full_text:
                is_backward = self.tokenizer.direction == "backward"
                text = text.removesuffix(given) if is_backward else text.removeprefix(given)
            texts.append({"generated_text": text})
        return texts
