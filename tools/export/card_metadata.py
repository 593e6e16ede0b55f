"""Metadata of a model card, as the Hugging Face hub reads it: license, base, data and val loss."""

import re
from typing import Any

import yaml

from data_pipeline.text.codec import Direction
from megaback.weights.identity import Training
from megaback.weights.model_folder import ModelDescription

_HUB_ADDRESS = re.compile(r"hf://(?:models/)?([\w.-]+/[\w.-]+)")
_FINGERPRINT = re.compile(r"(.*); fingerprint (\w*)", re.DOTALL)


def card_metadata(description: ModelDescription, name: str, license_id: str | None) -> str:
    """The YAML block that a card begins with.

    A backward model has no `pipeline_tag`: the hub offers models with one to programs that put
    new text behind the given one. The language is unknown.
    """
    text_format, training = description.text_format, description.training
    fields: dict[str, Any] = {"library_name": "transformers"}
    if text_format.direction is Direction.FORWARD:
        fields["pipeline_tag"] = "text-generation"
    if license_id is not None:
        fields["license"] = license_id
    if training is not None and (base := _HUB_ADDRESS.match(training.base or "")):
        fields["base_model"] = base[1]
    fields["tags"] = ["megaback", text_format.direction.value]
    if description.val_loss is not None and training is not None:
        fields["model-index"] = [{"name": name, "results": [_result(description, training)]}]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"


def _result(description: ModelDescription, training: Training) -> dict[str, Any]:
    """The val loss on the data of training."""
    found = _FINGERPRINT.fullmatch(training.data)
    data, fingerprint = found.groups() if found else (training.data, "")
    metrics = [{"type": "loss", "name": "val loss, nats per token", "value": description.val_loss}]
    if training.val_bits_per_byte is not None:
        value = training.val_bits_per_byte
        metrics.append({"type": "bits_per_byte", "name": "val loss, bits per byte", "value": value})
    dataset = {"type": "megaback-data-set", "name": data, "split": "val"}
    if fingerprint:
        dataset["revision"] = fingerprint
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}
