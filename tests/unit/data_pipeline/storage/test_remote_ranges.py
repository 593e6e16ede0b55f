"""Range reads of remote files, over HTTP and with other drivers."""

import pytest

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.storage import remote_file, retries
from data_pipeline.storage.remote_file import RemoteFile
from data_pipeline.storage.remote_ranges import RemoteRanges
from tests.helpers.file_server import QUICK, FileServer

DATA = bytes(number % 251 for number in range(200_000))
SCHEMES = ["http", "memory"]


class Remote:
    """One file on a web server or in fsspec's memory file system."""

    def __init__(self, scheme: str, server: FileServer) -> None:
        self._server = server if scheme == "http" else None
        self.url = server.url("data") if scheme == "http" else "memory://ranges/data"

    def write(self, data: bytes) -> None:
        import fsspec

        if self._server is None:
            fsspec.filesystem("memory").pipe("/ranges/data", data)
        else:
            self._server.files["data"] = data


@pytest.fixture(params=SCHEMES)
def remote(
    request: pytest.FixtureRequest, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> Remote:
    monkeypatch.setattr(retries, "POLICY", QUICK)
    remote = Remote(request.param, server)
    remote.write(DATA)
    return remote


@pytest.mark.parametrize("error", [0, -1, 1, -150_000, 10_000_000])
def test_a_tail_returns_the_size_whatever_was_expected(remote: Remote, error: int) -> None:
    ranges = RemoteRanges(remote.url, max(0, len(DATA) + error))
    size_bytes, tail = ranges.tail(1000)
    assert size_bytes == len(DATA)
    assert len(tail) >= 1000
    assert DATA.endswith(tail)
    assert ranges.read_at(500, 100_000) == DATA[500:100_500]
    assert ranges.read_at(199_990, 100) == DATA[199_990:]


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_file, "BLOCK_BYTES", 50_000)
    file = RemoteFile(remote.url)
    assert file.read(60_000) == DATA[:60_000]
    remote.write(DATA[:70_000])
    with pytest.raises(SourceUnreadableError, match="changed while it was read"):
        file.read()


def test_reading_a_shard_that_shrank_raises_oserror(
    remote: Remote,
) -> None:
    ranges = RemoteRanges(remote.url, len(DATA))
    ranges.tail(10)
    remote.write(DATA[:-1])
    with pytest.raises(OSError, match="was replaced since it was opened"):
        ranges.read_at(100_000, 100_000)
