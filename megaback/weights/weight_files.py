"""A model's weights as one or several safetensors files, as Hugging Face lays them out.

One file is `model.safetensors`; several are `model-00001-of-00003.safetensors` and so on, with
`model.safetensors.index.json`, which names the file of each tensor. They are written a tensor at a
time. Their hashes lie apart, in `SHA256SUMS`, and each file's header says that megaback wrote it.
Whoever changes a model writes its files anew and leaves both behind: that is how a changed model is
told from a damaged one.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

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
"""Mark in the header of each file: other programs do not keep it when they write the file anew."""
_LOG = logging.getLogger("megaback.weights")


def num_bytes_of(spec: Spec) -> int:
    """Bytes of a tensor."""
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
    """Write tensors in order, in files of at most `max_file_bytes` of data or of one tensor.

    The SHA-256 of each file is written too. Raises OSError.
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
    """Write the SHA-256 of files as `sha256sum -c SHA256SUMS` reads it."""
    lines = [f"{sha256}  {name}\n" for name, sha256 in sums.items()]
    write_text(folder / SUMS_NAME, "".join(lines))


def read_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of files by their names; empty where nobody wrote them down.

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
    """The tensors of a folder, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises CheckpointCorruptError when a file is missing or cut short."""
        self.names = self._names_of_files(folder)
        """The files."""
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
                raise ValueError("it names no file")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"{index} is not an index of weights ({error}); convert them again"
            ) from None
        if (folder / WEIGHTS_NAME).is_file() and not any((folder / n).is_file() for n in names):
            return [WEIGHTS_NAME]  # whoever saved one file in place of several left the index
        return names

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        for name, file in self._files.items():
            yield name, file.entries[name].shape

    def read(self, name: str) -> Tensor:
        """Raises KeyError when there is no such tensor, and CheckpointCorruptError."""
        return self._files[name].tensor(name)

    def verify(self, sums: Mapping[str, str]) -> None:
        """Compare files with their SHA-256. Another program's file that has it is ours after all.

        Raises CheckpointCorruptError for a file that megaback wrote and that has another one.
        """
        for name in self.names:
            if name not in sums:
                continue
            if size_and_hash(self._folder / name)[1] == sums[name]:
                self.changed = [other for other in self.changed if other != name]
            elif name not in self.changed:
                raise CheckpointCorruptError(
                    f"the model {self._folder} is damaged: {name} is not the file that was "
                    "written; restore it, or convert the model again"
                )

    def report_changed(self) -> None:
        """Log which files another program has written, once for all ranks."""
        if self.changed and os.environ.get("RANK", "0") == "0":
            _LOG.warning("%s", changed_sentence(self._folder, self.changed))


def changed_sentence(folder: Path, changed: list[str]) -> str:
    """What a person is told about files that are read though megaback did not write them."""
    shown = changed[0] if len(changed) == 1 else f"{changed[0]} and {len(changed) - 1} other files"
    return (
        f"megaback: note: {folder} was changed since megaback wrote it (another program wrote "
        f"{shown}); its weights are used as they are, without a hash to compare them with"
    )


def _require_new(path: Path, twice: set[str]) -> None:
    """Raise unless a file holds no tensor that another one of the model has already given."""
    if twice:
        raise CheckpointCorruptError(
            f"{path} holds {min(twice)}, and so does another file of this model; which of them is "
            "meant cannot be told: save the model once more, into an empty folder"
        )


def _require_no_others(folder: Path, names: Sequence[str]) -> None:
    """Raise if there are more files of weights, by the names that weights have, than are read."""
    others = sorted(
        path.name
        for pattern in ("model*.safetensors", "adapter_model*.safetensors")
        for path in folder.glob(pattern)
        if path.name not in names
    )
    if others:
        raise CheckpointCorruptError(
            f"{folder} holds {others[0]} beside {names[0]}, and only the latter would be read; "
            "merge an adapter into its model, or remove what is not meant"
        )
