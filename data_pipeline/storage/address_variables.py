"""Addresses as they are written down: `${MEGABACK_SECRET_NAME}` stands for a secret in one.

The environment holds it. A secret that is typed into an address goes to a variable of this process
and of those it starts; from then on everything handles the reference, and only what opens the
address sees the whole. Other variables are out of reach: an address may come from somebody else's
plan or config, and would take what it names to that one's server. For the same reason a variable
that was made here serves addresses of the same host alone.
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
    """An address with references in the place of its secrets, which go to the environment.

    The name of a variable depends on the rest of the address alone, so that a new signature gives
    the same. A path, or an address without secrets, stays as it is. Raises ConfigError.
    """
    if not is_url(address):
        return address
    for match in _ANY_REFERENCE.finditer(address):
        if not match[1].startswith(VARIABLE_PREFIX):
            raise ConfigError(
                f"{shown_url(address)}: an address may not refer to the variable {match[1]}, only "
                f"to those whose names begin with {VARIABLE_PREFIX}; export it as "
                f"{VARIABLE_PREFIX}{match[1]}, and write '${{{VARIABLE_PREFIX}{match[1]}}}'"
            )
    pieces, position = [], 0
    for start, stop in secret_spans(address):
        secret = address[start:stop]
        try:
            name = _variable(address, secret)
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
    hosts = _digest(hosts_of(address), 16)

    def value_of(match: re.Match[str]) -> str:
        name = match[1]
        own = OWN_VARIABLE.fullmatch(name)
        value = os.environ.get(name)
        if value is None or (own is not None and own[1] != hosts):
            what = "is not set" if value is None else "is of another host's addresses"
            means = "holds what is secret in it, and " if own is not None else ""
            raise ConfigError(
                f"{shown_url(address)}: the environment variable {name} {means}{what}; "
                "export it, or give the whole address again"
            )
        remember(value, is_password=address.startswith("@", match.end()))
        # A secret that was typed beside a reference holds that reference.
        return REFERENCE.sub(value_of, value) if own is not None else value

    return REFERENCE.sub(value_of, address)


def _variable(address: str, secret: str) -> str:
    """The variable that holds a secret; one that holds another value is left alone."""
    base = f"{VARIABLE_PREFIX}{_digest(hosts_of(address), 16)}_{_digest(place_of(address), 8)}"
    for number in itertools.count(1):
        name = base if number == 1 else f"{base}_{number}"
        held = os.environ.get(name)
        if held is None:
            os.environ[name] = secret
        if held in (None, secret):
            return name
    raise AssertionError("the numbers ended")


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:digits].upper()
