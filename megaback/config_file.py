"""Loading of a run's config: YAML file, overrides, and the model's shape from `init_from`."""

import logging
import shlex
from pathlib import Path

import yaml
from pydantic import ValidationError

from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.config_messages import sentence
from megaback.horizons import with_trunk_steps
from megaback.run_folder import CONFIG_COPY_NAME, RESOLVED_COPY_NAME
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
        raise ConfigError(
            f"cannot read the config {path}: {error.strerror}; {_advice(path)}"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_reason(error)}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} has no keys; see configs/demo.yaml for a small example")
    for override in overrides:
        apply_override(fields, override)
    fields = with_base_shape(fields)
    try:
        config = Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path}: {sentence(error, Config)}") from None
    return with_trunk_steps(config.model_copy(update={"model": config.model.resolved()}))


def _advice(path: Path) -> str:
    """Advice for a config that cannot be read; names the config of a run's folder."""
    for name in (RESOLVED_COPY_NAME, CONFIG_COPY_NAME):
        if (path / name).is_file():
            return f"give the run's config, {path / name}"
    return "give the path of a YAML file, such as configs/demo.yaml"


def _reason(error: yaml.YAMLError) -> str:
    """The error and its line and column, without an excerpt of the text."""
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    return " ".join(str(error).split())
