"""Sources with secrets in their addresses, which are never stored or shown."""

from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.errors import ConfigError, MegabackError, SourceUnreadableError
from data_pipeline.sources.registry import list_slices
from data_pipeline.storage import retries
from data_pipeline.storage.address_variables import kept
from tests.helpers.file_server import QUICK, FileServer, documents

PLANT = "S3CR3T-plant"


@pytest.fixture(autouse=True)
def short_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "POLICY", QUICK)


class VaultFileSystem(MemoryFileSystem):
    """A driver with a login to a host, as for sftp and ftp, whose file names lack both."""

    protocol = "vault"
    cachable = False

    def __init__(self, host: str = "", username: str = "", password: str = "") -> None:
        super().__init__()
        if (host, username, password) != ("host", "user", PLANT):
            raise PermissionError(f"login failed: {username}:{password}@{host}")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = fsspec.utils.infer_storage_options(path)["path"]
        return str(MemoryFileSystem._strip_protocol(path))

    @staticmethod
    def _get_kwargs_from_urls(url: str) -> dict[str, Any]:
        options = fsspec.utils.infer_storage_options(url)
        return {key: options[key] for key in ("host", "username", "password") if key in options}


@pytest.fixture
def vault() -> Iterator[str]:
    fsspec.register_implementation("vault", VaultFileSystem, clobber=True)
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/set/{number}.txt", f"text {number}".encode())
    yield f"vault://user:{PLANT}@host/set"
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.mark.parametrize("end", ["", "/*.txt", "/1.txt"])
def test_a_folder_is_read_with_its_login_and_listed_without(vault: str, end: str) -> None:
    pieces = list_slices(kept(vault + end))
    assert len(pieces) == (1 if end == "/1.txt" else 3)
    assert PLANT not in str(pieces)
    texts = [document.text for document in documents(kept(vault + end))]
    assert texts == (["text 1"] if end == "/1.txt" else ["text 0", "text 1", "text 2"])


def test_the_login_in_a_drivers_error_is_removed(vault: str) -> None:
    with pytest.raises(MegabackError) as caught:
        list_slices(kept(vault.replace("@host", "@other")))
    assert PLANT not in str(caught.value)
    assert "vault://other/set" in str(caught.value)


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
def test_references_in_addresses_are_expanded(
    server: FileServer, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["a.txt"] = b"some text"
    address = server.url("a.txt").replace("http:", f"{scheme}:") + "?sig=${MEGABACK_SECRET_SIG}"
    with pytest.raises(
        ConfigError, match="the environment variable MEGABACK_SECRET_SIG is not set"
    ):
        list_slices(address)
    monkeypatch.setenv("MEGABACK_SECRET_SIG", PLANT)
    (piece,) = list_slices(address)
    assert piece.path == address
    assert [document.text for document in documents(address)] == ["some text"]
    assert server.targets[-1] == f"/a.txt?sig={PLANT}"


def test_a_circular_redirect_is_reported_without_the_signature(server: FileServer) -> None:
    server.redirects["a.txt"] = f"/a.txt?sig={PLANT}&again=1"
    with pytest.raises(SourceUnreadableError) as caught:
        list_slices(kept(server.url("a.txt") + f"?sig={PLANT}"))
    assert PLANT not in str(caught.value)
    assert server.url("a.txt") in str(caught.value)


def test_a_failed_login_is_reported(vault: str) -> None:
    with pytest.raises(
        SourceUnreadableError, match=r"^vault://host/set: login failed: .*permission"
    ):
        list_slices(kept(vault.replace("user:", "nobody:")))
