"""A model on a server, for use from Python: text in and text out, in reading order.

writer = megaback.remote("http://127.0.0.1:8000", "models/xcoax")
print(writer.complete_backwards("and they lived happily ever after."))
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.codec import Direction, TextCodec, Unit, direction_of
from data_pipeline.text.incremental import IncrementalDetokenizer
from megaback.client.connection import KEY_VARIABLE, TIMEOUT_S, Connection
from megaback.client.daemon_pool import DaemonPool
from megaback.client.samples import sampled_ids
from megaback.client.servers import ModelServer, connect
from megaback.inference.completion import Completer, require_both
from megaback.inference.sampling import SamplingOptions
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import read_description, tokenizer_of

_REQUESTS_AT_ONCE = 16


def remote(
    base_url: str,
    folder: str | Path,
    *,
    model: str | None = None,
    kind: str | None = None,
    direction: Direction | str | None = None,
    unit: Unit | str = Unit.TOKEN,
    key_variable: str = KEY_VARIABLE,
    timeout_s: float = TIMEOUT_S,
) -> "RemoteWriter":
    """A model that `megaback serve`, vLLM or llama.cpp's server has loaded.

    Ids are sent and received, and made text here: by the tokenizer in `folder`, which is a
    converted model, a run or a checkpoint, of which no weights are read; or a `tokenizer.model`,
    with the model's `direction` and `unit`. `model`: its name on the server. `kind`: `megaback`,
    `vllm` or `llama.cpp`; by default, what the server says. `direction`: as `megaback.load` takes
    it. `key_variable`: environment variable of the API key. `timeout_s`: maximum silence of the
    server. Raises ServeError if none answers, ConfigError, CheckpointMissingError, TokenizerError,
    TokenizerMismatchError, DirectionMismatchError.
    """
    codec = codec_of(folder, direction, unit)
    connection = Connection(base_url, key_variable, timeout_s)
    return RemoteWriter(connect(connection, codec, model, kind), codec)


def codec_of(folder: str | Path, direction: Direction | str | None, unit: Unit | str) -> TextCodec:
    """The codec of a model's folder, or of a tokenizer's file. Raises ConfigError."""
    reading = direction_of(direction)
    if not Path(folder).is_file():
        folder = model_folder(folder)
        return TextCodec.load_as(
            tokenizer_of(folder), read_description(folder, reading).text_format
        )
    if reading is None:
        raise ConfigError(f"{folder} is a tokenizer; give the model's `direction` too")
    units = [one.value for one in Unit]
    if unit not in units:
        raise ConfigError(f"`unit` is {unit!r}; use {' or '.join(units)}")
    return TextCodec.load(Path(folder), reading, Unit(unit))


class RemoteWriter(Completer):
    """A model on a server that continues texts. `megaback.remote` makes one.

    Its methods are those of `Completer`. A greedy text is that of a `Writer` of the same weights
    and precision; a sampled one on a `megaback serve` too, other servers draw other numbers.
    """

    def __init__(self, server: ModelServer, codec: TextCodec) -> None:
        self.server = server
        self.codec = codec

    def complete_many(
        self, given: Sequence[str], options: SamplingOptions = SamplingOptions()
    ) -> list[str]:
        """Each text with its completion, generated at the same time."""
        texts = list(given)
        for found in self.stream(given, options):
            texts = found
        return texts

    def stream(
        self, given: Sequence[str], options: SamplingOptions = SamplingOptions()
    ) -> Iterator[list[str]]:
        """`complete_many` as a stream: yields all texts, whole so far, after every part.

        No text has a part of a character, but for bytes at its edge that the model never completed.
        """
        if isinstance(given, str):  # each character would be a text
            raise PromptError("`given` is a str; give a list of texts")
        texts = [_Text(self.codec, text) for text in given]
        arrived: SimpleQueue[tuple[int, str | Exception | None]] = SimpleQueue()
        is_stopped = threading.Event()

        def write(number: int) -> None:
            if is_stopped.is_set():
                return
            text = texts[number]
            own = replace(options, seed=options.seed + number)
            try:
                with closing(sampled_ids(self.server, self.codec, text.prompt, own)) as parts:
                    for ids in parts:
                        if is_stopped.is_set():
                            return
                        arrived.put((number, text.add(ids)))
                arrived.put((number, text.finish()))
                arrived.put((number, None))
            except Exception as error:  # noqa: BLE001 - raised in the caller's thread
                arrived.put((number, error))

        shown = list(given)
        num_running = len(texts)
        threads = DaemonPool(min(_REQUESTS_AT_ONCE, len(texts)))
        try:
            for number in range(len(texts)):
                threads.submit(write, number)
            while num_running:
                number, found = arrived.get()
                if isinstance(found, Exception):
                    raise found
                if found is None:
                    num_running -= 1
                elif found != shown[number]:
                    shown[number] = found
                    yield list(shown)
        finally:
            is_stopped.set()
            threads.close()

    def _in(self, direction: Direction, method: str) -> "RemoteWriter":
        text_format = self.codec.format
        if text_format.direction is direction:
            return self
        require_both(text_format, method)
        codec = TextCodec.of(self.codec.model_bytes, replace(text_format, direction=direction))
        server = self.server
        if not server.serves_both:
            server = connect(server.connection, codec, kind=server.kind)
        return RemoteWriter(server, codec)


class _Text:
    """A text while its ids arrive."""

    def __init__(self, codec: TextCodec, given: str) -> None:
        self.prompt = codec.prompt(given)
        self._codec, self._shown = codec, given
        self._ids = list(self.prompt.ids)
        self._growing = IncrementalDetokenizer(codec, self.prompt.held_back)

    def add(self, ids: Sequence[int]) -> str:
        """The whole text with those new ids that complete characters."""
        self._ids += ids
        for new_id in ids:
            part = self._growing.add(new_id)
            pair = (part, self._shown) if self._growing.grows_leftwards else (self._shown, part)
            self._shown = "".join(pair)
        return self._shown

    def finish(self) -> str:
        """The whole text, after the last id."""
        is_begun = len(self._ids) > len(self.prompt.ids)
        return self._codec.render(self._ids) if is_begun else self._shown
