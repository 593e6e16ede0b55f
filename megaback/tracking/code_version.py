"""Version of the running code: the package's and, in a checkout, its commit and changes."""

import subprocess
import sys
from typing import Any

from megaback import __version__
from megaback.installation import ROOT


def code_version() -> dict[str, Any]:
    """Versions, and in a checkout `commit`, `is_changed` since it, and `untracked` files."""
    version: dict[str, Any] = {"megaback": __version__, "python": sys.version.split()[0]}
    if not (ROOT / ".git").exists():
        return version
    commit, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    if commit is None or status is None:
        return version
    lines = status.splitlines()
    return version | {
        "commit": commit.strip(),
        "is_changed": any(not line.startswith("??") for line in lines),
        "untracked": [line[3:] for line in lines if line.startswith("??")],
    }


def code_changes() -> str:
    """Diff since the commit; empty outside a checkout."""
    return (_git("diff", "HEAD") or "") if (ROOT / ".git").exists() else ""


def _git(*words: str) -> str | None:
    """Output of a git command in the checkout; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
