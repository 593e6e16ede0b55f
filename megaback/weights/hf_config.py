"""Conversion between a model's shape and transformers' config.json for Llama and Qwen3.

Fields: https://huggingface.co/docs/transformers, LlamaConfig and Qwen3Config. Settings that a shape
cannot express are errors, never dropped.
"""

from typing import Any

from pydantic import ValidationError

from data_pipeline.common.checked_json import briefly, checked
from data_pipeline.errors import RunMismatchError
from megaback.config import ModelSection
from megaback.config_messages import sentence

_MODEL_TYPES = {False: "llama", True: "qwen3"}
"""Model types by whether they have qk_norm."""
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DEFAULT_EPSILON = 1e-6
_DEFAULT_THETA = 10_000.0
_QWEN3_HEAD_DIM = 128
_UNSCALED = {"rope_type": "default"}
_SCALED_TYPE = "llama3"
_FULL_ATTENTION = "full_attention"
_SCALING = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_frequency_factor",
    "high_freq_factor": "rope_high_frequency_factor",
    "original_max_position_embeddings": "rope_original_context_tokens",
}
"""Fields of scaled rotary positions, and their names in a shape."""
# Settings that affect the forward pass and are not in a shape, with the only supported values.
_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def to_stock(
    shape: ModelSection, vocab_size: int, context_tokens: int, dtype: str
) -> dict[str, Any]:
    """Fields of config.json for transformers."""
    model_type = _MODEL_TYPES[shape.qk_norm]
    scaling: dict[str, Any] | None = None
    if shape.rope_scaling_factor != 1:
        scaling = {"rope_type": _SCALED_TYPE}
        scaling |= {theirs: getattr(shape, ours) for theirs, ours in _SCALING.items()}
    return {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden_mlp_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": context_tokens,
        "rms_norm_eps": shape.norm_epsilon,
        # transformers 4 reads the first two, transformers 5 the third.
        "rope_theta": shape.rope_theta,
        **({} if scaling is None else {"rope_scaling": scaling}),
        "rope_parameters": {"rope_theta": shape.rope_theta, **(scaling or _UNSCALED)},
        "tie_word_embeddings": shape.tie_embeddings,
        "attention_bias": False,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
    }


def is_stock(fields: dict[str, Any]) -> bool:
    """Whether a config.json is for transformers."""
    return "model_type" in fields


def from_stock(fields: dict[str, Any], where: str) -> ModelSection:
    """Model shape of a config.json; `where` is its name for messages.

    Raises RunMismatchError for settings that a shape cannot express.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        raise RunMismatchError(
            f"{where} has model_type {briefly(model_type)}; only {' and '.join(_ARCHITECTURES)} "
            "are supported"
        )
    if "AutoModelForCausalLM" in str(fields.get("auto_map", "")):
        raise RunMismatchError(
            f"{where} has custom model code (auto_map), which may differ from {model_type}; only "
            "models with transformers' own code are supported"
        )
    for name, meant in _FIXED.items():
        value = fields.get(name, meant)
        if value != meant:
            raise RunMismatchError(
                f"{where} has {name} = {briefly(value)}; only {meant!r} is supported"
            )
    if others := {str(kind) for kind in fields.get("layer_types") or ()} - {_FULL_ATTENTION}:
        raise RunMismatchError(
            f"{where} has layer_types with {briefly(min(others))}; only {_FULL_ATTENTION!r} is "
            "supported"
        )
    try:
        width = checked("hidden_size", fields["hidden_size"], int)
        num_heads = checked("num_attention_heads", fields["num_attention_heads"], int)
        default_head_dim = _QWEN3_HEAD_DIM if model_type == "qwen3" else width // num_heads
        head_dim = checked("head_dim", fields.get("head_dim"), int | None) or default_head_dim
        return ModelSection(
            num_layers=fields["num_hidden_layers"],
            width=width,
            num_heads=num_heads,
            num_kv_heads=fields.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            mlp_width=fields["intermediate_size"],
            qk_norm=model_type == "qwen3",
            tie_embeddings=fields.get("tie_word_embeddings", False),
            **_rotary(fields, where),
            norm_epsilon=fields.get("rms_norm_eps", _DEFAULT_EPSILON),
        )
    except ValidationError as error:
        raise _unsupported(where, sentence(error, ModelSection)) from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unsupported(where, " ".join(str(error).split())) from None


def _unsupported(where: str, reason: str) -> RunMismatchError:
    return RunMismatchError(f"{where} does not describe a supported model: {reason}")


def _rotary(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """Fields of a shape for rotary positions."""
    # Of both, transformers uses the older name's.
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"its rotary positions are {briefly(rope)}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", _SCALED_TYPE):
        raise RunMismatchError(
            f"{where} has rope_type = {briefly(kind)}; only 'default' and {_SCALED_TYPE!r} are "
            "supported"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise RunMismatchError(
            f"{where} has partial_rotary_factor = {briefly(rope['partial_rotary_factor'])}; only "
            "1.0 is supported"
        )
    theta = rope.get("rope_theta", fields.get("rope_theta", _DEFAULT_THETA))
    if kind == "default":
        return {"rope_theta": theta}
    return {"rope_theta": theta, **{ours: rope[theirs] for theirs, ours in _SCALING.items()}}
