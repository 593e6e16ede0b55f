"""Facts of an export for programs: license, base, data and val loss.

The YAML block of a model card, as the Hugging Face hub reads it; GGUF files have the same facts.
"""

import re
from typing import Any

import yaml

from data_pipeline.text.codec import Direction
from megaback.weights.identity import Training
from megaback.weights.model_folder import ModelDescription

_HUB_ADDRESS = re.compile(r"hf://(?:models/)?([\w.-]+/[\w.-]+)")
_HUB_CACHE = re.compile(r"(?:.*[/\\])?models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\].*")
_FINGERPRINT = re.compile(r"(.*); fingerprint (\w+)", re.DOTALL)


def card_metadata(
    description: ModelDescription,
    name: str,
    license_id: str | None,
    library: str = "transformers",
    *,
    has_val_loss: bool = True,
) -> str:
    """The YAML block that a card begins with.

    `has_val_loss`: whether the file's weights are those whose val loss is known. The language is
    unknown.
    """
    fields: dict[str, Any] = {"library_name": library}
    if (task := task_of(description)) is not None:
        fields["pipeline_tag"] = task
    if license_id is not None:
        fields["license"] = license_id
    if (base := hub_base(description)) is not None:
        fields["base_model"] = base
    fields["tags"] = tags_of(description)
    training = description.training
    if has_val_loss and description.val_loss is not None and training is not None:
        fields["model-index"] = [{"name": name, "results": [_result(description, training)]}]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def task_of(description: ModelDescription) -> str | None:
    """The hub's name of the task; None for a backward model.

    The hub offers models with one to programs that put new text behind the given one.
    """
    is_forward = description.text_format.direction is Direction.FORWARD
    return "text-generation" if is_forward else None


def tags_of(description: ModelDescription) -> list[str]:
    """Words to find the model by."""
    return ["megaback", description.text_format.direction.value]


def hub_base(description: ModelDescription) -> str | None:
    """Name on the hub of the model that training began with; None if it is not one of the hub.

    An imported model is one of the hub if it was read from there or from the hub's cache; otherwise
    it is the one that its folder named as its own base.
    """
    training, imported = description.training, description.imported
    bases = (training and training.base, imported and imported.base.path)
    if found := next(filter(None, (_HUB_ADDRESS.match(base or "") for base in bases)), None):
        return found[1]
    if imported is not None and (found := _HUB_CACHE.fullmatch(imported.base.path)):
        return f"{found[1]}/{found[2]}"
    return None if imported is None else imported.base_on_hub


def data_of(training: Training) -> tuple[str, str | None]:
    """Names of the data sets, and their fingerprint if it is known."""
    found = _FINGERPRINT.fullmatch(training.data)
    return (found[1], found[2]) if found else (training.data, None)


def _result(description: ModelDescription, training: Training) -> dict[str, Any]:
    """The val loss on the data of training."""
    data, fingerprint = data_of(training)
    metrics = [{"type": "loss", "name": "val loss, nats per token", "value": description.val_loss}]
    if training.val_bits_per_byte is not None:
        value = training.val_bits_per_byte
        metrics.append({"type": "bits_per_byte", "name": "val loss, bits per byte", "value": value})
    dataset = {"type": "megaback-data-set", "name": data, "split": "val"}
    if fingerprint is not None:
        dataset["revision"] = fingerprint
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
