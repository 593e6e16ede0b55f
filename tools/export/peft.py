"""Export for PEFT: the adapter of a run with LoRA, beside an export of its base.

The base is compared with the run's own copy, so that adapter and base together are the run's model.
"""

import json
from pathlib import Path

import torch
import yaml

from data_pipeline.common.atomic import write_text
from data_pipeline.errors import RunMismatchError
from megaback.checkpoints.safetensors_file import write_tensors
from megaback.model.lora import LowRankUpdates
from megaback.planning.adapters import adapter_shapes
from megaback.run_folder import (
    ADAPTER_NAME,
    ADAPTER_WEIGHTS_NAME,
    HF_TOKENIZER_CONFIG_NAME,
    MODEL_CONFIG_NAME,
)
from megaback.weights.identity import identity_of
from megaback.weights.peft_adapter import BASE_SHA256, stored_name
from megaback.weights.source import WeightSource, open_source
from tools.export.card_metadata import tags_of

_HOW = "export the run's init_from by `megaback convert --to hf`, and give that folder"


def require_same_base(source: WeightSource, base_path: Path) -> LowRankUpdates:
    """The adapter of a source, whose base a folder is an export of, in any type.

    Raises RunMismatchError if the source has none, or the folder is another base.
    """
    if source.updates is None:
        raise RunMismatchError(
            "the checkpoint has no adapter: all of its weights were trained, or are merged; give "
            "a run or a checkpoint with finetune.lora, or use `megaback convert --to hf`"
        )
    if not (base_path / HF_TOKENIZER_CONFIG_NAME).is_file():
        raise RunMismatchError(f"`base` {base_path} is no model for transformers; {_HOW}")
    base = open_source(base_path)
    if difference := _difference(source, source.updates, base):
        raise RunMismatchError(
            f"`base` {base_path} is not the base of the run: its {difference} differs; {_HOW}"
        )
    return source.updates


def _difference(source: WeightSource, updates: LowRankUpdates, base: WeightSource) -> str | None:
    one, other = (given.description.text_format for given in (source, base))
    if (one.tokenizer_sha256, one.unit) != (other.tokenizer_sha256, other.unit):
        return "tokenizer"
    if source.shapes != base.shapes:
        return "shape"
    for name in source.shapes:
        weight = base.read(name)
        if not torch.equal(updates.read_base(name).to(weight.dtype), weight):
            return name
    return None


def write_peft_folder(
    folder: Path,
    source: WeightSource,
    updates: LowRankUpdates,
    base_path: Path,
    dtype: torch.dtype,
    license_id: str | None,
) -> None:
    """Write the factors, a card and, last, adapter_config.json."""
    section = updates.section
    sizes = adapter_shapes(source.description.shape, section)
    factors = {stored_name(name): name for name in sizes}
    specs = {stored: (dtype, sizes[name]) for stored, name in factors.items()}
    identity = identity_of(base_path / MODEL_CONFIG_NAME)
    metadata = {} if identity.sha256 is None else {BASE_SHA256: identity.sha256}
    write_tensors(
        folder / ADAPTER_WEIGHTS_NAME,
        specs,
        lambda stored: updates.read_factor(factors[stored]),
        metadata,
    )
    write_text(folder / "README.md", _card(source, base_path, license_id))
    assert section.rank is not None
    alpha = section.scale * section.rank
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_path),
        "r": section.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # vLLM reads an integer
        "target_modules": list(section.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    write_text(folder / ADAPTER_NAME, json.dumps(fields, indent=2) + "\n")


def _card(source: WeightSource, base_path: Path, license_id: str | None) -> str:
    fields = {
        "library_name": "peft",
        "base_model": str(base_path),
        **({} if license_id is None else {"license": license_id}),
        "tags": [*tags_of(source.description), "lora"],
    }
    head = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{head}---\nLoRA adapter of a model that reads "
        f"{source.description.text_format.direction.value}, at step {source.description.step}. "
        "Its base has the tokenizer; load that with `trust_remote_code=True`:\n```python\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")\n```\n'
    )
