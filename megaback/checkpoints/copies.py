"""Reading of copies of checkpoints, whose metadata is checked like that of local ones."""

from pathlib import Path

from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints.checkpoint import CheckpointMeta, parse_meta
from megaback.copy_location import CopyLocation
from megaback.run_folder import META_NAME


class CheckpointCopies(CopyLocation):
    """Copies of a run's checkpoints."""

    def meta(self, folder: str) -> CheckpointMeta:
        """Metadata of a complete copy. Raises CheckpointCorruptError, OSError."""
        return self._parsed(self.meta_text(folder), folder)

    def get_meta(self, folder: str, target: Path) -> CheckpointMeta:
        """Fetch the meta.json of a complete copy into an existing local folder.

        Raises CheckpointCorruptError, OSError.
        """
        text = self.meta_text(folder)
        meta = self._parsed(text, folder)
        (target / META_NAME).write_bytes(text)
        return meta

    def get(
        self, folder: str, target: Path, meta: CheckpointMeta, part: int = 0, parts: int = 1
    ) -> None:
        """Fetch every `parts`-th file of a copy, as `verify_files` verifies them.

        Raises CheckpointCorruptError, OSError.
        """
        self._files.invalidate_cache()
        for name in sorted(meta.files)[part::parts]:
            path, num_bytes = self.path(folder, name), meta.files[name][0]
            found = self._files.size(path) if self._files.exists(path) else "no"
            if found not in (num_bytes, None):
                raise CheckpointCorruptError(
                    f"{name} of {folder} in {self.name} has {found} bytes, not {num_bytes:,}"
                )
            self._files.get_file(path, str(target / name))

    def _parsed(self, text: bytes, folder: str) -> CheckpointMeta:
        try:
            return parse_meta(text, folder)
        except ValueError as error:
            raise CheckpointCorruptError(
                f"{META_NAME} of {folder} in {self.name} is not the metadata of a checkpoint "
                f"({error})"
            ) from None
