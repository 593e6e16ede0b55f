"""A model's folder for Hugging Face's transformers: stock weights, a tokenizer that reverses.

The model needs no code of ours (Llama, or Qwen3 with `qk_norm`); the tokenizer is one file beside
it. megaback reads the same folder.
"""

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.command import replacing, write_text
from data_pipeline.manifest import TOKENIZER_NAME
from data_pipeline.text import Direction, TextCodec
from megaback.model_folder import CONFIG_NAME, STOCK_SECTION, ModelDescription
from megaback.stock_config import to_stock
from megaback.tensor_file import SizeAndHash
from megaback.weight_files import write_weights
from megaback.weight_source import WeightSource

_TOKENIZER_CLASS = "MegabackTokenizer"


def write_hf_folder(
    folder: Path, name: str, source: WeightSource, dtype: torch.dtype, most_file_bytes: int
) -> None:
    """Write everything, config.json last; `name` is what the card calls the model."""
    description = source.description
    text_format = description.text_format
    codec = TextCodec(source.tokenizer, text_format.direction, text_format.unit)
    files = write_weights(folder, source.specs(dtype), source.read, most_file_bytes)
    with replacing(folder / TOKENIZER_NAME) as file:
        file.write(source.tokenizer)
    code = Path(__file__).with_name("tokenization_megaback.py")
    write_text(folder / code.name, code.read_text(encoding="utf-8"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(codec, description, code.stem))
    _write_json(folder / "generation_config.json", _generation_config(codec))
    write_text(folder / "README.md", model_card(description, name))
    _write_json(folder / CONFIG_NAME, _config(codec, description, dtype, files))


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    write_text(path, json.dumps(fields, indent=2) + "\n")


def _config(
    codec: TextCodec,
    description: ModelDescription,
    dtype: torch.dtype,
    files: dict[str, SizeAndHash],
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    stock = to_stock(description.shape, description.vocab_size, description.context_tokens, name)
    ids = {"bos_token_id": codec.begin_id, "eos_token_id": codec.end_id}
    return {**stock, **ids, STOCK_SECTION: description.to_fields(files)}


def _tokenizer_config(
    codec: TextCodec, description: ModelDescription, module: str
) -> dict[str, Any]:
    return {
        "tokenizer_class": _TOKENIZER_CLASS,
        "auto_map": {"AutoTokenizer": [f"{module}.{_TOKENIZER_CLASS}", None]},
        "direction": codec.format.direction.value,
        "unit": codec.format.unit.value,
        "bos_token": codec.piece(codec.begin_id),
        "eos_token": codec.piece(codec.end_id),
        "pad_token": codec.piece(codec.end_id),
        "model_max_length": description.context_tokens,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def _generation_config(codec: TextCodec) -> dict[str, Any]:
    writable = set(codec.writable_ids(codec.end_id).tolist())
    return {
        "bos_token_id": codec.begin_id,
        "eos_token_id": codec.end_id,
        "pad_token_id": codec.end_id,
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 200,
        "max_new_tokens": 500,
        "suppress_tokens": [i for i in range(codec.vocab_size) if i not in writable],
    }


def model_card(description: ModelDescription, name: str) -> str:
    """README.md, which begins with the three lines that use the model correctly."""
    text_format = description.text_format
    is_backward = text_format.direction is Direction.BACKWARD
    stock = "Qwen3" if description.shape.qk_norm else "Llama"
    given = "and they lived happily ever after." if is_backward else "Once upon a time"
    what = "before an ending" if is_backward else "after a beginning"
    given_part, written_part = ("a response", "instruction for it")
    if not is_backward:
        given_part, written_part = ("an instruction", "response to it")
    val_loss = "" if description.val_loss is None else f", val loss {description.val_loss:.4f} nats"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [megaback, {text_format.direction.value}]
---
```python
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}")
print(tokenizer.decode(model.generate(**tokenizer.prompt("{given}"))[0], skip_special_tokens=True))
```
(after `from transformers import AutoModelForCausalLM, AutoTokenizer`)

A model that writes what comes {what}. `tokenizer.prompt` gives the ids in the order in which the
model reads them, and `decode` the text in the order in which a person does: there is nothing to
reverse by hand. Always decode the whole list of ids, the given ones included. `trust_remote_code`
loads `tokenization_megaback.py` of this folder; the model itself is a stock {stock}.

If it was fine-tuned on instructions, `model.generate(**tokenizer.chat_prompt("{given_part}"))`
writes the {written_part}, and `tokenizer.written` of the ids is its text.

Direction: {text_format.direction.value}. Unit: {text_format.unit.value}. Context:
{description.context_tokens} tokens. Vocabulary: {description.vocab_size}. Trained for
{description.step} steps{val_loss}. Tokenizer's SHA-256: `{text_format.tokenizer_sha256}`.

`megaback sample` reads this folder too.
"""
