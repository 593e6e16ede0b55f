"""A process of our own, and a program that imports megaback as a library."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_REPORT = "import atexit, gc\natexit.register(lambda: print('frozen', gc.get_freeze_count() > 0))\n"


@pytest.mark.parametrize(
    ("words", "frozen"),
    [(("-m", "megaback", "--help"), True), (("-c", "import megaback"), False)],
    ids=["command", "library"],
)
def test_only_our_own_process_skips_the_collections_of_its_teardown(
    words: tuple[str, ...], frozen: bool, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_REPORT)

    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.splitlines()[-1] == f"frozen {frozen}"
