"""GGUF export, for llama.cpp and programs built on it.

Names and layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's Llama
rotates adjacent pairs, so the two halves of a head are interleaved here; its Qwen3 rotates halves.
llama.cpp has no notion of direction: its callers reverse ids, or text by words, as the metadata,
chat template and card explain (gguf_chat.py, gguf_card.py).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.common.atomic import write_text
from data_pipeline.errors import BackendError, RunMismatchError, StorageError
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.safetensors_file import size_and_hash
from megaback.config import ModelSection
from megaback.model.rotary import frequency_divisors
from megaback.run_folder import GGUF_NAME
from megaback.weights.source import WeightSource
from megaback.weights.weight_files import write_sums
from megaback.weights.weight_names import HEAD_NAME
from tools.export.card_metadata import data_of, hub_base, tags_of, task_of
from tools.export.gguf_card import gguf_card, gguf_description
from tools.export.gguf_chat import chat_template
from tools.export.gguf_types import FLOATS, GgufType, quantizer
from tools.export.gguf_vocabulary import add_vocabulary

_FREQUENCIES = "rope_freqs.weight"
"""llama.cpp's name for the divisors of scaled rotary frequencies."""
_OUTER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD_NAME: "output.weight",
    _FREQUENCIES: _FREQUENCIES,
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf_folder(
    folder: Path,
    name: str,
    source: WeightSource,
    type_name: str,
    license_id: str | None = None,
) -> list[str]:
    """Write the file, one tensor at a time, its SHA-256, and its card.

    `type_name`: one of `gguf_types.TYPES`. `name` and license are what file and card say. Returns
    the types of matrices whose rows the type does not divide, with their names. Raises BackendError
    without the package `gguf`, or `xllamacpp` for a k-quant.
    """
    try:
        import gguf
    except ImportError:
        raise BackendError(
            "--to gguf needs the package gguf; install it with `pip install 'megaback[gguf]'`"
        ) from None
    shape = source.description.shape
    if shape.qk_norm and shape.rope_scaling_factor != 1:
        raise RunMismatchError(
            f"the model of {name} is a Qwen3 with rope_scaling_factor "
            f"{shape.rope_scaling_factor:g}, which llama.cpp has for Llama only; export it with "
            "--to hf"
        )
    types = gguf.GGMLQuantizationType
    of_file = GgufType(type_name, shape)
    path = folder / GGUF_NAME
    shapes, read = _with_frequencies(source)
    type_of = {one: of_file.of(gguf_name_of(one), shapes[one]) for one in shapes}
    quantizers = {one: quantizer(one) for one in sorted({*type_of.values()})}
    writer: Any = gguf.GGUFWriter(path, "qwen3" if shape.qk_norm else "llama")
    try:
        _add_general(writer, name, source, license_id)
        _add_metadata(writer, source, of_file)
        for tensor_name, tensor_shape in shapes.items():
            raw_type = types[type_of[tensor_name]]
            num_bytes = int(np.prod(gguf.quant_shape_to_byte_shape(tensor_shape, raw_type)))
            writer.add_tensor_info(
                gguf_name_of(tensor_name), tensor_shape, np.dtype("f4"), num_bytes, raw_type
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor_name in shapes:
            weight = as_llama_cpp_has_it(tensor_name, read(tensor_name), shape)
            writer.write_tensor_data(quantizers[type_of[tensor_name]](weight))
    except OSError as error:
        if error.errno is None:  # numpy reports a short write without its cause
            raise StorageError(
                f"cannot write all of {name}'s {GGUF_NAME}; "
                "free some space and run the same command again"
            ) from None
        raise
    finally:
        writer.close()
    _, digest = size_and_hash(path)
    write_sums(folder, {GGUF_NAME: digest})
    text_format = source.description.text_format
    codec = TextCodec.of(source.tokenizer, text_format)
    write_text(
        folder / "README.md", gguf_card(source.description, codec, name, type_name, license_id)
    )
    named = {one: gguf_name_of(one) for one in shapes}
    odd = [one for one in shapes if of_file.is_fallback(named[one], shapes[one])]
    return [f"{type_of[one].lower()} {named[one]}" for one in odd]


def _with_frequencies(
    source: WeightSource,
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes and reader of all tensors, with the divisors of scaled rotary frequencies."""
    shape = source.description.shape
    if shape.rope_scaling_factor == 1:
        return source.shapes, source.read
    divisors_R = frequency_divisors(shape, torch.device("cpu"))

    def read(name: str) -> Tensor:
        return divisors_R if name == _FREQUENCIES else source.read(name)

    return {_FREQUENCIES: tuple(divisors_R.shape), **source.shapes}, read


def gguf_name_of(name: str) -> str:
    """llama.cpp's name of a tensor."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    number, inner = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{_LAYER_NAMES[inner.removesuffix('.weight')]}.weight"


def as_llama_cpp_has_it(name: str, weight: Tensor, shape: ModelSection) -> Tensor:
    """The weight with rows of queries and keys in the order of llama.cpp's rotary embedding."""
    if shape.qk_norm or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    halves = weight.view(-1, 2, shape.head_size // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add_general(writer: Any, name: str, source: WeightSource, license_id: str | None) -> None:
    """Facts of the card, under the format's names."""
    import gguf

    description = source.description
    writer.add_name(name)
    writer.add_type(gguf.GGUFType.MODEL)
    sizes = [int(np.prod(one)) for one in source.shapes.values()]
    writer.add_size_label(gguf.size_label(sum(sizes), 0, 0, 0))
    if license_id is not None:
        writer.add_license(license_id)
    if (base := hub_base(description)) is not None:
        organization, base_name = base.split("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base_name)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    if description.training is not None:
        data, fingerprint = data_of(description.training)
        writer.add_dataset_count(1)
        writer.add_dataset_name(0, data)
        if fingerprint is not None:
            writer.add_dataset_version(0, fingerprint)
    task = task_of(description)
    writer.add_tags([*([] if task is None else [task]), *tags_of(description)])
    writer.add_description(gguf_description(description.text_format))


def _add_metadata(writer: Any, source: WeightSource, of_file: GgufType) -> None:
    import gguf

    description = source.description
    shape, text_format = description.shape, description.text_format
    in_use = replace(text_format, both=False)  # a file has the markers of one direction
    for key, value in in_use.to_dict().items():
        writer.add_string(f"megaback.{key}", value)
    writer.add_context_length(description.context_tokens)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.hidden_mlp_width)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_vocab_size(description.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[of_file.file_type])
    if of_file.name not in FLOATS:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    codec = TextCodec.of(source.tokenizer, text_format)
    add_vocabulary(writer, codec)
    writer.add_chat_template(chat_template(codec))
    writer.add_bos_token_id(codec.begin_id)
    writer.add_eos_token_id(codec.end_id)
    writer.add_eot_token_id(codec.chat_ids["<|im_end|>"])
    writer.add_add_bos_token(not description.on_examples)  # whose chats begin without one
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
