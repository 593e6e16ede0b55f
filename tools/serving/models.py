"""Served models by name."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from data_pipeline.errors import DirectionMismatchError, PromptError, TokenizerMismatchError
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction, Prompt, TextCodec
from megaback.inference.batch import ContinuousBatch
from megaback.inference.decoder import Decoder, load_decoder
from megaback.inference.infill.infiller import Infiller, Reader
from megaback.inference.placement import dtype_name
from megaback.weights.converted import shown_name
from megaback.weights.model_folder import ModelDescription, load_model_folder
from tools.serving import response_schemas


@dataclass(frozen=True)
class Given:
    """A prompt as given by a client, and as read by a model."""

    text: str
    prompt: Prompt
    num_tokens: int
    """Number of tokens read of it, without the begin marker that is added to a text."""
    ids: list[int] | None = None
    """All ids, if it was given as ids."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model with the continuous batch of its samples."""

    name: str
    folder: Path
    description: ModelDescription
    decoder: Decoder
    codec: TextCodec
    batch: ContinuousBatch
    loaded_s: int
    """Time at which it was loaded, in seconds since 1970."""

    @property
    def form(self) -> ChatFormat:
        return ChatFormat(self.codec)

    @property
    def writes_backward(self) -> bool:
        return self.codec.format.direction is Direction.BACKWARD

    def given(self, asked: "str | list[int]", *, is_cut: bool = False) -> Given:
        """Prompt from a text, or from ids in the model's order, which are used unchanged.

        Raises PromptError when they do not fit the context, or are not ids of this model.
        """
        if isinstance(asked, str):
            prompt = self.prompt(asked, is_cut=is_cut)
            num_markers = int(prompt.ids[:1] == [self.codec.begin_id])
            return Given(asked, prompt, len(prompt.ids) - num_markers + bool(prompt.held_back))
        if max(asked) >= self.codec.vocab_size:
            raise PromptError(
                f"token {max(asked)} does not exist: this model has {self.codec.vocab_size} ids; "
                "send ids of its own tokenizer, or text"
            )
        is_cut = is_cut and len(asked) > self.decoder.context_tokens
        ids = self.codec.newest(asked, self.decoder.context_tokens // 2) if is_cut else asked
        prompt = Prompt(ids, self.codec.writable_ids(self.codec.end_id), self.codec.end_id)
        self.batch.check(prompt)
        return Given(self.codec.render(asked), prompt, len(ids), asked)

    def prompt(self, given: str, *, is_cut: bool = False) -> Prompt:
        """Raises PromptError when a text does not fit the context.

        `is_cut`: only the half context next to the new text is read, as when a sample has filled
        the context.
        """
        if is_cut:
            maximum = self._max_characters
            given = given[:maximum] if self.writes_backward else given[-maximum:]
        self.require_bytes(given)
        prompt = self.codec.prompt(given)
        if is_cut and len(prompt.ids) > self.decoder.context_tokens:
            newest = self.codec.newest(prompt.ids, self.decoder.context_tokens // 2)
            prompt = replace(prompt, ids=newest)
        self.batch.check(prompt)
        return prompt

    def chat_prompt(self, given: str) -> Prompt:
        """Raises PromptError when a text leaves no room for the new text."""
        self.require_bytes(given)
        prompt = self.form.prompt(given)
        self.require_room(len(prompt.ids) + 1)
        return prompt

    def require_room(self, tokens: int) -> None:
        """Raises PromptError when there are more tokens than the context holds."""
        if tokens > self.decoder.context_tokens:
            raise PromptError(
                f"the text has {tokens} tokens, and the model's context holds "
                f"{self.decoder.context_tokens}; shorten it"
            )

    def require_bytes(self, given: str) -> None:
        """Refuse texts that cannot fit, before encoding them."""
        if len(given) > self._max_characters:
            raise PromptError(
                f"the text given has {len(given)} characters, and the model's context of "
                f"{self.decoder.context_tokens} tokens holds {self._max_characters} at most; "
                "shorten it"
            )

    @cached_property
    def _max_characters(self) -> int:
        """Maximum characters in the context: a piece has no more characters than bytes."""
        return self.decoder.context_tokens * int(self.codec.piece_num_bytes().max())

    def describe(self, *, can_infill: bool) -> response_schemas.Model:
        description = self.description
        return response_schemas.Model(
            id=self.name,
            created=self.loaded_s,
            direction=self.codec.format.direction.value,
            unit=self.codec.format.unit.value,
            tokenizer_sha256=self.codec.format.tokenizer_sha256,
            context_tokens=description.context_tokens,
            parameters=self.decoder.num_parameters,
            dtype=dtype_name(self.decoder.dtype),
            can_infill=can_infill,
        )


def load_models(
    folder: Path,
    forward: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    num_slots: int,
    cuda_graphs: bool = True,
) -> dict[str, ServedModel]:
    """The model of a folder and, if given, a forward one, named after their folders.

    One of both directions is served as two, with the same weights. Raises DirectionMismatchError
    when the second one does not write forward, and the errors of loading a model.
    """

    def load(path: Path) -> tuple[Decoder, ModelDescription, TextCodec]:
        return load_decoder(path, device, dtype, usual_rows=num_slots, cuda_graphs=cuda_graphs)

    def serve(
        path: Path, decoder: Decoder, description: ModelDescription, codec: TextCodec
    ) -> None:
        name = shown_name(path)
        if name in models:
            name = f"{name}-forward"
        batch = ContinuousBatch(decoder, codec, num_slots)
        batch.prepare()
        models[name] = ServedModel(
            name=name,
            folder=path,
            description=description,
            decoder=decoder,
            codec=codec,
            batch=batch,
            loaded_s=int(time.time()),
        )

    models: dict[str, ServedModel] = {}
    decoder, description, codec = load(folder)
    serve(folder, decoder, description, codec)
    if forward is not None and forward != folder:
        folder = forward
        decoder, description, codec = load(folder)
    if description.text_format.both:
        codec = TextCodec.of(codec.model_bytes, replace(codec.format, direction=Direction.FORWARD))
    elif forward is None:
        return models
    if codec.format.direction is Direction.BACKWARD:
        raise DirectionMismatchError(
            f"--forward needs a model that writes forward, and {folder} writes backward; "
            "name another folder"
        )
    serve(folder, decoder, replace(description, text_format=codec.format), codec)
    return models


def load_meeting(models: Mapping[str, ServedModel]) -> Infiller | None:
    """The backward and the forward model as infilling needs them; None if they are not compatible.

    Weights are loaded once more only where serving packs them.
    """
    if len(models) < 2:
        return None
    try:
        backward, forward = models.values()
        first = _reader(backward)
        if forward.decoder is backward.decoder:  # a model of both directions
            return Infiller(replace(first, codec=forward.codec), first)
        return Infiller(_reader(forward), first)
    except (DirectionMismatchError, TokenizerMismatchError):
        return None


def _reader(served: ServedModel) -> Reader:
    decoder, model = served.decoder, served.decoder.model
    if model is None:
        model, *_ = load_model_folder(served.folder, decoder.device, decoder.dtype)
        decoder = Decoder(model, decoder.context_tokens, takes_over=False, cuda_graphs=False)
    return Reader(model, decoder, served.codec)
