"""Loading of a run's config: YAML file, overrides, and the model's shape from `init_from`."""

import logging
import shlex
from pathlib import Path

import yaml
from pydantic import ValidationError

from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.config_messages import sentence
from megaback.weights.base_shape import with_base_shape
from megaback.yaml_text import apply_override, read_yaml_argument

_LOG = logging.getLogger("megaback.config")


def load_config(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides in order, and validate the result.

    Keys missing from `model` are taken from init_from, if it is set. Raises ConfigError with the
    file and the key, and a suggestion for an unknown key; and the errors of `with_base_shape`.
    """
    _LOG.debug("reading the config %s with %s", path, shlex.join(overrides) or "no overrides")
    try:
        fields = read_yaml_argument(path)
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no keys; see configs/demo.yaml for a small example")
    for override in overrides:
        apply_override(fields, override)
    fields = with_base_shape(fields)
    try:
        config = Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error, Config)}") from None
    return config.model_copy(update={"model": config.model.resolved()})
