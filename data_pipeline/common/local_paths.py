"""Local paths: plain paths and `file://` URLs."""

from pathlib import Path

from data_pipeline.redaction import is_url

_LOCAL_URL = "file://"


def local_path(source: str) -> Path | None:
    """Path of a local source; None for a remote URL."""
    if source.startswith(_LOCAL_URL):
        return Path(source.removeprefix(_LOCAL_URL))
    return None if is_url(source) else Path(source).expanduser()


def with_absolute(source: str | Path) -> str:
    """A path or URL that does not exist, for a message; with its full path if it is relative."""
    path = local_path(str(source))
    if path is None or path.is_absolute():
        return str(source)
    return f"{source} (relative to the current folder: {path.absolute()})"
