"""log P(answer | question) by a causal model of transformers, from local files.

The question is placed in a user message of the tokenizer's chat template or, without a template,
before a newline. Special tokens that a text spells are encoded as text. No code of the folder is
run, and no pickle is read.
"""

import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it

from data_pipeline.common.checked_json import briefly, read_json, require_within
from data_pipeline.common.number_ranges import LAYERS
from data_pipeline.common.regular_files import open_file
from data_pipeline.errors import BackendError, CheckpointCorruptError, PromptError
from megaback.inference.likelihood import Continuation, in_packs
from megaback.model.sending import sent
from megaback.run_folder import ADAPTER_NAME, MODEL_CONFIG_NAME
from megaback.scoring.bounded_work import bounded_work
from megaback.scoring.pairs import Pair
from megaback.scoring.scorer import Score
from megaback.weights.weight_files import StoredWeights
from megaback.weights.weight_names import HEAD_NAME

_READ_SUFFIXES = (".json", ".model", ".txt", ".jinja")
_MAX_FILE_BYTES = 64 << 20
_MAX_LAYERS = int(LAYERS.max)
_MAX_TABLE_NUMBERS = 1 << 28
"""Maximum values in masks and positions, which some models have beside their weights."""
_PLACEHOLDER = "QuestionGoesHere"
_BETWEEN = "\n"
_FEW_LAYERS = 100
_MAX_TEMPLATE_S = 2.0
_MAX_TEMPLATE_BYTES = 512 << 20
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


def _require_few_layers(folder: Path) -> None:
    """Raises CheckpointCorruptError for more layers than weights: building each takes time."""
    try:
        fields = read_json(folder / MODEL_CONFIG_NAME)
        layers = max(fields.get(name) or 0 for name in _LAYERS)
    except (OSError, ValueError, TypeError, AttributeError):
        return  # the library reports it
    num_tensors = sum(1 for _ in StoredWeights(folder).shapes()) if layers > _FEW_LAYERS else layers
    if layers > num_tensors:
        raise CheckpointCorruptError(
            f"the weights in {folder} do not match its config, which has {briefly(layers)} layers: "
            f"there are {num_tensors:,} tensors; save the model again, with save_pretrained"
        )


def _require_plausible(
    folder: Path, stored: StoredWeights, transformers: Any, how: dict[str, Any]
) -> None:
    """Require that a config is not far larger than its weights, before memory is allocated for it.

    Exact differences are reported after loading. Raises ValueError, and any error of the library.
    """
    if (folder / ADAPTER_NAME).exists():
        raise ValueError("it is an adapter, which names another folder; merge it in peft")
    for path in folder.iterdir():
        if path.suffix in _READ_SUFFIXES:
            os.close(open_file(path))
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"{path.name} has more than {_MAX_FILE_BYTES:,} bytes")
    found = [prod(shape) for _, shape in stored.shapes()]
    config = transformers.AutoConfig.from_pretrained(folder, **how)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if layers is not None:
        require_within("num_hidden_layers", layers, 1, min(len(found), _MAX_LAYERS))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    for what, tensors, maximum in (
        ("weights", model.parameters(), 2 * sum(found)),
        ("tables", model.buffers(), 2 * sum(found) + _MAX_TABLE_NUMBERS),
    ):
        wanted = sum(tensor.numel() for tensor in tensors)
        if wanted > maximum:
            raise ValueError(
                f"its config describes {what} of {wanted:,} values, but its files have "
                f"{sum(found):,}"
            )


def _require_all_read(folder: Path, model: Any, loading: dict[str, Any]) -> None:
    reported = {
        "is missing": loading["missing_keys"],
        "is not in the model": loading["unexpected_keys"],
        "has another shape": [entry[0] for entry in loading["mismatched_keys"]],
    }
    problems = [f"{name} {what}" for what, names in reported.items() for name in sorted(names)]
    stored, head = StoredWeights(folder), model.get_output_embeddings()
    # Some versions of the library use the embeddings instead, if the config ties them.
    is_stored = head is not None and HEAD_NAME in dict(stored.shapes())
    if is_stored and not torch.equal(stored.read(HEAD_NAME).to(head.weight.dtype), head.weight):
        problems.append(f"{HEAD_NAME} contradicts tie_word_embeddings of the config")
    if problems:
        raise CheckpointCorruptError(
            f"the weights in {folder} do not match its config: {problems[0]} ({len(problems)} "
            "differ); save the model again, with save_pretrained"
        )


