"""Secrets of addresses, stored in environment variables and written as `${MEGABACK_SECRET_NAME}`.

A secret typed into an address moves to an environment variable of this process and its children;
from then on addresses contain the reference, which is expanded only to open them. References to
other variables are refused: an address from a third-party plan or config could send their values to
its server. For the same reason a generated variable is valid only for addresses of the same host.
"""

import hashlib
import itertools
import os
import re
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.redaction import (
    OWN_VARIABLE,
    REFERENCE,
    VARIABLE_PREFIX,
    hosts_of,
    is_url,
    place_of,
    remember,
    secret_spans,
    shown_url,
)

_ANY_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*)\}", re.ASCII)


def kept(address: str) -> str:
    """Move an address's secrets to the environment; return the address with references.

    Variable names depend only on the rest of the address, so that a renewed signature has the same
    one. Paths and addresses without secrets are unchanged. Raises ConfigError.
    """
    if not is_url(address):
        return address
    for match in _ANY_REFERENCE.finditer(address):
        if not match[1].startswith(VARIABLE_PREFIX):
            raise ConfigError(
                f"{shown_url(address)}: the variable {match[1]} is not allowed in an address, only "
                f"names that begin with {VARIABLE_PREFIX}; export it as "
                f"{VARIABLE_PREFIX}{match[1]}, and write '${{{VARIABLE_PREFIX}{match[1]}}}'"
            )
    pieces, position = [], 0
    for start, stop in secret_spans(address):
        secret = address[start:stop]
        try:
            name = _variable(address, secret)
        except ValueError:  # a NUL, or half of a surrogate pair
            raise ConfigError(
                f"{shown_url(address)}: it contains a character that is not allowed in addresses; "
                "encode it as %XX"
            ) from None
        remember(secret, is_password=address.startswith("@", stop))
        pieces += [address[position:start], f"${{{name}}}"]
        position = stop
    return "".join([*pieces, address[position:]])


def kept_in(value: Any) -> Any:
    """Apply `kept` to every string in a value parsed from JSON or YAML."""
    if isinstance(value, dict):
        return {key: kept_in(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [kept_in(part) for part in value]
    return kept(value) if isinstance(value, str) else value


def expanded(address: str) -> str:
    """The address with secrets, for opening it. Raises ConfigError for an unset variable."""
    if not is_url(address):
        return address
    hosts = _digest(hosts_of(address), 16)

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        own = OWN_VARIABLE.fullmatch(name)
        value = os.environ.get(name)
        if value is None or (own is not None and own[1] != hosts):
            what = "is not set" if value is None else "belongs to another host"
            means = "for its secret " if own is not None else ""
            raise ConfigError(
                f"{shown_url(address)}: the environment variable {name} {means}{what}; "
                "export it, or give the address with its secrets again"
            )
        remember(value, is_password=address.startswith("@", match.end()))
        # A secret typed next to a reference contains that reference.
        return REFERENCE.sub(value_of, value) if own is not None else value

    return REFERENCE.sub(value_of, address)


def _variable(address: str, secret: str) -> str:
    """Name of a variable with the secret; variables with other values are kept."""
    base = f"{VARIABLE_PREFIX}{_digest(hosts_of(address), 16)}_{_digest(place_of(address), 8)}"
    for number in itertools.count(1):
        name = base if number == 1 else f"{base}_{number}"
        held = os.environ.get(name)
        if held is None:
            os.environ[name] = secret
        if held in (None, secret):
            return name
    raise AssertionError("unreachable")


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:digits].upper()
