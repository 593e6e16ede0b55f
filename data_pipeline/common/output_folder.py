"""A folder that a command writes as a whole: it appears under its name complete, or not at all.

A marker in it names what was written, so that `--overwrite` replaces a folder of ours and never one
to which somebody has added, or in which somebody has changed, something.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.common.atomic import partial_name, write_text
from data_pipeline.common.output_paths import MAKER, is_vacant, read_object, require_apart
from data_pipeline.errors import OutputExistsError

MARKER_NAME = ".megaback.json"


def require_output_folder(
    out: Path, inputs: Iterable[str | Path | None] = (), *, overwrite: bool = False
) -> None:
    """See that a folder may be written whole. Raises OutputExistsError."""
    require_apart(out, inputs)
    if out.is_file() or not is_vacant(out):
        stranger = _stranger_in(out)
        if stranger is not None:
            raise OutputExistsError(
                f"`out` {out} already holds something that megaback did not write ({stranger}); "
                "choose another `out`"
            )
        if not overwrite:
            raise OutputExistsError(
                f"`out` {out} holds an earlier result; add `overwrite` to replace it, or choose "
                "another `out`"
            )


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which gets its name when nothing went wrong, and else is removed.

    Raises OutputExistsError.
    """
    require_output_folder(out, overwrite=overwrite)
    out = out.resolve()
    partial = out.with_name(partial_name(out.name))
    replaced = partial.with_suffix(".replaced")
    try:
        partial.mkdir(parents=True)
        yield partial
        write_text(partial / MARKER_NAME, _marker_of(partial))
        require_output_folder(out, overwrite=overwrite)  # as it is by now
        if out.is_dir() and any(out.iterdir()):
            os.replace(out, replaced)
        elif out.is_dir():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        error.filename = error.filename or str(out)  # a full disk does not say where it is
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.is_dir() and not out.exists():  # its successor did not get its name
            os.replace(replaced, out)
        shutil.rmtree(replaced, ignore_errors=True)


def _marker_of(folder: Path) -> str:
    fields = {"made_by": MAKER, "file_bytes": _sizes(folder)}
    return json.dumps(fields, indent=1) + "\n"


def _sizes(folder: Path) -> dict[str, int]:
    """Size of every file below a folder but the marker, in bytes."""
    return {
        str(path.relative_to(folder)): path.lstat().st_size
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or not path.is_dir()) and path != folder / MARKER_NAME
    }


def _stranger_in(out: Path) -> str | None:
    """Something there that is not as we wrote it; None for a folder that is ours as a whole."""
    if not out.is_dir():
        return "a file"
    marker = read_object(out / MARKER_NAME) or {}
    written = marker.get("file_bytes")
    if marker.get("made_by") != MAKER or not isinstance(written, dict):
        return next(path.name for path in sorted(out.iterdir()))
    for name, num_bytes in _sizes(out).items():
        if written.get(name) != num_bytes:
            return f"{name}, which has been {'changed' if name in written else 'added'}"
    return None