class HfScorer:
    """Scores answers, including the end-of-text token if the tokenizer has one."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Raises BackendError without transformers, CheckpointCorruptError for an invalid model.

        The tensors of the folder must be exactly those of the model: the library would initialize
        missing ones, and ignore others.
        """
        try:
            import transformers
        except ImportError as error:
            raise BackendError(
                f"a Hugging Face model needs the library transformers ({error}); "
                "pip install 'megaback[transformers]'"
            ) from None
        transformers.utils.logging.disable_progress_bar()
        _require_few_layers(folder)
        how = {"local_files_only": True, "trust_remote_code": False}
        try:
            _require_plausible(folder, StoredWeights(folder), transformers, how)
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, **how)
            model: Any
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, dtype=dtype, output_loading_info=True, **how
            )
        except Exception as error:  # noqa: BLE001 - the library raises errors of any kind
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise CheckpointCorruptError(
                f"{folder} cannot be read as a causal model of transformers ({reason:.300}); save "
                "one there with save_pretrained, in safetensors, with its tokenizer"
            ) from None
        _require_all_read(folder, model, loading)
        self._model = model.to(device).eval()
        self._device = device
        try:
            with bounded_work(_MAX_TEMPLATE_S, _MAX_TEMPLATE_BYTES):
                self._before, self._after = self._frame()
        except Exception as error:  # noqa: BLE001 - a template is a program, with any error
            raise CheckpointCorruptError(
                f"the chat template in {folder} cannot be rendered ({type(error).__name__}: "
                f"{error}); correct it, or remove it"
            ) from None
        end = self._tokenizer.eos_token_id
        self._end = [] if end is None else [int(end)]
        self._max_tokens = getattr(model.config, "max_position_embeddings", None)

    def encode(self, pair: Pair) -> Continuation:
        """Ids of a pair. Raises PromptError if it does not fit the model's context."""
        given = [*self._before, *self._text(pair.question.strip()), *self._after]
        written = [*self._text(pair.answer.strip()), *self._end]
        if self._max_tokens is not None and len(given) + len(written) > self._max_tokens:
            raise PromptError(
                f"the two texts have {len(given) + len(written)} tokens, more than the forward "
                f"model's context of {self._max_tokens}; shorten them"
            )
        return Continuation(tuple(given), tuple(written))

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """log P(answer | question) of each."""
        continuations = [self.encode(pair) for pair in pairs]
        found = [0.0] * len(pairs)
        for numbers in in_packs(continuations):
            pack = [continuations[number] for number in numbers]
            for number, nats in zip(numbers, self._log_probabilities(pack), strict=True):
                found[number] = nats
        return [
            Score(nats, None, len(one.written), len(pair.answer.strip().encode()))
            for nats, one, pair in zip(found, continuations, pairs, strict=True)
        ]

    @torch.inference_mode()
    def _log_probabilities(self, pack: Sequence[Continuation]) -> list[float]:
        """Log-probabilities of a padded batch; causal models ignore padding at the end."""
        rows = [[*one.given, *one.written] for one in pack]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        output = self._model(sent(ids_BT, self._device), attention_mask=sent(mask_BT, self._device))
        sums = []
        for logits_TV, one in zip(output.logits, pack, strict=True):
            start = len(one.given) - 1
            targets_W = sent(torch.tensor(one.written), self._device)
            logits_WV = logits_TV[start : start + len(one.written)].float()
            nats_W = F.cross_entropy(logits_WV, targets_W, reduction="none").double()
            sums.append(-nats_W.sum())
        found: list[float] = torch.stack(sums).tolist()
        return found

    def _text(self, text: str) -> list[int]:
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _frame(self) -> tuple[list[int], list[int]]:
        """The ids before and after a question."""
        if self._tokenizer.chat_template is None:
            begin = self._tokenizer.bos_token_id
            return ([] if begin is None else [int(begin)]), self._text(_BETWEEN)
        messages = [{"role": "user", "content": _PLACEHOLDER}]
        rendered: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        before, found, after = rendered.partition(_PLACEHOLDER)
        if not found:
            raise ValueError("it does not include the user's message")
        return (
            self._tokenizer(before, add_special_tokens=False)["input_ids"],
            self._tokenizer(after, add_special_tokens=False)["input_ids"],
        )
