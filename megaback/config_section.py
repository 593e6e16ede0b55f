"""Base of the config's sections: unknown keys are errors, and numbers are read as YAML writes them.

Loads no torch.
"""

import re
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]{1,2})?")


def _kinds(annotation: Any) -> list[Any]:
    """A type and all of its type arguments: those of `Annotated[int, …] | None` include int."""
    return [annotation, *(kind for part in get_args(annotation) for kind in _kinds(part))]


def _as_number(value: Any, annotation: Any) -> Any:
    kinds = _kinds(annotation)
    if isinstance(value, bool) and bool not in kinds and any(x in kinds for x in (int, float, 1)):
        return str(value).lower()  # a string, which the field rejects; true would be 1
    if isinstance(value, str) and int in kinds and _WHOLE.fullmatch(value):
        number = float(value.replace("_", ""))
        return int(number) if number.is_integer() else number
    return value


def _as_word(value: Any) -> Any:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


ON_OR_OFF = BeforeValidator(_as_word)
"""The word on or off, which YAML reads as true or false."""


class Section(BaseModel):
    """Immutable part of the config; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, fields: Any) -> Any:
        """Read `1e3`, text in YAML, as an integer; reject `yes` and `true` as numbers."""
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        return {
            key: _as_number(value, known[key].annotation) if key in known else value
            for key, value in fields.items()
        }
