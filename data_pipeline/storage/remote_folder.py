"""Thread-safe access to the files of a folder behind a URL.

All files of a folder share one driver and its connections.
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
    """A folder behind a URL; over HTTP its query is appended to the address of each file."""

    def __init__(self, url: str) -> None:
        """Sends no request. Raises SourceMissingError, BackendError, ConfigError."""
        url = kept(url)
        self._address, self._query = _parted(url)
        self.shown = shown_url(self._address)
        self._driver = Driver(self._address)
        self.origin = origin_of(*_parted(expanded(url)), self._driver.file_system())
        """Identity of the source: see `origins`."""

    def url(self, name: str) -> str:
        """Address of a file. Raises ValueError unless the name is a plain file name."""
        return f"{self._address}/{plain_name(name)}{self._query}"

    def read(self, name: str, max_bytes: int) -> bytes:
        """Contents of a file. Raises OSError, also for a larger file, and SourceUnreadableError."""
        url = self.url(name)
        file = RemoteFile(url)
        if file.size_bytes > max_bytes:
            raise too_large(max_bytes, shown_url(url))
        return file.read()

    def ranges(self, name: str, expected_bytes: int) -> RemoteRanges:
        """Random access to a file of this expected size; sends no request. Raises as `url`."""
        return RemoteRanges(self.url(name), expected_bytes, self._driver)


def _parted(url: str) -> tuple[str, str]:
    """Address of a folder and its query, which follows the names of files."""
    address, separator, query = url.partition("?") if is_http(url) else (url, "", "")
    return address.partition("#")[0].rstrip("/"), separator + query
