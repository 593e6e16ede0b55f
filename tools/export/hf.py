"""Export for Hugging Face's transformers: stock weights, and a tokenizer that reverses.

The model is a stock Llama (Qwen3 with `qk_norm`); the code of the tokenizer is beside it.
Stock classes cannot load a tokenizer from the folder, since they would read forward. megaback reads
the same folder.
"""

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.common.atomic import replacing, write_text
from data_pipeline.text.codec import Direction, TextCodec
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from megaback.run_folder import HF_TOKENIZER_CONFIG_NAME, MODEL_CONFIG_NAME
from megaback.weights.hf_config import to_stock
from megaback.weights.model_folder import HF_TOKENIZER_NAMES, STOCK_SECTION, ModelDescription
from megaback.weights.source import WeightSource
from megaback.weights.weight_files import write_weights
from tools.export.card_metadata import card_metadata
from tools.export.model_card import REMOTE_CODE, model_card

_TOKENIZER_CLASS = "MegabackTokenizer"
_TOKENIZER_MODULE = "tokenization_megaback"
_NO_CHAT_TEXT = (
    "the chats of this model are ids, in which no text is a marker: load the tokenizer with "
    "trust_remote_code=True and call its apply_chat_template with tokenize=True (see README.md)"
)
"""Error of the stored chat template, for programs that would render text from it."""
_PIPELINE_TASKS = ("megaback-reverse", "text-generation")
_PIPELINE_CLASS = "MegabackTextGeneration"
_PIPELINE_MODULE = "generation_megaback"


def write_hf_folder(
    folder: Path,
    name: str,
    source: WeightSource,
    dtype: torch.dtype,
    max_file_bytes: int,
    license_id: str | None = None,
) -> None:
    """Write everything, config.json last; `name` and license are what the card says."""
    description = source.description
    text_format = description.text_format
    codec = TextCodec.of(source.tokenizer, text_format)
    write_weights(folder, source.specs(dtype), source.read, max_file_bytes)
    with replacing(folder / HF_TOKENIZER_NAMES[codec.file_name]) as file:
        file.write(source.tokenizer)
    _write_json(folder / "tokenizer.json", _refusal(codec))
    for code in REMOTE_CODE:
        of_bpe = code.with_name(f"bpe_{code.name}")
        is_other = codec.file_name != TOKENIZER_NAME and of_bpe.is_file()
        source_file = of_bpe if is_other else code
        write_text(folder / code.name, source_file.read_text(encoding="utf-8"))
    _write_json(folder / HF_TOKENIZER_CONFIG_NAME, _tokenizer_config(codec, description))
    _write_json(folder / "generation_config.json", _generation_config(codec, description))
    metadata = card_metadata(description, name, license_id)
    write_text(folder / "README.md", metadata + model_card(description, codec, name))
    _write_json(folder / MODEL_CONFIG_NAME, _config(codec, description, dtype))


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    write_text(path, json.dumps(fields, indent=2) + "\n")


def _refusal(codec: TextCodec) -> dict[str, Any]:
    """A tokenizer.json that no library loads, with the reason where its error names a version."""
    how = "reads backward" if codec.format.direction is Direction.BACKWARD else "needs its own code"
    return {
        "version": f"none: this tokenizer {how}; load it with trust_remote_code=True and, from a "
        "hub, the revision whose code you have read (see README.md)",
        "added_tokens": [],
        "model": {"type": "none"},
    }


def _config(codec: TextCodec, description: ModelDescription, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    stock = to_stock(description.shape, description.vocab_size, description.context_tokens, name)
    ids = {"bos_token_id": codec.begin_id, "eos_token_id": codec.end_id}
    pipeline = {"impl": f"{_PIPELINE_MODULE}.{_PIPELINE_CLASS}", "pt": ["AutoModelForCausalLM"]}
    return {
        **stock,
        **ids,
        "custom_pipelines": dict.fromkeys(_PIPELINE_TASKS, pipeline),
        STOCK_SECTION: description.to_fields(),
    }


def _tokenizer_config(codec: TextCodec, description: ModelDescription) -> dict[str, Any]:
    return {
        "tokenizer_class": _TOKENIZER_CLASS,
        "auto_map": {"AutoTokenizer": [f"{_TOKENIZER_MODULE}.{_TOKENIZER_CLASS}", None]},
        "direction": codec.format.direction.value,
        "unit": codec.format.unit.value,
        "bos_token": codec.piece(codec.begin_id),
        "eos_token": codec.piece(codec.end_id),
        "pad_token": codec.piece(_pad_id(codec)),
        "model_max_length": description.context_tokens,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ raise_exception(" + json.dumps(_NO_CHAT_TEXT) + ") }}",
    }


def _pad_id(codec: TextCodec) -> int:
    """An id that no text and no example contains, or the end marker if there is none.

    Collators exclude the pad token from the loss, and the end marker must be learned.
    """
    used = {codec.begin_id, *codec.chat_ids.values(), *codec.writable_ids(codec.end_id).tolist()}
    return next((i for i in range(codec.vocab_size) if i not in used), codec.end_id)


def _generation_config(codec: TextCodec, description: ModelDescription) -> dict[str, Any]:
    """Defaults of sampling, of ids that a text has.

    No `max_new_tokens`: it would override the `max_length` that lm_eval and others pass, and vLLM
    takes it as the limit of every request. No `max_length`: transformers warns of it at every call
    with `max_new_tokens`.
    """
    end_ids = [codec.end_id]
    if description.on_examples:
        end_ids.append(codec.chat_ids["<|im_end|>"])
    writable = {*end_ids, *codec.writable_ids(codec.end_id).tolist()}
    return {
        "bos_token_id": codec.begin_id,
        "eos_token_id": end_ids if len(end_ids) > 1 else codec.end_id,
        "pad_token_id": codec.end_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 200,
        "suppress_tokens": [i for i in range(codec.vocab_size) if i not in writable],
    }
