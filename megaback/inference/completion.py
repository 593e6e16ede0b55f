"""Completion of texts by a model, here or on a server: the methods that both kinds have."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from data_pipeline.errors import DirectionMismatchError
from data_pipeline.text.codec import Direction, TextFormat
from megaback.inference.sampling import SamplingOptions


class Completer(ABC):
    """A model that continues texts: here a `Writer`, on a server a `RemoteWriter`."""

    def complete_backwards(
        self,
        ending: str,
        *,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int = 200,
        seed: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_ids: tuple[int, ...] = (),
        min_new_tokens: int = 0,
    ) -> str:
        """The ending with the text that the model writes before it.

        Raises ConfigError for an option out of range (see `SamplingOptions`), PromptError if the
        ending is longer than the model's context, and DirectionMismatchError for a model that
        writes forward.
        """
        writer = self._in(Direction.BACKWARD, "complete_backwards")
        options = SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_ids=stop_ids,
            min_new_tokens=min_new_tokens,
        )
        return writer.complete_many([ending], options)[0]

    def complete_forwards(
        self,
        beginning: str,
        *,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int = 200,
        seed: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_ids: tuple[int, ...] = (),
        min_new_tokens: int = 0,
    ) -> str:
        """The beginning with the text that a forward model writes after it.

        Raises the errors of `complete_backwards`, for a model of the other direction.
        """
        writer = self._in(Direction.FORWARD, "complete_forwards")
        options = SamplingOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop_ids=stop_ids,
            min_new_tokens=min_new_tokens,
        )
        return writer.complete_many([beginning], options)[0]

    @abstractmethod
    def complete_many(
        self, given: Sequence[str], options: SamplingOptions = SamplingOptions()
    ) -> list[str]:
        """Each text with its completion, generated at the same time.

        Text i has the seed `options.seed + i`, and is the same as alone. Raises PromptError for a
        text that is longer than the model's context.
        """

    @abstractmethod
    def stream(
        self, given: Sequence[str], options: SamplingOptions = SamplingOptions()
    ) -> Iterator[list[str]]:
        """`complete_many` as a stream: yields all texts, whole so far, after every part."""

    @abstractmethod
    def _in(self, direction: Direction, method: str) -> "Completer":
        """This model in a direction. Raises DirectionMismatchError if it lacks it."""


def require_both(text_format: TextFormat, method: str) -> None:
    """Raises DirectionMismatchError unless a model has the direction that it is not used in."""
    actual = text_format.direction.value
    if not text_format.both:
        needed = Direction.FORWARD if actual == Direction.BACKWARD else Direction.BACKWARD
        raise DirectionMismatchError(
            f"{method} needs a model that writes {needed.value}, but this one writes {actual}; "
            f"use complete_{actual}s"
        )
