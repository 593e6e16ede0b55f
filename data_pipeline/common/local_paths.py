"""Paths among addresses: a plain path, or a `file://` URL."""

from pathlib import Path

from data_pipeline.redaction import is_url

_LOCAL_URL = "file://"


def local_path(source: str) -> Path | None:
    """The path that a source names; None for the URL of another machine."""
    if source.startswith(_LOCAL_URL):
        return Path(source.removeprefix(_LOCAL_URL))
    return None if is_url(source) else Path(source).expanduser()
