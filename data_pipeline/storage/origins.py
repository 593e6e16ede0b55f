"""Who decides what is read from an address: its origin, which holds no password and no signature.

Of two addresses with the same origin, the same account of the same server decides the content. A
signature that is renewed every day changes no origin; whatever else may choose the content does.
"""

import json
import os
from typing import Any

_SIGNATURES: tuple[tuple[set[str], set[str]], ...] = (
    (
        {"x-amz-signature", "x-amz-credential"},
        {"x-amz-algorithm", "x-amz-date", "x-amz-expires", "x-amz-signedheaders"}
        | {"x-amz-security-token"},
    ),
    (
        {"x-goog-signature", "x-goog-credential"},
        {"x-goog-algorithm", "x-goog-date", "x-goog-expires", "x-goog-signedheaders"},
    ),
    ({"signature", "awsaccesskeyid", "expires"}, {"x-amz-security-token"}),
    ({"signature", "googleaccessid", "expires"}, set()),
    ({"signature", "key-pair-id"}, {"expires", "policy"}),
    (
        {"sig", "sv"},  # Azure
        {"se", "si", "sip", "sp", "spr", "sr", "srt", "ss", "st"}
        | {"ske", "skoid", "sks", "skt", "sktid", "skv"},
    ),
)
"""Parameters that sign a query, by provider: those it is known by, and those that may be there too.

Other parameters stay, even those called `token`: on some servers they choose what is served.
"""
_SERVICE_ATTRIBUTES = ("endpoint_url", "_endpoint", "endpoint", "account_name", "account_host")
_SERVICE_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def origin_of(address: str, query: str, file_system: Any) -> str:
    """The origin of a folder that a driver reads by an address and, over http, a query.

    Bytes of another origin are another's, whatever hash, name or size they claim to have.
    """
    protocol, separator, rest = address.partition("://")
    authority, slash, path = rest.partition("/")
    account, at, host = authority.rpartition("@")
    # The user stays: the same path of another account may hold something else.
    user = account.partition(":")[0]
    place = f"{protocol}{separator}{user}{at}{host}{slash}{path}"
    return json.dumps([place, _unsigned(query.removeprefix("?")), _service(file_system)])


def _unsigned(query: str) -> str:
    """A query without what signs it."""
    parts = [part for part in query.split("&") if part]
    names = {_name(part) for part in parts}
    signing: set[str] = set()
    for required, others in _SIGNATURES:
        if required <= names:
            signing |= required | others
    return "&".join(part for part in parts if _name(part) not in signing)


def _name(parameter: str) -> str:
    return parameter.partition("=")[0].lower()


def _service(file_system: Any) -> dict[str, str]:
    """What of the server an address such as `s3://bucket/folder` does not say."""
    names = {name: getattr(file_system, name, None) for name in _SERVICE_ATTRIBUTES}
    names |= {name: os.environ.get(name) for name in _SERVICE_VARIABLES}
    return {name: value for name, value in names.items() if isinstance(value, str) and value}
