"""Models on the Hugging Face hub: some of their files, at one commit, in the hub's own cache.

Access is that of the hub's library: its login, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE`.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.interrupts import interruptible
from data_pipeline.common.packages import require_package
from data_pipeline.errors import MegabackError, SourceMissingError, SourceUnreadableError
from data_pipeline.redaction import is_url, shown_url
from data_pipeline.storage.retries import reason_of, require_hub, with_retries

_FORM = "hf://OWNER/NAME or hf://OWNER/NAME@REVISION"
_ADDRESS = re.compile(
    r"(?:hf:(?://)?(?:models/)?|https?://(?:www\.)?huggingface\.co/)"
    r"(?P<name>[\w.-]+/[\w.-]+)(?:(?:@|/(?:tree|blob)/)(?P<revision>[^@?#]+?))?/?"
)


@dataclass(frozen=True)
class HubModel:
    """A model at a commit of its repository."""

    name: str
    commit: str
    folder: Path
    """Folder of the cache with its files, as far as they were fetched."""

    @property
    def address(self) -> str:
        return f"hf://{self.name}@{self.commit}"


def is_remote_model(given: str) -> bool:
    """Whether a model is given by an address instead of a path."""
    return given.startswith("hf:") or is_url(given)


def fetch_model(given: str, names: Sequence[str]) -> HubModel:
    """Fetch files with these names or patterns, those that the repository has.

    Raises SourceMissingError, SourceUnreadableError, BackendError.
    """
    found = _ADDRESS.fullmatch(given)
    shown = shown_url(given)
    if found is None:
        raise SourceMissingError(
            f"{shown} is not the address of a model on the Hugging Face hub; write {_FORM}, or "
            "fetch its folder and name that"
        )
    require_package("huggingface_hub", shown)
    name, revision = found["name"], found["revision"]
    from huggingface_hub import constants

    def fetch() -> Path:
        if not constants.HF_HUB_OFFLINE:
            require_hub()
        return _snapshot(name, revision, names)

    try:
        folder = fetch() if constants.HF_HUB_OFFLINE else with_retries(shown, fetch)
    except MegabackError:
        raise
    except Exception as error:  # noqa: BLE001 - errors of network libraries
        raise _error_of(error, shown, revision) from None
    return HubModel(name, folder.name, folder)


def _snapshot(name: str, revision: str | None, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    # In a thread, since Ctrl-C would wait for the end of downloads.
    found: Any = interruptible(
        snapshot_download, name, revision=revision, allow_patterns=list(names)
    )
    return Path(found)


def _error_of(error: Exception, shown: str, revision: str | None) -> MegabackError:
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, RevisionNotFoundError):
        return SourceMissingError(
            f"{shown}: it has no revision {revision}; name a branch or commit"
        )
    if isinstance(error, RepositoryNotFoundError):
        return SourceMissingError(
            f"{shown}: no such model on the hub, or no permission to read it; check the name, and "
            "log in with `hf auth login` if it is gated or private"
        )
    if isinstance(error, LocalEntryNotFoundError):
        return SourceMissingError(
            f"{shown}: it is not in the hub's cache, and the hub is not reached "
            f"({reason_of(error.__cause__ or error)}); check the network and HF_HUB_OFFLINE"
        )
    return SourceUnreadableError(
        f"{shown}: {reason_of(error)}; check the network and the disk of the hub's cache, then run "
        "the command again"
    )
