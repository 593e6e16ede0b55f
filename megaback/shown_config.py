"""A config as fields without credentials, for logs and third parties, and by whole keys."""

from collections.abc import Mapping
from typing import Any

from data_pipeline.redaction import shown_url
from megaback.config import Config


def shown_config(config: Config) -> dict[str, Any]:
    """The config's fields, without the passwords and signatures of URLs."""
    return shown_fields(config.model_dump(mode="json"))


def shown_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a config's fields as JSON."""
    shown: dict[str, Any] = _shown(dict(fields))
    return shown


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shown(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return shown_url(value) if isinstance(value, str) else value


def flat_fields(fields: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A config's fields by their whole keys, such as `model.width`."""
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= flat_fields(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat
