"""Paths of the repository, and of the shared inputs that may be beside it."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
