"""Output folders that are written atomically.

A marker file lists the written files and their sizes, so that `--overwrite` never replaces a folder
with other or changed files.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_pipeline.common.abandoned import REPLACED_SUFFIX, discard, in_use, remove_abandoned
from data_pipeline.common.atomic import partial_name, write_text
from data_pipeline.common.output_paths import MAKER, is_vacant, read_object, require_apart
from data_pipeline.errors import OutputExistsError

MARKER_NAME = ".megaback.json"


def require_output_folder(
    out: Path, inputs: Iterable[str | Path | None] = (), *, overwrite: bool = False
) -> None:
    """Raises OutputExistsError unless the folder may be written."""
    require_apart(out, inputs)
    if out.is_file() or not is_vacant(out):
        foreign = _foreign_in(out)
        if foreign is not None:
            raise OutputExistsError(
                f"`out` {out} contains files that this command did not write ({foreign}); "
                "choose another `out`"
            )
        if not overwrite:
            raise OutputExistsError(
                f"`out` {out} contains an earlier result; add `overwrite` to replace it, or choose "
                "another `out`"
            )


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` on success and removed on an error.

    Those that killed processes left are removed first. Raises OutputExistsError, also while
    another process writes the folder.
    """
    resolved = out.resolve()
    is_written = remove_abandoned(resolved)
    require_output_folder(out, overwrite=overwrite)
    if is_written:
        raise OutputExistsError(
            f"another process is writing `out` {out}; wait until it has finished, or choose "
            "another `out`"
        )
    out = resolved
    partial = out.with_name(partial_name(out.name))
    replaced = partial.with_suffix(REPLACED_SUFFIX)
    held = ExitStack()
    try:
        partial.mkdir(parents=True)
        held.enter_context(in_use(partial))
        yield partial
        write_text(partial / MARKER_NAME, _marker_of(partial))
        require_output_folder(out, overwrite=overwrite)  # it may have changed meanwhile
        if out.is_dir() and any(out.iterdir()):
            os.replace(out, replaced)
        elif out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        if error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(partial):
            error.filename = str(out)
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.is_dir() and not out.exists():  # the rename of the new folder failed
            os.replace(replaced, out)
        discard(replaced, out)
        held.close()


def _marker_of(folder: Path) -> str:
    fields = {"made_by": MAKER, "file_bytes": _sizes(folder)}
    return json.dumps(fields, indent=1) + "\n"


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder except the marker."""
    return {
        str(path.relative_to(folder)): path.lstat().st_size
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or not path.is_dir()) and path != folder / MARKER_NAME
    }


def _foreign_in(out: Path) -> str | None:
    """A file that is not as megaback wrote it, or None."""
    if not out.is_dir():
        return "it is a file"
    marker = read_object(out / MARKER_NAME) or {}
    written = marker.get("file_bytes")
    if marker.get("made_by") != MAKER or not isinstance(written, dict):
        return next(path.name for path in sorted(out.iterdir()))
    for name, num_bytes in _sizes(out).items():
        if written.get(name) != num_bytes:
            return f"{name} was {'changed' if name in written else 'added'}"
    return None
