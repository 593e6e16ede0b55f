"""Parsing of URLs."""

import re
from pathlib import PurePosixPath

HTTP = ("http", "https")


def is_http(url: str) -> bool:
    """Whether an address is HTTP or HTTPS, which cannot list files."""
    return url.partition("://")[0].lower() in HTTP


def url_path(url: str) -> PurePosixPath:
    """The path of an address, without its query."""
    rest = url.partition("://")[2]
    return PurePosixPath(re.split(r"[?#]", rest)[0] if is_http(url) else rest)
