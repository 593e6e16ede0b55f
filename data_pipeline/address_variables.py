"""Addresses as they are written down: `${NAME}` stands for a secret, which the environment holds.

A secret that is typed into an address goes to a variable of this process and of those it starts;
from then on everything handles the reference, and only what opens the address sees the whole.
"""

import hashlib
import itertools
import os
import re
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.redaction import (
    OWN_PREFIX,
    REFERENCE,
    is_url,
    place_of,
    remember,
    secret_spans,
    shown_url,
)

_DIGITS = 8


def kept(address: str) -> str:
    """An address with references in the place of its secrets, which go to the environment.

    The name of a variable depends on the rest of the address alone, so that a new signature gives
    the same. A path, or an address without secrets, stays as it is. Raises ConfigError.
    """
    spans = secret_spans(address) if is_url(address) else []
    if not spans:
        return address
    digest = hashlib.sha256(place_of(address).encode("utf-8", "backslashreplace")).hexdigest()
    pieces, position = [], 0
    for start, stop in spans:
        secret = address[start:stop]
        try:
            name = _variable(OWN_PREFIX + digest[:_DIGITS].upper(), secret)
        except ValueError:  # a NUL, or half of a surrogate pair
            raise ConfigError(
                f"{shown_url(address)}: it holds a character that no address may have; encode it "
                "as %XX"
            ) from None
        remember(secret, is_password=address.startswith("@", stop))
        pieces += [address[position:start], f"${{{name}}}"]
        position = stop
    return "".join([*pieces, address[position:]])


def kept_in(value: Any) -> Any:
    """Fields as they come from JSON or YAML, with every address in them as it may be kept."""
    if isinstance(value, dict):
        return {key: kept_in(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [kept_in(part) for part in value]
    return kept(value) if isinstance(value, str) else value


def expanded(address: str) -> str:
    """The whole address, to open it with. Raises ConfigError for a variable that is not set."""
    if not is_url(address):
        return address

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        value = os.environ.get(name)
        if value is None:
            what = "it holds what is secret in it; " if name.startswith(OWN_PREFIX) else ""
            raise ConfigError(
                f"{shown_url(address)}: the environment variable {name} is not set; {what}"
                "export it, or give the whole address again"
            )
        remember(value, is_password=address.startswith("@", match.end()))
        # A secret that was typed beside a reference holds that reference.
        return REFERENCE.sub(value_of, value) if name.startswith(OWN_PREFIX) else value

    return REFERENCE.sub(value_of, address)


def variables_in(value: Any) -> set[str]:
    """The names that addresses in fields refer to, those in variables of ours too."""
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return set().union(*map(variables_in, parts))
    if not isinstance(value, str) or not is_url(value):
        return set()
    names = {match[1] for match in REFERENCE.finditer(value)}
    return names.union(
        *({inner[1] for inner in REFERENCE.finditer(os.environ.get(name, ""))} for name in names)
    )


def _variable(base: str, secret: str) -> str:
    """The variable that holds a secret; one that holds another value is left alone."""
    for number in itertools.count(1):
        name = base if number == 1 else f"{base}_{number}"
        held = os.environ.get(name)
        if held is None:
            os.environ[name] = secret
        if held in (None, secret):
            return name
    raise AssertionError("the numbers ended")
