"""Secrets are removed from reports of libraries and from click's errors."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from megaback.cli import main

PLANT = "S3CR3T-plant"
PROGRAM = f"""
import logging, threading, warnings
from data_pipeline.common.console import protect_console
from data_pipeline.storage.address_variables import kept
from data_pipeline.errors import StorageError

protect_console()
protect_console()
address = "https://user:{PLANT}@host.org/x?sig={PLANT}2"
kept(address)
logging.getLogger("a.driver").warning("retrying %s: %d", address, 403)
logging.getLogger("a.driver").warning("retrying %d", "not a number")
warnings.warn(f"login {PLANT} of {{address}} is old", UserWarning)
error = StorageError(f"cannot read {{address}}")

def fail():
    raise OSError(f"thread: {{address}}")

thread = threading.Thread(target=fail)
thread.start()
thread.join()
try:
    fail()
except OSError as cause:
    raise RuntimeError(f"defect: {{error}}, {PLANT}2") from cause
"""


def test_logs_warnings_and_tracebacks_are_scrubbed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == 1
    assert PLANT not in output.replace(f'kept("{PLANT}")', "")
    for part in (
        *("retrying https://host.org/x: 403", "UserWarning: login *** of https://host.org/x"),
        *("OSError: thread: https://host.org/x", "The above exception was the direct cause"),
        "RuntimeError: defect: cannot read https://host.org/x, ***",
    ):
        assert part in output


@pytest.mark.parametrize(
    "words",
    [
        ("shards", "build", f"--sauce=https://user:{PLANT}@host/x"),
        ("shards", "inspect", "a", f"https://host/x?sig={PLANT}"),
        ("shards", f"https://host/x?sig={PLANT}"),
        (f"https://host/x?sig={PLANT}",),
        ("shards", "build", "--source", "a", "--tasks", f"https://host/x?sig={PLANT}"),
        ("shards", "verify", f"https://user:{PLANT}@host/x"),
        ("train", f"https://user:{PLANT}@host/x.yaml"),
        ("train", "configs/demo.yaml", f"training.seed=https://host/x?sig={PLANT}"),
        ("train", "configs/demo.yaml", f"https://host/x?{PLANT}"),
    ],
)
def test_usage_errors_quote_no_secrets(words: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, words)
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit)
    assert PLANT not in done.output
    assert "host/x" in done.output or "--sauce" in done.output
