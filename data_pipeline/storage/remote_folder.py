"""A folder behind a URL: its files by name, whole or in parts, for many threads at once.

One driver, and so one set of connections, serves a folder.
"""

from data_pipeline.common.file_names import plain_name
from data_pipeline.common.regular_files import too_large
from data_pipeline.redaction import shown_url
from data_pipeline.storage.address_variables import expanded, kept
from data_pipeline.storage.drivers import Driver
from data_pipeline.storage.origins import origin_of
from data_pipeline.storage.remote_file import RemoteFile
from data_pipeline.storage.remote_ranges import RemoteRanges
from data_pipeline.storage.urls import is_http


class RemoteFolder:
    """A folder behind a URL; over http the query of its address goes with every file's."""

    def __init__(self, url: str) -> None:
        """Asks for nothing yet. Raises SourceMissingError, BackendError, ConfigError."""
        url = kept(url)
        self._address, self._query = _parted(url)
        self.shown = shown_url(self._address)
        self._driver = Driver(self._address)
        self.origin = origin_of(*_parted(expanded(url)), self._driver.file_system())
        """Server that decides what lies there."""

    def url(self, name: str) -> str:
        """The address of one of its files. Raises ValueError for a name that is no file's."""
        return f"{self._address}/{plain_name(name)}{self._query}"

    def read(self, name: str, max_bytes: int) -> bytes:
        """All of a file, which has no more bytes. Raises OSError, SourceUnreadableError."""
        url = self.url(name)
        file = RemoteFile(url)
        if file.size_bytes > max_bytes:
            raise too_large(max_bytes, shown_url(url))
        return file.read()

    def ranges(self, name: str, expected_bytes: int) -> RemoteRanges:
        """A file that should have this size; asks for nothing yet. Raises as `url`."""
        return RemoteRanges(self.url(name), expected_bytes, self._driver)


def _parted(url: str) -> tuple[str, str]:
    """The address of a folder, and the query that goes behind its files' names."""
    address, separator, query = url.partition("?") if is_http(url) else (url, "", "")
    return address.partition("#")[0].rstrip("/"), separator + query
