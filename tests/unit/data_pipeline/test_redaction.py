"""Secrets in URLs are redacted in all output; other text is unchanged."""

import os
import threading
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.redaction import MASK, place_of, remember, scrub, secret_spans, shown_url

PLANT = "S3CR3T-plant"

SHOWN = {
    f"https://user:{PLANT}@host/x.jsonl?sig={PLANT}&id=7#t={PLANT}": "https://host/x.jsonl?id=7",
    f"HTTPS://host/x?sig={PLANT}": "HTTPS://host/x",
    f"https://host/x?id=7&X-Amz-Signature={PLANT}&download=true": "https://host/x?id=7&download=true",
    f"https://host/x?{PLANT}": "https://host/x",
    f"https://host/x?{PLANT}=": "https://host/x",
    f"https://host/x?unknown={PLANT}": "https://host/x",
    f"https://host/x;session={PLANT}/y": "https://host/x/y",
    f"https://host/x%3Fsig%3D{PLANT}": "https://host/x",
    f"https://user%3A{PLANT}%40host/x": "https://host/x",
    f"https://user%253A{PLANT}%2540host/x": "https://host/x",
    f"https://{PLANT}@host/x": "https://host/x",
    f"https://user:{PLANT}@[::1]:8080/x": "https://[::1]:8080/x",
    f"https://user:a@{PLANT}/b@host/x": "https://host/x",
    f"https:/user:{PLANT}@host/x": "https:/host/x",
    f"//user:{PLANT}@host/x?y={PLANT}": "//host/x",
    f"sftp://user:{PLANT}@host/x": "sftp://host/x",
    f"ftp://user:a?{PLANT}@host/x": "ftp://host/x",
    f"s3://KEY:a/{PLANT}+@bucket/x": "s3://bucket/x",
    f"s3://bucket/x?versionId=7&sig={PLANT}": "s3://bucket/x?versionId=7",
    f"s3://bucket/x?{PLANT}-without-a-name": "s3://bucket/x",
    f"hf://user:{PLANT}@datasets/a/b": "hf://datasets/a/b",
    f"abfs://box@account.net/x?sv=1&sig={PLANT}": "abfs://box@account.net/x",
    f"simplecache::https://u:{PLANT}@host/x?sig={PLANT}": "simplecache::https://host/x",
    f"zip://a?b={PLANT}::s3://KEY:{PLANT}@bucket/x": "zip://a::s3://bucket/x",
    f"https://archive.org/https://u:{PLANT}@host/x": "https://archive.org/https://host/x",
    f"https://proxy/x?url=https%3A%2F%2Fu%3A{PLANT}%40host": "https://proxy/x",
    "sftp://alice@host/x": "sftp://host/x",
}
UNCHANGED = [
    *("", "data", "data/a@b?c=d#e", "/data/part-?.jsonl", "//server/share/a@b?c=d", "./a:b@c"),
    *(
        "C:\\data\\a@b?c=d",
        "C:/data/a@b",
        "~/a",
        "hf:name:config",
        "hf:/data/set",
        "novels",
        "pydocs",
    ),
    *("https://host/x", "https://host:80/x", "https://[::1]:80/x", "https://host/@scope/x"),
    *("https://host/x?id=7", "https://host/x?download=true&page=2", "s3://bucket/part-?.jsonl"),
    *("s3://bucket/a#1/x", "hf://gpt2@main/x", "hf://datasets/a/b@refs%2Fpr%2F1/x"),
    *(
        "file:///data/a?b=c#d@e",
        "https://host/x?${MEGABACK_SECRET_SAS}",
        "https://host/x?sig=${MEGABACK_SECRET_SIG}&id=7",
    ),
    *(
        "https://alice:${MEGABACK_SECRET_PASSWORD}@host/x",
        "https://${MEGABACK_SECRET_LOGIN}@host/x",
        "abfs://box@account.net/x",
    ),
]
SCHEMES = [
    *("http", "https", "HTTPS", "ftp", "sftp", "s3", "gs", "hf", "abfs", "memory", "x-y+z"),
    *("simplecache::https", "zip://a::s3"),
]
secrets = st.text("abcXYZ019-._~+/=%:@?#&;!$,'()*[]", max_size=12).map(
    lambda text: f"{text}Qq7{text[::-1]}"
)


@pytest.mark.parametrize("address", SHOWN)
def test_secrets_of_a_url_are_redacted(address: str) -> None:
    assert shown_url(address) == SHOWN[address]
    assert PLANT not in place_of(address)
    held = [address[start:stop] for start, stop in secret_spans(address)]
    assert sum(secret.count(PLANT) for secret in held) == address.count(PLANT)


@pytest.mark.parametrize("text", UNCHANGED)
def test_other_parts_of_a_url_are_unchanged(text: str) -> None:
    assert shown_url(text) == text
    assert secret_spans(text) == []


