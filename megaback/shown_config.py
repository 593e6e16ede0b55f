"""A config for eyes other than its owner's."""

from typing import Any

from data_pipeline.remote import shown_url
from megaback.config import Config


def shown_config(config: Config) -> dict[str, Any]:
    """What a config says, without the passwords and signatures of addresses."""
    fields: dict[str, Any] = _shown(config.model_dump(mode="json"))
    return fields


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shown(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return shown_url(value) if isinstance(value, str) else value
