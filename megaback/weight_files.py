"""A model's weights as one or several safetensors files, as Hugging Face lays them out.

One file is `model.safetensors`; several are `model-00001-of-00003.safetensors` and so on, with
`model.safetensors.index.json`, which names the file of each tensor. They are written a tensor at a
time.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.command import write_text
from data_pipeline.errors import CheckpointCorruptError
from megaback.tensor_file import SizeAndHash, Spec, size_and_hash, write_tensors

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


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
    most_file_bytes: int,
) -> dict[str, SizeAndHash]:
    """Write tensors in order, in files of at most so many bytes of data or of one tensor.

    Returns the bytes and SHA-256 of each file. Raises OSError.
    """
    groups: list[dict[str, Spec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if groups[-1] and size + num_bytes_of(spec) > most_file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += num_bytes_of(spec)
    count = len(groups)
    names = [WEIGHTS_NAME]
    if count > 1:
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    files = {
        name: write_tensors(folder / name, group, tensor_of)
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
    return files


class StoredWeights:
    """The tensors of a folder, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises CheckpointCorruptError when a file is missing or cut short."""
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        names = self._names_of_files(folder)
        _require_no_others(folder, names)
        for name in names:
            try:
                file: Any = safe_open(folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointCorruptError(
                    f"cannot read the weights {folder / name}: {error}; convert them again"
                ) from None
            _require_new(folder / name, self._files.keys() & set(file.keys()))
            self._files |= dict.fromkeys(file.keys(), file)

    @staticmethod
    def _names_of_files(folder: Path) -> list[str]:
        index = folder / INDEX_NAME
        if not index.is_file():
            return [WEIGHTS_NAME]
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            if any(not isinstance(name, str) or Path(name).name != name for name in names):
                raise ValueError("it names files elsewhere")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"{index} is not an index of weights ({error}); convert them again"
            ) from None
        return names

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""
        for name, file in self._files.items():
            yield name, tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Raises KeyError when there is no such tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


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


def verify_weights(folder: Path, files: Mapping[str, SizeAndHash]) -> None:
    """Compare sizes and hashes. Raises CheckpointCorruptError."""
    for name, expected in files.items():
        path = folder / name
        found = size_and_hash(path) if path.is_file() else None
        if found != expected:
            what = "is missing" if found is None else "is not the file that was written"
            raise CheckpointCorruptError(
                f"the model {folder} is damaged: {name} {what}; convert it again"
            )
