"""Packages that are not installed are named, with the command that installs them."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from data_pipeline.common import packages
from data_pipeline.common.packages import is_installed, require_package
from data_pipeline.errors import BackendError
from data_pipeline.sources.registry import list_slices


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package can be found."""
    monkeypatch.setattr(packages, "find_spec", lambda _: None)


def test_modules_are_found_without_being_loaded() -> None:
    assert is_installed("this") is True
    assert is_installed("absent") is False
    assert is_installed("absent.part") is False


def test_a_module_without_a_spec_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> ModuleSpec | None:
        raise ValueError(f"{name}.__spec__ is None")

    monkeypatch.setattr(packages, "find_spec", refuse)
    assert is_installed("__main__")


def test_an_absent_package_is_named_with_its_use(bare: None) -> None:
    with pytest.raises(BackendError, match=r"a picture needs x.* `pip install 'y\[z\]'`, or wait"):
        require_package("x", "a picture", "'y[z]'", ", or wait")


@pytest.mark.parametrize(("suffix", "package"), [("parquet", "pyarrow"), ("hub", "datasets")])
def test_a_source_names_the_package_that_it_needs(
    suffix: str, package: str, tmp_path: Path, bare: None
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    source = {"parquet": str(tmp_path / "a.parquet"), "hub": "hf:someone/texts"}[suffix]
    with pytest.raises(BackendError, match=f"needs {package}.*pip install {package}"):
        list_slices(source)
