"""Inspection of a GGUF file: its metadata, and verification by its SHA-256."""

from pathlib import Path
from typing import Any

from data_pipeline.common.regular_files import open_file
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError

_MAGIC = b"GGUF"


def inspect_gguf(path: Path, *, verify: bool) -> tuple[dict[str, Any], str]:
    """Facts of a file, and the checks that were made; with `verify`, of its hash.

    Raises CheckpointCorruptError, CheckpointMissingError.
    """
    with open(open_file(path), "rb") as file:  # noqa: PTH123 (a descriptor)
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise CheckpointCorruptError(f"{path} is not a GGUF file; convert the model again")
    facts: dict[str, Any] = {"file_bytes": path.stat().st_size}
    checked = "the magic bytes of a GGUF file"
    try:
        import gguf
    except ImportError:
        checked += "; more with `pip install 'megaback[gguf]'`"
    else:
        try:
            reader = gguf.GGUFReader(path)
            facts |= {
                key.rpartition(".")[2]: stored.contents()
                for key, stored in reader.fields.items()
                if key.startswith(("general.architecture", "general.name", "megaback."))
            }
        except Exception as error:  # noqa: BLE001 - the library raises errors of many types
            reason = " ".join(str(error).split())
            raise CheckpointCorruptError(
                f"{path} is truncated or corrupted ({reason}); convert the model again"
            ) from None
        facts["tensors"] = len(reader.tensors)
        checked = "its metadata and the offsets of its tensors"
    if verify:
        _require_hash(path)
        checked = "by its hash in SHA256SUMS"
    return facts, checked


def _require_hash(path: Path) -> None:
    from megaback.checkpoints.safetensors_file import size_and_hash
    from megaback.run_folder import SUMS_NAME
    from megaback.weights.weight_files import read_sums

    sums = path.with_name(SUMS_NAME)
    if not sums.is_file():
        raise CheckpointMissingError(
            f"{sums} is missing, so {path.name} cannot be verified; convert the model again"
        )
    if read_sums(path.parent).get(path.name) != size_and_hash(path)[1]:
        raise CheckpointCorruptError(
            f"{path} does not match its hash in {SUMS_NAME}; convert the model again"
        )
