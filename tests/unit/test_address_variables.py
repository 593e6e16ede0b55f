"""Secrets of addresses move to the environment, and come back only where an address is opened."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import redaction
from data_pipeline.address_variables import expanded, kept, kept_in, variables_in
from data_pipeline.errors import ConfigError
from data_pipeline.redaction import MASK, scrub, shown_url

SIGNED = "https://user:hunter22@host/x.jsonl?id=7&sig=abcdefgh1"


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    names, known = dict(os.environ), set(redaction._known)
    yield
    os.environ.clear()
    os.environ.update(names)
    redaction._known.clear()
    redaction._known.update(known)


def test_what_is_kept_of_an_address_has_no_secret_and_opens_the_same() -> None:
    address = kept(SIGNED)
    assert "hunter22" not in address
    assert "abcdefgh1" not in address
    assert address.startswith("https://${MEGABACK_SECRET_")
    assert "x.jsonl?id=7&${MEGABACK_SECRET_" in address
    assert expanded(address) == SIGNED
    assert kept(address) == address
    assert shown_url(address) == "https://host/x.jsonl?id=7"
    assert scrub("login hunter22, sig abcdefgh1") == f"login {MASK}, sig {MASK}"
    assert all(os.environ[name] in SIGNED for name in variables_in([{"path": address}]))


def test_another_signature_has_the_same_name_in_another_process() -> None:
    one = kept(SIGNED)
    for name in variables_in(one):
        del os.environ[name]
    assert kept(SIGNED.replace("abcdefgh1", "another-one")) == one


def test_addresses_that_differ_only_in_secrets_are_kept_apart() -> None:
    one, other = kept("https://host/x?doc=1111111"), kept("https://host/x?doc=2222222")
    assert one != other
    assert (expanded(one), expanded(other)) == (
        "https://host/x?doc=1111111",
        "https://host/x?doc=2222222",
    )


def test_a_variable_that_is_set_already_is_left_alone() -> None:
    name = kept("https://host/x?sig=1").partition("${")[2].rstrip("}")
    os.environ[name] = "mine"
    assert expanded(kept("https://host/x?sig=2")) == "https://host/x?sig=2"
    assert os.environ[name] == "mine"


def test_references_are_those_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "https://alice:${PASSWORD}@host/x?${SAS}"
    assert kept(address) == address
    with pytest.raises(ConfigError, match=r"^https://alice:.*: the environment variable PASSWORD"):
        expanded(address)
    monkeypatch.setenv("PASSWORD", "pa${SAS}ss")
    monkeypatch.setenv("SAS", "sv=1&sig=abcdefgh1")
    assert expanded(address) == "https://alice:pa${SAS}ss@host/x?sv=1&sig=abcdefgh1"
    assert scrub("abcdefgh1") == MASK
    assert variables_in({"data": [address]}) == {"PASSWORD", "SAS"}


def test_a_secret_beside_a_reference_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("END", "tail")
    address = kept("https://host/x?sig=head${END}")
    assert expanded(address) == "https://host/x?sig=headtail"
    assert "END" in variables_in(address)


def test_fields_are_kept_wherever_addresses_stand_and_paths_stay() -> None:
    fields = {"a": [{"path": SIGNED}, "/data/${X}?a=b"], "b": 7, "c": None, "d": "a: b"}
    found = kept_in(fields)
    assert "hunter22" not in str(found)
    assert expanded(found["a"][0]["path"]) == SIGNED
    assert {**found, "a": found["a"][1:]} == {**fields, "a": ["/data/${X}?a=b"]}
    assert expanded("/data/${X}") == "/data/${X}"


def test_a_variable_of_ours_that_is_gone_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"MEGABACK_SECRET_0.*holds what is secret.*whole address"
    ):
        expanded("https://host/x?${MEGABACK_SECRET_0}")


def test_a_character_that_no_variable_can_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="https://host/x: it holds a character"):
        kept("https://host/x?sig=a\0b")


@given(text=st.text(st.characters(exclude_characters="\0$", exclude_categories=["Cs"])))
def test_whatever_is_kept_of_an_address_gives_it_back(text: str) -> None:
    for address in (f"https://{text}", f"s3://a:{text}@b?c={text}", text):
        assert expanded(kept(address)) == address
