"""Addresses of this machine itself."""

import socket

import pytest

from data_pipeline.common.loopback import is_loopback


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.3.2.1", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.7", False),
        ("fe80::1", False),
        (socket.gethostname(), False),  # 127.0.1.1 here, perhaps, and another address elsewhere
    ],
)
def test_an_address_is_loopback_only_if_it_is_so_on_every_node(
    address: str, is_local: bool
) -> None:
    assert is_loopback(address) is is_local
