"""Validation errors of a config, as one sentence that names the key."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_MAX_SHOWN = 60
"""Maximum length of a value, in characters."""
_MESSAGES = {
    "path_type": "Input should be a path",
    "tuple_type": "Input should be a list; put it in brackets, as [a, b]",
}
"""Messages in place of pydantic's, which name Python types."""


def sentence(error: ValidationError, config: type[BaseModel]) -> str:
    """The first problem, unknown keys before all others, with a suggestion for those."""
    problems = error.errors(include_url=False)
    first = next((item for item in problems if item["type"] == "extra_forbidden"), problems[0])
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        message = f"there is no key {key}" + _did_you_mean(location, config)
    elif first["type"] == "missing":
        message = f"the key {key} is missing"
        if key == "model":
            message += "; set it, or set init_from to use that model's shape"
    else:
        where = f"{key} = {shown(first['input'])}: " if _is_short(first["input"]) else ""
        prefix = f"{key}: " if key and not where else where
        reason = _MESSAGES.get(first["type"], first["msg"])
        message = prefix + reason.removeprefix("Value error, ")
    others = len(problems) - 1
    return message + (f" (and {others} more problems)" if others else "")


def shown(value: Any) -> str:
    """The repr of a value, truncated."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _is_short(value: Any) -> bool:
    return not isinstance(value, dict | list | tuple | BaseModel)


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, BaseModel)


def _did_you_mean(location: list[str], config: type[BaseModel]) -> str:
    section = config
    for part in location[:-1]:
        if part.isdecimal():  # of a list
            continue
        hint = section.model_fields[part].annotation if part in section.model_fields else None
        found = next(filter(_is_section, (hint, *get_args(hint))), None)
        if found is None:
            return ""
        section = found
    names = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.5)
    prefix = ".".join(location[:-1])
    dotted = f"{prefix}." if prefix else ""
    if close:
        return f"; did you mean {dotted}{close[0]}?"
    return f"; {prefix or 'the config'} has {', '.join(names)}"
