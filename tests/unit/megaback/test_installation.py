"""Other projects' packages that shadow ours."""

from pathlib import Path

import pytest

from megaback.installation import missing_module, sharing_distributions


def test_distributions_with_packages_of_our_names_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, package in (("theirs", "tools"), ("others", "toolset")):
        facts = tmp_path / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (facts / "top_level.txt").write_text(f"{package}\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert sharing_distributions() == ["theirs"]


def test_only_modules_of_our_packages_are_reported_missing() -> None:
    assert missing_module("numpy.absent") is None
    assert "tools.absent" in (missing_module("tools.absent") or "")
