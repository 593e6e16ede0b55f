"""Trying again: which errors pass, and how long is waited."""

import pytest

from data_pipeline import retries


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
