"""Origins of addresses: identity of a source without passwords and signatures.

Addresses with the same origin read the same account of the same server. A renewed signature does
not change the origin; anything else that may select the content does.
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
"""Query parameters of signatures, by provider: required ones, and optional ones.

Other parameters are kept, even `token`: on some servers they select the content.
"""
_SERVICE_ATTRIBUTES = ("endpoint_url", "_endpoint", "endpoint", "account_name", "account_host")
_SERVICE_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")


def origin_of(address: str, query: str, file_system: Any) -> str:
    """Origin of a folder, from its address and, over HTTP, its query.

    Cached bytes of one origin are not valid for another, whatever their hash, name or size.
    """
    protocol, separator, rest = address.partition("://")
    authority, slash, path = rest.partition("/")
    account, at, host = authority.rpartition("@")
    # The user is kept: the same path of another account may have other content.
    user = account.partition(":")[0]
    place = f"{protocol}{separator}{user}{at}{host}{slash}{path}"
    return json.dumps([place, _unsigned(query.removeprefix("?")), _service(file_system)])


def _unsigned(query: str) -> str:
    """A query without its signature."""
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
    """Server settings that an address such as `s3://bucket/folder` does not contain."""
    names = {name: getattr(file_system, name, None) for name in _SERVICE_ATTRIBUTES}
    names |= {name: os.environ.get(name) for name in _SERVICE_VARIABLES}
    return {name: value for name, value in names.items() if isinstance(value, str) and value}
