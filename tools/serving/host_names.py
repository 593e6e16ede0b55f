"""Allowed host names of a server without a token: loopback names and `--allow-host`.

A page of another site can make a browser send requests here, under that site's Origin or, after its
name was made to point here, under its Host. Names are compared whole; nothing that a proxy adds,
such as X-Forwarded-Host, counts.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from data_pipeline.errors import ServeError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_ADDRESS = re.compile(
    r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_](?:[a-z0-9_.-]*[a-z0-9_])?))(?::([0-9]{1,5}))?"
)


@dataclass(frozen=True)
class Address:
    """A name with or without a port, as a Host header has it."""

    name: str
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Address | None":
        """None for an invalid address."""
        found = _ADDRESS.fullmatch(text.lower())
        if found is None:
            return None
        port = None if found[3] is None else int(found[3])
        return None if port is not None and port > 65_535 else cls(found[1] or found[2], port)

    def is_in(self, allowed: "Iterable[Address]") -> bool:
        """Whether one of them has this name, and no port or this one."""
        return any(one.name == self.name and one.port in (None, self.port) for one in allowed)


def read_allowed(names: Sequence[str]) -> tuple[Address, ...]:
    """Values of `--allow-host`. Raises ServeError unless each is a name with or without a port."""
    allowed = []
    for name in names:
        address = Address.parse(name)
        if address is None:
            raise ServeError(
                f"--allow-host {name[:100]!r} is not a host name; give it as in the "
                "Host header, such as demo.example.org or demo.example.org:8443, without https://"
            )
        allowed.append(address)
    return tuple(allowed)


def refusal(host: str, origins: Sequence[str], allowed: Sequence[Address]) -> str | None:
    """Reason why a request with these Host and Origin headers is cross-site, or None.

    Allowed are LOOPBACK_NAMES and `allowed`, the latter also with an https Origin behind a proxy
    that calls the server by another name.
    """
    called = Address.parse(host)
    here = [*map(Address, LOOPBACK_NAMES), *allowed]
    if called is None or not called.is_in(here):
        shown = host[:100]
        return (
            f"the Host {shown!r} is not allowed, as {LOOPBACK_NAMES[0]} is; for a proxy, "
            f"start the server with --allow-host {shown if called else 'NAME'}, or with a token, "
            "which allows every name"
        )
    for origin in origins:
        scheme, _, rest = origin.lower().partition("://")
        sender = Address.parse(rest)
        is_ours = sender is not None and (
            (scheme in ("http", "https") and sender == called)
            or (scheme == "https" and sender.is_in(allowed))
        )
        if not is_ours:
            return (
                f"cross-site request: its Origin is {origin[:100]!r}, and its "
                f"Host is {host[:100]!r}; if a proxy serves that page for this server, start it "
                "with --allow-host and the name, or with a token"
            )
    return None