def test_a_secret_reference_is_redacted() -> None:
    address = "https://${MEGABACK_SECRET_0123456789ABCDEF_01234567}@host/x?id=7&${MEGABACK_SECRET_0123456789ABCDEF_01234567_2}"
    assert shown_url(address) == "https://host/x?id=7" == place_of(address)
    assert secret_spans(address) == []
    assert place_of(
        "https://alice:${MEGABACK_SECRET_PASSWORD}@host/x?id=7&sig=${MEGABACK_SECRET_SIG}"
    ) == place_of(address)


@given(
    scheme=st.sampled_from(SCHEMES), login=secrets, value=secrets, key=st.text("abz_", max_size=5)
)
def test_no_secret_before_a_host_or_in_a_query_is_shown(
    scheme: str, login: str, value: str, key: str
) -> None:
    # Digits and a slash would be a port and a path: `//host:80/x@y` has no login.
    address = f"{scheme}://user:p{login}@host.org/x.jsonl?{key}={value}&id=7"
    assert "Qq7" not in shown_url(address) + place_of(address)
    if "'" not in address:  # where a quoted address ends is ambiguous
        assert "Qq7" not in scrub(f"cannot read '{address}': 403")
    spans = secret_spans(address)
    assert all(0 <= start < stop <= len(address) for start, stop in spans)
    assert [stop for _, stop in spans[:-1]] <= [start for start, _ in spans[1:]]


@given(text=st.one_of(st.text(), st.text("https:/@?#&=;%4025${}AZ_[]. \n", max_size=60)))
@example(text="https://a@b:c/d@e")
@example(text="http://" + "a@b:c/" * 40 + "@")
def test_redaction_of_any_text_is_idempotent(text: str) -> None:
    for function in (shown_url, place_of, scrub):
        once = function(text)
        assert isinstance(once, str)
        if function is not place_of:
            assert function(once) == once
    secret_spans(text)


@given(text=st.text(st.characters(exclude_characters=":%", exclude_categories=["Cs"])))
def test_a_path_without_a_colon_stays(text: str) -> None:
    assert shown_url(text) == text


@pytest.mark.parametrize(
    "piece", ["a", "%40", "https://", "a@b:c/", "::s3://", "?a=b&", ";a=b", "//"]
)
def test_a_megabyte_is_redacted_quickly(piece: str) -> None:
    """In CPU time of this thread, as the machine may be busy."""
    text = "https://h/" + piece * (300_000 // len(piece))
    begin = time.thread_time()
    shown_url(text)
    scrub(text[:100_000])
    assert time.thread_time() - begin < 3


def test_known_secrets_in_other_texts_are_redacted() -> None:
    remember(f"user:{PLANT}1", is_password=True)
    remember(f"sig={PLANT}%2B&expires=true")
    text = (  # a driver's
        f"GET https://u:{PLANT}@host/x?id=7&token={PLANT}: 403, see (sftp://a:{PLANT}@b/c). "
        f"login {PLANT}1 failed; {PLANT}+ too; 'Authorization': 'Bearer {PLANT}'; "
        f"/x?sig={PLANT} true"
    )
    assert scrub(text) == (
        "GET https://host/x?id=7: 403, see (sftp://b/c). "
        f"login {MASK} failed; {MASK} too; 'Authorization': 'Bearer {MASK}'; /x?sig={MASK} true"
    )


def test_driver_secrets_are_found_by_their_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secrets = {
        name: f"{PLANT}-{name.lower()}"
        for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "FSSPEC_SFTP_PASSWORD", "WANDB_API_KEY")
    }
    others = {"AWS_ACCESS_KEY_ID": "visible", "HF_TOKEN_PATH": "/home/me/token", "TOKEN_X": "abc"}
    for name, value in (secrets | others).items():
        monkeypatch.setenv(name, value)
    for name, secret in secrets.items():
        assert scrub(f"refused: {secret}") == f"refused: ${name}"
    assert scrub(" ".join(others.values())) == " ".join(others.values())


@pytest.mark.parametrize(
    "text",
    [
        "data.shards = a, b; use --source, or https://docs.example.org/page?id=7.",
        "/data/a@b?c=d is not a folder; name <user@host> or 10:30",
        "the token=<|im_end|> of step 5: loss 3.1 // nothing @ all",
    ],
)
def test_a_text_without_urls_is_unchanged(text: str) -> None:
    assert scrub(text) == text


def test_a_variable_removed_by_another_thread_meanwhile_is_no_error() -> None:
    is_over = threading.Event()

    def come_and_go() -> None:
        while not is_over.is_set():
            os.environ["MEGABACK_PASSING"] = "1"
            os.environ.pop("MEGABACK_PASSING", None)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {scrub("nothing secret") for _ in range(3000)} == {"nothing secret"}
    finally:
        is_over.set()
        thread.join()
