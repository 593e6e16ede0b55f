"""Trying again: which errors pass, and how long is waited."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.storage import retries


def test_a_wait_that_the_server_asks_for_is_kept() -> None:
    outcomes = iter([retries.TransientError("busy", wait_s=0.05)])

    def attempt() -> str:
        for error in outcomes:
            raise error
        return "done"

    policy = retries.RetryPolicy(first_wait_s=0.0001, longest_wait_s=0.06)
    with pytest.MonkeyPatch.context() as patch:
        waits: list[float] = []
        patch.setattr(retries, "POLICY", policy)
        patch.setattr("tenacity.nap.time.sleep", waits.append)
        assert retries.with_retries("it", attempt) == "done"
    assert waits == [0.05]


class StatusError(Exception):
    """As the errors of some drivers: with an HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__("it failed")
        self.status = status


class BotoError(Exception):
    """As botocore's: with an answer in a dictionary."""

    def __init__(self, status: int) -> None:
        super().__init__("it failed")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (StatusError(503), True),
        (StatusError(429), True),
        (StatusError(404), False),
        (BotoError(500), True),
        (BotoError(403), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(5, "Input/output error"), True),
        (FileNotFoundError(2, "No such file"), False),
        (PermissionError(13, "Permission denied"), False),
        (ValueError("nonsense"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, passes: bool) -> None:
    assert retries.is_transient(error) == passes


def test_a_status_counts_more_than_the_error_that_it_was_turned_into() -> None:
    error = OSError(5, "an error of the driver")
    error.__cause__ = BotoError(403)
    assert not retries.is_transient(error)


def _tries(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often an attempt is made that always fails."""
    tries = []

    def attempt() -> None:
        tries.append(1)
        raise error

    monkeypatch.setattr(retries, "POLICY", retries.RetryPolicy())
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with pytest.raises(SourceUnreadableError, match="gave up after"):
        retries.with_retries("it", attempt)
    return len(tries)


def test_a_host_that_cannot_be_found_is_tried_little_and_a_lost_connection_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unknown = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    driver = ConnectionError("an error of the driver")
    driver.__cause__ = unknown
    policy = retries.RetryPolicy()
    for error in (unknown, driver, retries.UnresolvedHostError("cannot find the host")):
        assert _tries(error, monkeypatch) == policy.max_unresolved_attempts
    for error in (ConnectionResetError(), StatusError(503)):
        assert _tries(error, monkeypatch) == policy.max_attempts


def test_the_host_that_is_looked_up_is_the_one_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, _port: asked.append(host))
    retries.require_host("https://hub.example/data")
    monkeypatch.setenv("https_proxy", "http://proxy.example:3128")
    retries.require_host("https://hub.example/data")
    monkeypatch.setenv("no_proxy", ".example")
    retries.require_host("https://hub.example/data")
    assert asked == ["hub.example", "proxy.example", "hub.example"]


def test_a_hub_without_a_network_is_a_line_a_try_and_one_sentence(
    run_megaback: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    direct = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
    environment = {**direct, "HF_ENDPOINT": "https://hub.invalid", "HF_HUB_OFFLINE": "0"}
    source = "hf:some/set:config"
    words = ("tokenizer", "train", "--source", source, "--out", tmp_path / "out")
    result = run_megaback(*words, env=environment)
    *waits, sentence = result.stderr.splitlines()
    assert (result.returncode, len(waits)) == (22, 2)
    start = f"megaback: warning: {source}: cannot find the host hub.invalid"
    assert all(line.startswith(start) for line in waits)
    assert "gave up after 3 tries" in sentence
