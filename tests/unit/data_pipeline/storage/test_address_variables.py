"""Secrets of addresses, stored in environment variables."""

import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.redaction import MASK, REFERENCE, scrub, shown_url
from data_pipeline.storage.address_variables import expanded, kept, kept_in

SIGNED = "https://user:hunter22@host/x.jsonl?id=7&sig=abcdefgh1"


def test_a_kept_address_has_no_secrets_and_expands_to_the_original() -> None:
    address = kept(SIGNED)
    assert "hunter22" not in address
    assert "abcdefgh1" not in address
    assert address.startswith("https://${MEGABACK_SECRET_")
    assert "x.jsonl?id=7&${MEGABACK_SECRET_" in address
    assert expanded(address) == SIGNED
    assert kept(address) == address
    assert shown_url(address) == "https://host/x.jsonl?id=7"
    assert scrub("login hunter22, sig abcdefgh1") == f"login {MASK}, sig {MASK}"
    assert all(os.environ[name] in SIGNED for name in re.findall(REFERENCE, address))


def test_a_renewed_signature_has_the_same_variable_in_another_process() -> None:
    one = kept(SIGNED)
    for name in re.findall(REFERENCE, one):
        del os.environ[name]
    assert kept(SIGNED.replace("abcdefgh1", "another-one")) == one


def test_addresses_that_differ_only_in_secrets_are_distinct() -> None:
    one, other = kept("https://host/x?doc=1111111"), kept("https://host/x?doc=2222222")
    assert one != other
    assert (expanded(one), expanded(other)) == (
        "https://host/x?doc=1111111",
        "https://host/x?doc=2222222",
    )


def test_an_existing_variable_is_not_overwritten() -> None:
    name = kept("https://host/x?sig=1").partition("${")[2].rstrip("}")
    os.environ[name] = "mine"
    assert expanded(kept("https://host/x?sig=2")) == "https://host/x?sig=2"
    assert os.environ[name] == "mine"


def test_references_to_variables_of_the_user_are_expanded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address = "https://alice:${MEGABACK_SECRET_LOGIN}@host/x?${MEGABACK_SECRET_SAS}"
    assert kept(address) == address
    with pytest.raises(ConfigError, match=r"^https://alice:.*: the environment variable .*LOGIN"):
        expanded(address)
    monkeypatch.setenv("MEGABACK_SECRET_LOGIN", "pa${MEGABACK_SECRET_SAS}ss")
    monkeypatch.setenv("MEGABACK_SECRET_SAS", "sv=1&sig=abcdefgh1")
    assert expanded(address) == (
        "https://alice:pa${MEGABACK_SECRET_SAS}ss@host/x?sv=1&sig=abcdefgh1"
    )
    assert scrub("abcdefgh1") == MASK


@pytest.mark.parametrize("name", ["HOME", "AWS_SECRET_ACCESS_KEY", "MEGABACK_SERVE_TOKEN"])
def test_references_to_other_variables_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "private")
    address = f"https://evil.example/x?a=${{{name}}}"
    with pytest.raises(ConfigError, match=rf"{name}.*export it as MEGABACK_SECRET_{name}"):
        kept(address)
    assert "private" not in expanded(address)


def test_a_secret_of_one_host_is_not_sent_to_another() -> None:
    address = kept("https://user:hunter22@host/a/b?sig=abcdefgh1")
    assert expanded(address.replace("/a/b", "/c")) == ("https://user:hunter22@host/c?sig=abcdefgh1")
    names = re.findall(REFERENCE, address)
    for other in ("https://evil", "http://host", "https://host:81", "https://host.evil"):
        with pytest.raises(ConfigError, match="belongs to another host"):
            expanded(f"{other}/x?${{{names[0]}}}")


def test_a_secret_next_to_a_reference_is_stored_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGABACK_SECRET_END", "tail")
    address = kept("https://host/x?sig=head${MEGABACK_SECRET_END}")
    assert "head" not in address
    assert expanded(address) == "https://host/x?sig=headtail"


def test_addresses_in_nested_fields_are_kept_and_paths_unchanged() -> None:
    fields = {"a": [{"path": SIGNED}, "/data/${X}?a=b"], "b": 7, "c": None, "d": "a: b"}
    found = kept_in(fields)
    assert "hunter22" not in str(found)
    assert expanded(found["a"][0]["path"]) == SIGNED
    assert {**found, "a": found["a"][1:]} == {**fields, "a": ["/data/${X}?a=b"]}
    assert expanded("/data/${X}") == "/data/${X}"


def test_an_unset_generated_variable_is_reported() -> None:
    with pytest.raises(
        ConfigError, match=r"MEGABACK_SECRET_0 is not set.*address with its secrets"
    ):
        expanded("https://host/x?${MEGABACK_SECRET_0}")


def test_a_character_that_variables_cannot_contain_is_refused() -> None:
    with pytest.raises(ConfigError, match="https://host/x: it contains a character"):
        kept("https://host/x?sig=a\0b")


@given(text=st.text(st.characters(exclude_characters="\0$", exclude_categories=["Cs"])))
def test_expanding_a_kept_address_returns_it(text: str) -> None:
    for address in (f"https://{text}", f"s3://a:{text}@b?c={text}", text):
        assert expanded(kept(address)) == address
