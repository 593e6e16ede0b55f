"""Allowed values of the Host and Origin headers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ServeError
from tools.serving.host_names import read_allowed, refusal

NAMES = read_allowed(["demo.example.org", "Other.example:8443", "[2001:db8::1]"])


@pytest.mark.parametrize(
    ("host", "origins"),
    [
        ("localhost", []),
        ("LOCALHOST:8000", ["http://localhost:8000"]),
        ("127.0.0.1:8000", ["http://127.0.0.1:8000"]),
        ("[::1]:8000", ["http://[::1]:8000"]),
        ("demo.example.org", []),
        ("Demo.Example.Org", ["https://demo.example.org"]),
        ("demo.example.org:444", ["https://demo.example.org:444"]),
        ("demo.example.org", ["https://demo.example.org:444"]),
        # The Host that nginx sends by default.
        ("127.0.0.1:8000", ["https://demo.example.org"]),
        ("other.example:8443", ["https://other.example:8443"]),
        ("[2001:db8::1]", []),
    ],
)
def test_allowed_hosts_and_origins_are_accepted(host: str, origins: list[str]) -> None:
    assert refusal(host, origins, NAMES) is None


@pytest.mark.parametrize(
    ("host", "origins", "words"),
    [
        ("", [], "--allow-host NAME"),
        ("evil.example", [], "--allow-host evil.example, or with a token"),
        ("demo.example.org.evil.example", [], "is not allowed"),
        ("evil-demo.example.org", [], "is not allowed"),
        ("sub.demo.example.org", [], "is not allowed"),
        ("example.org", [], "is not allowed"),
        ("demo.example.org.", [], "is not allowed"),
        ("demoXexample.org", [], "is not allowed"),
        ("other.example", [], "is not allowed"),
        ("other.example:8444", [], "is not allowed"),
        ("evil.example@demo.example.org", [], "is not allowed"),
        ("demo.example.org@evil.example", [], "is not allowed"),
        ("demo.example.org, evil.example", [], "is not allowed"),
        ("demo.example.org:99999", [], "is not allowed"),
        ("demo.example.org:", [], "is not allowed"),
        ("localhost/evil.example", [], "is not allowed"),
        ("localhost", ["null"], "cross-site"),
        ("localhost", [""], "cross-site"),
        ("localhost", ["http://evil.example"], "cross-site"),
        ("localhost:8000", ["http://localhost:9000"], "cross-site"),
        ("localhost", ["http://demo.example.org"], "cross-site"),
        ("localhost", ["https://other.example"], "cross-site"),
        ("localhost", ["https://sub.demo.example.org"], "cross-site"),
        ("localhost", ["https://demo.example.org@evil.example"], "cross-site"),
        ("localhost", ["file://localhost"], "cross-site"),
        ("demo.example.org", ["https://demo.example.org", "https://evil.example"], "cross-site"),
    ],
)
def test_other_hosts_and_origins_are_rejected_with_a_reason(
    host: str, origins: list[str], words: str
) -> None:
    assert words in (refusal(host, origins, NAMES) or "")


@pytest.mark.parametrize(
    "name",
    [
        *("", "*", "*.example.org", ".example.org", "example.org.", "-", "https://example.org"),
        *("example.org/", "a b", "example.org:", "example.org:x", "example.org:65536", "é.org"),
        *("a,b", "[::1", "::1", "user@example.org", "example.org\n"),
    ],
)
def test_only_complete_host_names_can_be_allowed(name: str) -> None:
    with pytest.raises(ServeError, match="is not a host name; give it as in"):
        read_allowed([name])


@given(
    st.text(max_size=40)
    | st.from_regex(r"[a-z.*@:/\[\]]{0,9}demo\.example\.org[a-z.*@:/\[\]]{0,9}", fullmatch=True)
)
def test_no_other_host_matches_an_allowed_one(host: str) -> None:
    is_ours = refusal(host, [], read_allowed(["demo.example.org"])) is None
    name, _, port = host.lower().rpartition(":") if ":" in host else (host.lower(), "", "0")
    assert not is_ours or (name in ("demo.example.org", "localhost", "127.0.0.1", "[::1]"))
    assert not is_ours or port.isdecimal()
