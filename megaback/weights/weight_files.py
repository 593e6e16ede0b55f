"""Weight files of a model in Hugging Face's layout: one or several safetensors files.

One file is `model.safetensors`; several are `model-00001-of-00003.safetensors` and so on, with
`model.safetensors.index.json`, which maps each tensor to its file. They are written tensor by
tensor. Hashes are in a separate file, `SHA256SUMS`, and each header has a mark of megaback. Another
program that changes a model rewrites its files without the mark, which distinguishes a changed
model from a damaged one.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.common.atomic import write_text
from data_pipeline.common.checked_json import read_json
from data_pipeline.common.file_names import path_within
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints.safetensors_file import Spec, TensorFile, size_and_hash, write_tensors
from megaback.run_folder import INDEX_NAME, SUMS_NAME, WEIGHTS_NAME, part_of_weights

_FORM_OF_NAMES = re.compile(r".+\.safetensors")
_MAX_SUMS_BYTES = 1 << 20
_MARK = {"written_by": "megaback"}
"""Mark in the header of each file, which other programs drop when they rewrite the file."""
_LOG = logging.getLogger("megaback.weights")


def num_bytes_of(spec: Spec) -> int:
    """Size of a tensor, in bytes."""
    dtype, shape = spec
    num_bytes = dtype.itemsize
    for length in shape:
        num_bytes *= length
    return num_bytes


def write_weights(
    folder: Path,
    specs: Mapping[str, Spec],
    tensor_of: Callable[[str], Tensor],
    max_file_bytes: int,
) -> None:
    """Write tensors in order, and the SHA-256 of each file. Raises OSError.

    A file has at most `max_file_bytes` of data, or one tensor.
    """
    groups: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + num_bytes_of(spec) > max_file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += num_bytes_of(spec)
    count = len(groups)
    names = [WEIGHTS_NAME]
    if count > 1:
        names = [part_of_weights(number, count) for number in range(1, count + 1)]
    files = {
        name: write_tensors(folder / name, group, tensor_of, _MARK)
        for name, group in zip(names, groups, strict=True)
    }
    if count > 1:
        index = {
            "metadata": {"total_size": sum(map(num_bytes_of, specs.values()))},
            "weight_map": {
                tensor: name for name, group in zip(names, groups, strict=True) for tensor in group
            },
        }
        write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    write_sums(folder, {name: sha256 for name, (_, sha256) in files.items()})


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write the SHA-256 of files, in the format of `sha256sum -c SHA256SUMS`."""
    write_text(folder / SUMS_NAME, text_of_sums(sums))


def text_of_sums(sums: Mapping[str, str]) -> str:
    """Content of a SHA256SUMS."""
    return "".join(f"{sha256}  {name}\n" for name, sha256 in sums.items())


def read_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of files by name; empty without a SHA256SUMS.

    Raises CheckpointCorruptError.
    """
    path = folder / SUMS_NAME
    try:
        lines = read_file(path, _MAX_SUMS_BYTES).decode().splitlines()
        pairs = [line.split(maxsplit=1) for line in lines]
        return {name.removeprefix("*"): sha256 for sha256, name in pairs}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointCorruptError(
            f"{path} is not a list of SHA-256 sums and names ({error}); convert the model again"
        ) from None


class StoredWeights:
    """Reader of the tensors of a model folder."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises CheckpointCorruptError if a file is missing or truncated."""
        self.names = self._names_of_files(folder)
        """Names of the files."""
        self.changed: list[str] = []
        """Files that another program has written."""
        self._folder = folder
        self._files: dict[str, TensorFile] = {}
        for name in self.names:
            path = folder / name
            if not path.is_file():
                raise CheckpointCorruptError(
                    f"the model {folder} is damaged: {name} is missing; restore it, or convert the "
                    "model again"
                )
            file = TensorFile(path)
            _require_new(path, self._files.keys() & file.entries.keys())
            self._files |= dict.fromkeys(file.entries, file)
            if not _MARK.items() <= file.metadata.items():
                self.changed.append(name)
        _require_no_others(folder, self.names)

    @staticmethod
    def _names_of_files(folder: Path) -> list[str]:
        index = folder / INDEX_NAME
        if not index.is_file():
            return [WEIGHTS_NAME]
        try:
            weight_map = read_json(index)["weight_map"]
            names = sorted(set(weight_map.values()))
            for name in names:
                path_within(folder, name, _FORM_OF_NAMES)
            if not names:
                raise ValueError("it lists no file")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"{index} is not an index of weights ({error}); convert the model again"
            ) from None
        if (folder / WEIGHTS_NAME).is_file() and not any((folder / n).is_file() for n in names):
            return [WEIGHTS_NAME]  # several files were replaced by one, and the index was left
        return names

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        for name, file in self._files.items():
            yield name, file.entries[name].shape

    def read(self, name: str) -> Tensor:
        """Read a tensor. Raises KeyError if there is none, and CheckpointCorruptError."""
        return self._files[name].tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor. Raises CheckpointCorruptError for one that cannot be read."""
        return self._files[name].dtype(name)

    def verify(self, sums: Mapping[str, str], part: int = 0, parts: int = 1) -> None:
        """Verify the SHA-256 of files. A file that matches does not count as changed.

        Of several ranks, each verifies every `parts`-th file, and those that may have changed, on
        which all must agree. Raises CheckpointCorruptError for a file of megaback that does not
        match.
        """
        own = {*self.names[part::parts], *self.changed}
        for name in self.names:
            if name not in sums or name not in own:
                continue
            if size_and_hash(self._folder / name)[1] == sums[name]:
                self.changed = [other for other in self.changed if other != name]
            elif name not in self.changed:
                raise CheckpointCorruptError(
                    f"the model {self._folder} is damaged: {name} is not the file that was "
                    "written; restore it, or convert the model again"
                )

    def report_changed(self) -> None:
        """Log the files that another program has written, once for all ranks."""
        if self.changed and os.environ.get("RANK", "0") == "0":
            _LOG.warning("%s", changed_sentence(self._folder, self.changed))


def changed_sentence(folder: Path, changed: list[str]) -> str:
    """Note for the user about files that another program has written."""
    shown = changed[0] if len(changed) == 1 else f"{changed[0]} and {len(changed) - 1} other files"
    return (
        f"{folder} was changed since megaback wrote it (another program wrote "
        f"{shown}); its weights cannot be verified by a hash"
    )


def _require_new(path: Path, twice: set[str]) -> None:
    """Raise CheckpointCorruptError if a file has tensors that another file has too."""
    if twice:
        raise CheckpointCorruptError(
            f"{path} contains {min(twice)}, and so does another file of this model; save the model "
            "again, into an empty folder"
        )


def _require_no_others(folder: Path, names: Sequence[str]) -> None:
    """Raise CheckpointCorruptError if the folder has weight files that are not read."""
    others = sorted(
        path.name
        for pattern in ("model*.safetensors", "adapter_model*.safetensors")
        for path in folder.glob(pattern)
        if path.name not in names
    )
    if others:
        raise CheckpointCorruptError(
            f"{folder} contains {others[0]} beside {names[0]}, but only the latter would be read; "
            "merge an adapter into its model, or remove the file that is not needed"
        )
