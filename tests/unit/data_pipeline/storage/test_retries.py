"""Retries: transient errors and waits."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.storage import retries


def test_a_wait_requested_by_the_server_is_respected() -> None:
    outcomes = iter([retries.TransientError("busy", wait_s=0.05)])

    def attempt() -> str:
        for error in outcomes:
            raise error
        return "done"

    policy = retries.RetryPolicy(first_wait_s=0.0001, max_wait_s=0.06)
    with pytest.MonkeyPatch.context() as patch:
        waits: list[float] = []
        patch.setattr(retries, "POLICY", policy)
        patch.setattr("tenacity.nap.time.sleep", waits.append)
        assert retries.with_retries("it", attempt) == "done"
    assert waits == [0.05]


class StatusError(Exception):
    """An error with an HTTP status, as of some drivers."""

    def __init__(self, status: int) -> None:
        super().__init__("it failed")
        self.status = status


class BotoError(Exception):
    """An error with a response in a dictionary, as of botocore."""

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
def test_only_transient_errors_are_retried(error: Exception, passes: bool) -> None:
    assert retries.is_transient(error) == passes


def test_a_status_takes_precedence_over_the_wrapping_error() -> None:
    error = OSError(5, "an error of the driver")
    error.__cause__ = BotoError(403)
    assert not retries.is_transient(error)


def _tries(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    """Number of attempts if every one fails."""
    tries = []

    def attempt() -> None:
        tries.append(1)
        raise error

    monkeypatch.setattr(retries, "POLICY", retries.RetryPolicy())
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with pytest.raises(SourceUnreadableError, match="gave up after"):
        retries.with_retries("it", attempt)
    return len(tries)


def test_unresolved_hosts_have_fewer_attempts_than_lost_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unknown = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    driver = ConnectionError("an error of the driver")
    driver.__cause__ = unknown
    policy = retries.RetryPolicy()
    for error in (unknown, driver, retries.UnresolvedHostError("cannot resolve the host")):
        assert _tries(error, monkeypatch) == policy.max_unresolved_attempts
    for error in (ConnectionResetError(), StatusError(503)):
        assert _tries(error, monkeypatch) == policy.max_attempts


def test_the_resolved_host_is_that_of_the_request(
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


def test_an_unresolved_hub_logs_one_line_per_retry_and_one_error(
    run_megaback: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    direct = {name: text for name, text in os.environ.items() if "proxy" not in name.lower()}
    environment = {**direct, "HF_ENDPOINT": "https://hub.invalid", "HF_HUB_OFFLINE": "0"}
    source = "hf:some/set:config"
    words = ("tokenizer", "train", "--source", source, "--out", tmp_path / "out")
    result = run_megaback(*words, env=environment)
    *waits, error = result.stderr.splitlines()
    assert (result.returncode, len(waits)) == (22, 2)
    start = f"megaback: warning: {source}: cannot resolve the host hub.invalid"
    assert all(line.startswith(start) for line in waits)
    assert "gave up after 3 attempts" in error
