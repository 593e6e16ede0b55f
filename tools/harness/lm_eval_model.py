"""The model `megaback` of lm_eval: likelihoods and texts of a model of either direction.

lm_eval finds it through the entry point group `lm_eval.models`, or, in versions that have none,
through `megaback lm-eval`. docs/evaluation.md says what its numbers mean.
"""

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from data_pipeline.errors import ConfigError, DirectionMismatchError
from data_pipeline.text.codec import TextCodec, direction_of
from megaback.client.connection import Connection
from megaback.client.likelihoods import RemotePool
from megaback.client.servers import ModelServer, connect
from megaback.inference.decoder import Decoder
from megaback.inference.device_pool import DevicePool, choose_devices
from megaback.inference.likelihood import Continuation
from megaback.inference.placement import choose_dtype, dtype_name
from megaback.scoring.choices import (
    AT_ONCE,
    Choice,
    ChoiceEncoder,
    LikelihoodsOf,
    Scoring,
    pool_likelihoods,
    require_scoring,
    score_choices,
)
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import load_model_folder, read_description, tokenizer_of
from tools.harness.generation import Generation, Generator
from tools.harness.server import served_texts

_BEFORE = "before"
_ALL = "all"
_USUAL_DEVICE = "cuda:0"
_log = logging.getLogger("megaback")


