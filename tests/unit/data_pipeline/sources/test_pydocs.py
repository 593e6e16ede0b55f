"""Documents from the documentation of an installation, and their reproducibility."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import SourceEmptyError, SourceUnreadableError
from data_pipeline.sources import pydocs
from data_pipeline.sources.documents import Document
from data_pipeline.sources.pydocs import list_pydocs_slices, read_pydocs_slice
from tests.helpers.cpu_time import grows_linearly

PROSE = "This sentence explains number %d at some length, as good documentation always does."

MODULE = f'''"""A module that is documented.

{PROSE % 1}
{PROSE % 2}

.. table:: of things

>>> prose("{PROSE % 3}")
3
"""


class Reader:
    """Reads the things that the writer has written, whatever they were called there.

    Args:
        path (str): {PROSE % 4}
    """

    def read(self, path):
        """Do :meth:`Reader.other` with ``care``, as `the guide <https://a.b>`_ wants it.

        {PROSE % 5}
        {PROSE % 6}
        """
        return "{PROSE % 7}"


NOTE = """
{PROSE % 8} {PROSE % 9}
"""
'''


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of the standard library, without topics."""
    paths = dict.fromkeys(("stdlib", "purelib", "platlib"), str(tmp_path))
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths)
    monkeypatch.setattr(pydocs, "_topics", dict)
    pydocs._module_files.cache_clear()
    yield tmp_path
    pydocs._module_files.cache_clear()


def read_all() -> list[Document]:
    return [document for piece in list_pydocs_slices() for document in read_pydocs_slice(piece)]


def write_module(path: Path, *numbers: int) -> None:
    text = "\n\n".join(PROSE % number for number in numbers)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""{text}"""\n')


def test_a_module_is_one_document_with_headings_and_sentences(installation: Path) -> None:
    (installation / "pack").mkdir()
    (installation / "pack" / "__init__.py").write_text(MODULE)
    (document,) = read_all()
    entries = (
        f"pack\n{PROSE % 1} {PROSE % 2}",
        "Reader\nReads the things that the writer has written, whatever they were called there.\n"
        f"{PROSE % 4}",
        f"Reader.read\nDo Reader.other with care, as the guide wants it.\n{PROSE % 5} {PROSE % 6}",
        f"pack\n{PROSE % 8} {PROSE % 9}",
    )
    assert document == Document("\n\n".join(entries), "pack")


def test_a_module_is_not_imported(installation: Path) -> None:
    path = installation / "explosive.py"
    write_module(path, *range(9))
    path.write_text(path.read_text() + "raise SystemExit('imported')\n")
    assert [document.position for document in read_all()] == ["explosive"]


def test_a_module_with_little_prose_is_skipped(installation: Path) -> None:
    write_module(installation / "little.py", 1)
    assert read_all() == []


def test_a_paragraph_is_kept_once(installation: Path) -> None:
    write_module(installation / "a.py", *range(9))
    write_module(installation / "b.py", *range(18))
    _, second = read_all()
    assert second.text == "\n".join(["b", *(PROSE % number for number in range(9, 18))])


@pytest.mark.parametrize("folder", ["tests", "_vendor", "site-packages", "lib2to3"])
def test_tests_and_vendored_packages_are_skipped(installation: Path, folder: str) -> None:
    write_module(installation / "a.py", *range(9))
    write_module(installation / folder / "b.py", *range(9, 18))
    assert [document.position for document in read_all()] == ["a"]


@pytest.mark.parametrize("ending", [b'"""', b"# \xff"])
def test_an_invalid_source_file_is_skipped(installation: Path, ending: bytes) -> None:
    write_module(installation / "a.py", *range(9))
    with (installation / "a.py").open("ab") as file:
        file.write(ending)
    assert read_all() == []


def test_slices_of_any_size_have_the_same_modules(
    installation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(5):
        write_module(installation / f"{index}.py", *range(9 * index, 9 * index + 9))
    whole = read_all()
    monkeypatch.setattr(pydocs, "_SLICE_BYTES", 1)
    assert (len(list_pydocs_slices()), read_all()) == (5, whole)


def test_a_module_that_changed_since_listing_is_refused(installation: Path) -> None:
    write_module(installation / "a.py", 1)
    (piece,) = list_pydocs_slices()
    write_module(installation / "a.py", 2)
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_pydocs_slice(piece))


def test_an_installation_without_source_files_is_empty(installation: Path) -> None:
    with pytest.raises(SourceEmptyError):
        list_pydocs_slices()


def test_the_topics_of_this_python_are_documents() -> None:
    topics = next(piece for piece in list_pydocs_slices() if piece.path == "topics")
    names = [document.position for document in read_pydocs_slice(topics)]
    assert "pydoc topic exceptions" in names


def test_documents_of_this_python_are_reproducible() -> None:
    piece = list_pydocs_slices()[1]
    assert list(read_pydocs_slice(piece)) == list(read_pydocs_slice(piece)) != []


@pytest.mark.parametrize("part", ["[", " [a", ":a", "[a]("])
def test_a_docstring_of_brackets_or_colons_takes_linear_time(installation: Path, part: str) -> None:
    def read(size: int) -> None:
        (installation / "a.py").write_text(f'"""A word. {part * size} word."""\n')
        assert read_all() is not None

    assert grows_linearly(read, 3000)
