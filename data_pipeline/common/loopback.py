"""Addresses of this machine itself."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether an address means the local machine on every node, unlike a hostname."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