class MegabackLM(LM):  # type: ignore[misc]
    """A megaback model for lm_eval: `--model megaback --model_args pretrained=DIR`."""

    def __init__(
        self,
        pretrained: str | Path,
        scoring: str | None = None,
        generates: str | None = None,
        base_url: str | None = None,
        model: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        direction: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """`pretrained`: the folder of a converted model, a run or a checkpoint. `scoring`: what a
        backward model's loglikelihood is (`Scoring`); by default `question`. `generates=before`:
        let a backward model answer generation tasks with the text before the context. `base_url`:
        compute on a `megaback serve` that has the model, by its name `model`. `device` and `dtype`:
        as `megaback.load_scorer` takes them; in `--model_args`, `device=all` is its default.
        `direction`: of a model of both, `backward` (the default) or `forward`.
        Batches are made by length, so `batch_size` and `max_batch_size` have no effect.

        Raises ConfigError, ServeError, and the errors of `megaback.load_scorer`.
        """
        super().__init__()
        del batch_size, max_batch_size
        self._folder = model_folder(Path(pretrained))
        self._description = read_description(self._folder, direction_of(direction))
        form = self._description.text_format
        self._codec = TextCodec.load_as(tokenizer_of(self._folder), form)
        self.scoring = require_scoring(scoring, form.direction)
        if generates not in (None, _BEFORE):
            raise ConfigError(f"`generates` is {generates!r}; use {_BEFORE}, or omit it")
        self._generates = generates
        self._server: ModelServer | None = None
        self._device_names, self._dtype_name = device, dtype
        context_tokens = self._description.context_tokens
        if base_url is not None:
            self._server = connect(Connection(base_url), self._codec, model)
            context_tokens = self._server.context_tokens - 1  # it counts the last id, too
        elif model is not None:
            raise ConfigError("`model` names a model of a server; add `base_url`")
        self._encoder = ChoiceEncoder(self._codec, context_tokens)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "MegabackLM":
        """A model from `--model_args`, whose `device` precedes lm_eval's own option.

        That is cuda:0 unless it is given, also on machines without one; there it is ignored.
        """
        others = {key: value for key, value in (additional_config or {}).items() if value}
        if others.get("device") == _USUAL_DEVICE and not torch.cuda.is_available():
            del others["device"]
        found = {**others, **arg_dict}
        if found.get("device") == _ALL:
            del found["device"]
        return cls(**found)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "MegabackLM":
        """`create_from_arg_obj`, from `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(
        self, requests: "Sequence[Any]", disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(score, is_greedy) of each (context, continuation); docs/evaluation.md defines both.

        Raises PromptError for a continuation that does not fit the context.
        """
        choices = [Choice(*request.args) for request in requests]
        encoded = self._encoder.encode_all(choices)
        num_cut = sum(one.num_cut > 0 for one in encoded)
        if num_cut:
            what = "scored" if self._encoder.is_backward else "read"
            _log.warning(
                "%d of %d requests do not fit the context of %d tokens: the beginning of their "
                "context is not %s",
                num_cut,
                len(encoded),
                self._encoder.context_tokens,
                what,
            )
        found: list[tuple[float, bool]] = []
        for start in self._progress(len(encoded), "loglikelihood", disable_tqdm):
            scores = score_choices(
                encoded[start : start + AT_ONCE],
                self._likelihoods_of,
                with_given=self.scoring.needs_answer,
                with_prior=self.scoring is Scoring.RATIO,
            )
            found += [(one.value(self.scoring), one.is_greedy) for one in scores]
        self._keep("loglikelihood", requests, found)
        return found

    def loglikelihood_rolling(
        self, requests: "Sequence[Any]", disable_tqdm: bool = False
    ) -> list[float]:
        """log P of each whole text, in windows of the context's length, without its end marker."""
        windows: list[tuple[int, Continuation]] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            windows += [(number, window) for window in self._encoder.document_windows(text)]
        sums = [0.0] * len(requests)
        for start in self._progress(len(windows), "loglikelihood_rolling", disable_tqdm):
            some = windows[start : start + AT_ONCE]
            found = self._likelihoods_of([window for _, window in some])
            for (number, _), one in zip(some, found, strict=True):
                sums[number] += one.log_probability
        self._keep("loglikelihood_rolling", requests, sums)
        return sums

    def generate_until(self, requests: "Sequence[Any]", disable_tqdm: bool = False) -> list[str]:
        """The text after each context; of a backward model, with `generates=before`, that before.

        It is cut at the first stop text in the order of writing. Raises DirectionMismatchError for
        a backward model without `generates=before`, and ConfigError for an unknown argument.
        """
        if self._encoder.is_backward and self._generates != _BEFORE:
            raise DirectionMismatchError(
                "this task asks for the text after its context, which a backward model does not "
                "write; use a forward model or, for a task whose contexts are endings, add "
                f"generates={_BEFORE} to the model's arguments"
            )
        asked = [(request.args[0], Generation.parse(request.args[1])) for request in requests]
        if not asked:
            return []
        if self._server is None:
            texts_of = self._generator.texts(asked)
        else:
            texts_of = served_texts(self._server, self._codec, asked)
        progress = tqdm(texts_of, total=len(asked), disable=disable_tqdm)
        found = dict(progress)
        texts = [found[number] for number in range(len(asked))]
        self._keep("generate_until", requests, texts)
        return texts

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """Raises ConfigError: chat templates are of forward conversations."""
        raise ConfigError(
            "megaback models have no chat template for lm_eval; omit --apply_chat_template"
        )

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's hash, by which lm_eval's caches of requests are named."""
        return self._codec.format.tokenizer_sha256

    def get_model_info(self) -> dict[str, Any]:
        """Facts that lm_eval writes about the model beside its results."""
        form = self._codec.format
        return {
            "model_folder": str(self._folder),
            "direction": form.direction.value,
            "unit": form.unit.value,
            "scoring": self.scoring.value if self._encoder.is_backward else None,
            "model_dtype": self.dtype,
        }

    @property
    def dtype(self) -> str:
        """Data type of the weights, here or on the server."""
        return self._server.dtype if self._server is not None else dtype_name(self._dtype)

    def _progress(self, total: int, what: str, is_silent: bool) -> "tqdm[int]":
        return tqdm(range(0, total, AT_ONCE), desc=f"{what} by {AT_ONCE}", disable=is_silent)

    def _keep(self, name: str, requests: "Sequence[Any]", results: "Sequence[Any]") -> None:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(name, request.args, result)

    @cached_property
    def _devices(self) -> list[Any]:
        return choose_devices(self._device_names)

    @cached_property
    def _dtype(self) -> Any:
        return choose_dtype(self._dtype_name, self._devices[0])

    @cached_property
    def _model(self) -> Any:
        return load_model_folder(self._folder, self._devices[0], self._dtype)[0]

    @cached_property
    def _likelihoods_of(self) -> LikelihoodsOf:
        if self._server is not None:
            return RemotePool(self._server).likelihoods
        model = self._model if len(self._devices) == 1 else None
        return pool_likelihoods(DevicePool(self._folder, self._devices, self._dtype, model))

    @cached_property
    def _generator(self) -> Generator:
        decoder = Decoder(self._model, self._description.context_tokens, takes_over=False)
        return Generator(decoder, self._codec)
