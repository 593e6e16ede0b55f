"""Origins of addresses: independent of signatures, different for different content.

No requests are sent.
"""

import itertools

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_pipeline.storage.origins import origin_of
from data_pipeline.storage.remote_folder import RemoteFolder

PLACE = "https://host.example/sets/one"
S3 = "X-Amz-Algorithm=A&X-Amz-Credential={0}&X-Amz-Date={0}&X-Amz-Expires=9&X-Amz-Signature={0}"
SIGNED = [
    S3,
    f"{S3}&X-Amz-SignedHeaders=host&X-Amz-Security-Token={{0}}",
    "X-Goog-Credential={0}&X-Goog-Date={0}&X-Goog-Signature={0}",
    "AWSAccessKeyId=A&Expires={0}&Signature={0}",
    "Expires={0}&Signature={0}&Key-Pair-Id=K",
    "Policy={0}&Signature={0}&Key-Pair-Id=K",
    "sv=2024-11-04&se={0}&sr=c&sp=r&sig={0}",
]


@pytest.mark.parametrize("query", SIGNED)
def test_a_renewed_signature_does_not_change_the_origin(query: str) -> None:
    days = {RemoteFolder(f"{PLACE}?{query.format(day)}").origin for day in ("mon", "tue")}
    assert days == {RemoteFolder(PLACE).origin}


@pytest.mark.parametrize(
    "url",
    [
        "https://alice:hunter2@host.example/sets/one",
        "HTTPS://alice:hunter2@host.example/sets/one",
        "sftp://alice:hunter2@host.example/sets/one",
        "s3://KEY:hunter2@bucket/sets/one",
        f"{PLACE}?sv=1&sig=hunter2",
        f"{PLACE}?{S3.format('hunter2')}",
    ],
)
def test_origins_contain_no_passwords_or_signatures(url: str) -> None:
    address, _, query = url.partition("?")
    assert "hunter2" not in origin_of(address, f"?{query}", MemoryFileSystem())


def test_everything_that_may_select_the_content_is_in_the_origin() -> None:
    addresses = [
        PLACE,
        "http://host.example/sets/one",
        "https://host.example:8443/sets/one",
        "https://other.example/sets/one",
        "https://host.example/sets/two",
        "https://alice@host.example/sets/one",
        "https://bob@host.example/sets/one",
        "https://other.example\\@host.example/sets/one",
        f"{PLACE}?id=1",
        f"{PLACE}?id=2",
        f"{PLACE}?token=1",
        f"{PLACE}?token=2",
        f"{PLACE}?signature=1",
        f"{PLACE}?sig=1",
        f"{PLACE}?sv=1&st=2",
        f"{PLACE}?id=1&{SIGNED[-1]}",
        f"{PLACE}?versionId=1&{S3}",
        "memory://sets/one",
        "file:///sets/one",
    ]
    origins = [RemoteFolder(url).origin for url in addresses]
    assert [pair for pair in itertools.combinations(origins, 2) if pair[0] == pair[1]] == [
        (RemoteFolder(f"{PLACE}?id=1").origin,) * 2  # with and without a signature
    ]


class Bucket(MemoryFileSystem):
    """A driver whose addresses do not contain the server."""

    protocol = "bucket-of-a-test"
    cachable = False

    def __init__(self, endpoint_url: str = "", **options: object) -> None:
        super().__init__(**options)
        self.endpoint_url = endpoint_url


def test_a_bucket_on_another_server_has_another_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("bucket-of-a-test", Bucket, clobber=True)
    origins = set()
    for endpoint in ("https://one.example", "https://two.example"):
        monkeypatch.setitem(fsspec.config.conf, "bucket-of-a-test", {"endpoint_url": endpoint})
        origins.add(RemoteFolder("bucket-of-a-test://data/set").origin)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://three.example")
    origins.add(RemoteFolder("bucket-of-a-test://data/set").origin)
    assert len(origins) == 3
