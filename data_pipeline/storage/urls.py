"""What the text of an address says without opening it."""

import re
from pathlib import PurePosixPath

HTTP = ("http", "https")


def is_http(url: str) -> bool:
    """Whether an address is one of a web server, which gives files but lists none."""
    return url.partition("://")[0].lower() in HTTP


def url_path(url: str) -> PurePosixPath:
    """The path of an address, without the query that a signed address carries."""
    rest = url.partition("://")[2]
    return PurePosixPath(re.split(r"[?#]", rest)[0] if is_http(url) else rest)
