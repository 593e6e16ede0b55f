"""Generation as evaluation harnesses ask for it: a context, stop texts and sampling arguments."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.text.codec import Direction, Prompt, TextCodec
from megaback.inference.batch import ContinuousBatch, ReadingError, Sample
from megaback.inference.decoder import Decoder
from megaback.inference.sampling import SamplingOptions

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = {"temperature": float, "top_p": float, "top_k": int, "min_p": float}
_USUAL_TOKENS = 256  # lm_eval's


@dataclass(frozen=True)
class Generation:
    """Settings of the generation of one request."""

    options: SamplingOptions
    stops: tuple[str, ...]
    """Texts at the first of which, in the order of writing, the new text is cut."""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> "Generation":
        """Read lm_eval's `gen_kwargs`; without `do_sample` or a temperature, decoding is greedy.

        Raises ConfigError for an argument that does not exist here, and for a value out of range.
        """
        fields = {name: value for name, value in given.items() if value is not None}
        stops = fields.pop("until", [])
        lengths = [fields.pop(name) for name in _LENGTHS if name in fields]
        is_sampled = fields.pop("do_sample", float(fields.get("temperature", 0)) > 0)
        penalty = float(fields.pop("repetition_penalty", 1.0))
        seed = int(fields.pop("seed", 0))
        try:
            sampling = {
                name: kind(fields.pop(name)) for name, kind in _SAMPLING.items() if name in fields
            }
            tokens = int(lengths[0]) if lengths else _USUAL_TOKENS
        except (TypeError, ValueError) as error:
            raise ConfigError(f"`gen_kwargs` has a value that is not a number: {error}") from None
        if fields:
            raise ConfigError(
                f"`gen_kwargs` has {', '.join(map(repr, fields))}, which megaback does not have; "
                f"use until, do_sample, seed, repetition_penalty, {', '.join(_SAMPLING)} or "
                f"{_LENGTHS[0]}"
            )
        temperature = sampling.pop("temperature", 1.0) if is_sampled else 0.0
        options = SamplingOptions(
            max_new_tokens=tokens,
            temperature=temperature,
            top_k=sampling.pop("top_k", 0),
            seed=seed,
            repetition_penalty=penalty,
            **sampling,
        )
        texts = [stops] if isinstance(stops, str) else list(stops)
        return cls(options, tuple(text for text in texts if text))

    def cut(self, text: str, direction: Direction) -> tuple[str, bool]:
        """The text up to its first stop text in the order of writing, and whether it has one."""
        is_cut = False
        for stop in self.stops:
            if direction is Direction.FORWARD:
                text, found, _ = text.partition(stop)
            else:
                _, found, text = text.rpartition(stop)
            is_cut = is_cut or bool(found)
        return text, is_cut


def prompt_of(codec: TextCodec, context: str, room_tokens: int) -> Prompt:
    """Ids of a context, at most `room_tokens`: those next to the new text. None is held back."""
    ids = codec.newest([codec.begin_id, *codec.encode(context).tolist()], room_tokens)
    return Prompt(ids, codec.writable_ids(codec.end_id), codec.end_id)


class Generator:
    """Generates the texts of requests together, each independent of the others."""

    def __init__(self, decoder: Decoder, codec: TextCodec, max_samples: int = 64) -> None:
        self._decoder, self._codec, self._max_samples = decoder, codec, max_samples

    def texts(self, requests: Sequence[tuple[str, Generation]]) -> Iterator[tuple[int, str]]:
        """The number and the new text of each request, in the order in which they end.

        Raises ConfigError for a length that leaves no room for a context.
        """
        waiting = sorted(range(len(requests)), key=lambda number: len(requests[number][0]))
        batch = ContinuousBatch(self._decoder, self._codec, min(self._max_samples, len(waiting)))
        running: dict[Sample, int] = {}
        while waiting or running:
            while waiting and len(batch) < batch.num_slots:
                number = waiting.pop()
                sample = self._sample(*requests[number])
                batch.add(sample)
                running[sample] = number
            try:
                batch.read(float("inf"))
            except ReadingError as error:
                raise error.__cause__ or error from None
            for step in batch.step():
                sample, number = step.sample, running[step.sample]
                new_ids = sample.ids[-sample.num_new :] if sample.num_new else []
                text, is_cut = requests[number][1].cut(
                    self._codec.render(new_ids), self._codec.format.direction
                )
                if is_cut or step.is_last:
                    batch.remove(sample)
                    del running[sample]
                    yield number, text

    def _sample(self, context: str, generation: Generation) -> Sample:
        room = self._decoder.context_tokens - generation.options.max_new_tokens
        if room < 1:
            raise ConfigError(
                f"the task generates up to {generation.options.max_new_tokens} tokens, and the "
                f"model's context has {self._decoder.context_tokens}, which leaves none for the "
                "text that is given; pass fewer with --gen_kwargs max_gen_toks=N"
            )
        options = replace(generation.options)
        return Sample(prompt_of(self._codec, context, room), options)
