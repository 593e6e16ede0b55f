"""Origin of weights: the identity of other weights, and models that other programs have trained."""

from dataclasses import dataclass

from data_pipeline.common.checked_json import made_from, require_sha256, require_within
from data_pipeline.common.limits import MAX_VOCABULARY


@dataclass(frozen=True, kw_only=True)
class WeightsIdentity:
    """Identity of a checkpoint or a model folder; None for unknown values."""

    path: str
    step: int | None = None
    sha256: str | None = None
    """Hash of the file that lists the hashes of the weights: a checkpoint's meta.json, or a model
    folder's SHA256SUMS. For weights of others it is that of the list which they would have
    (`sha256sum model*.safetensors | sha256sum`); in earlier versions, of their config.json."""
    data: str | None = None
    """Data sets that a checkpoint's run was trained on, and their fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Origin of weights that another program has trained."""

    base: WeightsIdentity
    kind: str
    """Format of its files: `transformers`, or `DeepSpeed` with its kind of checkpoint."""
    added_rows: int = 0
    """Rows added to embeddings and lm_head for markers, each the mean of the others."""

    base_on_hub: str | None = None
    """Name on the Hugging Face hub of the model that its folder says it was made from."""

    @property
    def shown(self) -> str:
        """Path and format."""
        return f"{self.base.path} ({self.kind})"

    @classmethod
    def of_field(cls, value: object) -> "Import | None":
        """From a field of a config.json. Raises ValueError, TypeError."""
        if value is None:
            return None
        imported = made_from(cls, value)
        imported.require_plausible()
        return imported

    def require_plausible(self) -> None:
        """Raises ValueError for values that no import writes."""
        require_within("added_rows", self.added_rows, 0, MAX_VOCABULARY)
        if self.base.sha256 is not None:
            require_sha256("sha256 of a base", self.base.sha256)
