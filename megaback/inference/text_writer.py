"""A trained model for use from Python: text in and text out, in reading order.

writer = megaback.load("models/xcoax")
print(writer.complete_backwards("and they lived happily ever after."))
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from data_pipeline.errors import PromptError
from data_pipeline.text.codec import Direction, TextCodec, direction_of
from megaback.inference.completion import Completer, require_both
from megaback.inference.decoder import Decoder, load_decoder
from megaback.inference.generate import generate_many
from megaback.inference.placement import choose_device, choose_dtype
from megaback.inference.sampling import SamplingOptions
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import ModelDescription


def load(
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    usual_rows: int = 1,
    compiled: bool = False,
    cuda_graphs: bool = True,
    direction: Direction | str | None = None,
) -> "Writer":
    """The model in a folder that `megaback convert --to full` or `--to hf` wrote, or of a run or
    a checkpoint, which is converted beside it, once.

    `device`: `cpu`, `cuda`, `cuda:1`; by default the first GPU, if there is one. `dtype`:
    `float32`, `bfloat16`, or by default `auto`: `bfloat16` on a GPU that computes in it, `float32`
    elsewhere. `usual_rows`: number of texts per batch to optimize for. `compiled`: with
    torch.compile. `cuda_graphs`: on a CUDA device, capture the steps of generation and replay
    them. `direction`: of a model of both, the direction in which `complete_many` and `stream`
    write, `backward` (the default) or `forward`. Raises CheckpointMissingError,
    CheckpointCorruptError, BackendError, ConfigError, DirectionMismatchError.
    """
    reading = direction_of(direction)
    on = choose_device(device)
    weights = choose_dtype(dtype, on)
    path = model_folder(folder)
    made = load_decoder(
        path,
        on,
        weights,
        usual_rows=usual_rows,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        direction=reading,
    )
    return Writer(*made)


class Writer(Completer):
    """A model that continues texts, in its direction. `megaback.load` makes one.

    Its methods are those of `Completer`.
    """

    def __init__(self, decoder: Decoder, description: ModelDescription, codec: TextCodec) -> None:
        self.decoder = decoder
        self.description = description
        self.codec = codec

    @cached_property
    def _other(self) -> "Writer":
        """The same model in its other direction."""
        text_format = self.description.text_format
        (direction,) = set(Direction) - {text_format.direction}
        turned = replace(text_format, direction=direction)
        return Writer(
            self.decoder,
            replace(self.description, text_format=turned),
            TextCodec.of(self.codec.model_bytes, turned),
        )

    def complete_many(
        self, given: Sequence[str], options: SamplingOptions = SamplingOptions()
    ) -> list[str]:
        """Each text with its completion, generated in one batch."""
        texts = self._begin(given)
        for _ in self._write(texts, options):
            pass
        return [text.rendered for text in texts]

    def stream(
        self, given: Sequence[str], options: SamplingOptions = SamplingOptions()
    ) -> Iterator[list[str]]:
        """`complete_many` as a stream: yields all texts, complete so far, after every token."""
        texts = self._begin(given)
        for _ in self._write(texts, options):
            yield [text.rendered for text in texts]

    def _begin(self, given: Sequence[str]) -> "list[_Text]":
        if isinstance(given, str):  # each character would be a text
            raise PromptError("`given` is a str; give a list of texts")
        return [_Text(self.codec, text) for text in given]

    def _write(self, texts: "list[_Text]", options: SamplingOptions) -> Iterator[None]:
        prompts = [text.prompt for text in texts]
        for new_ids in generate_many(self.decoder, self.codec, prompts, options):
            for text, new_id in zip(texts, new_ids, strict=True):
                if new_id is not None:
                    text.ids.append(new_id)
            yield

    def _in(self, direction: Direction, method: str) -> "Writer":
        """This model in a direction. Raises DirectionMismatchError if it lacks it."""
        text_format = self.description.text_format
        if text_format.direction is direction:
            return self
        require_both(text_format, method)
        return self._other


class _Text:
    """A text that is being generated."""

    def __init__(self, codec: TextCodec, given: str) -> None:
        self._codec, self._given = codec, given
        self.prompt = codec.prompt(given)
        self.ids = list(self.prompt.ids)

    @property
    def rendered(self) -> str:
        """The text; the given text alone until there is a new id."""
        is_begun = len(self.ids) > len(self.prompt.ids)
        return self._codec.render(self.ids) if is_begun else self._given
