"""Check that a resume continues the run of a checkpoint: same batches, same model."""

import re
from pathlib import Path
from typing import Any

from data_pipeline.common.differences import Differences, differing_keys, shown_values
from data_pipeline.errors import RunMismatchError
from data_pipeline.loading.order import require_order_version
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.config import Config, ModelSection
from megaback.config_data import DEFAULT_FORWARD_SHARE
from megaback.config_finetune import FinetuneSection
from megaback.data import Data

# All other keys may change on resume; these determine the batches or the saved state.
_FIXED_KEYS = (
    "model",
    "batch.context_tokens",
    "batch.global_batch_rows",
    "data.rows",
    "data.lanes",
    "data.window_frames",
    "data.forward_share",
    "training.seed",
    "training.precision",
    "optimizer.name",
    "finetune",
)


_MIXTURE_KEY = re.compile(r"data\.weight_positions|data\.shards\[\d+\]\.(?!path$)")


def require_same_run(config: Config, data: Data, target: Path, meta: CheckpointMeta) -> None:
    """Raises RunMismatchError for a resume with other batches or another model."""
    meta.format.require_same(
        data.text_format, f"the checkpoint {target}", f"the run on {config.data.description}"
    )
    require_order_version(meta.order_version, str(target))
    before, now = (_with_defaults(one) for one in (meta.config, config.model_dump(mode="json")))
    if meta.data_fingerprint != data.fingerprint:
        mixture = differing_keys(before, now, ("data.weight_positions", "data.shards"))
        _require_none(config, {key: mixture[key] for key in mixture if _MIXTURE_KEY.match(key)})
        raise RunMismatchError(
            f"{target} was trained on shards {meta.data_fingerprint[:12]}, but "
            f"{config.data.description} has {data.fingerprint[:12]}; "
            "use the same shards, or another run folder"
        )
    _require_none(config, differing_keys(before, now, _FIXED_KEYS))
    if config.validation.patience is not None:
        subset = differing_keys(before, now, ("validation.tokens",))
        _require_none(config, subset, ", and the best val loss was measured on that")
    if config.data.depends_on_length:
        length = differing_keys(before, now, ("training.steps", "training.epochs"))
        _require_none(config, length, ", on which weights by fraction of training depend")


def _require_none(config: Config, differing: Differences, reason: str = "") -> None:
    """Raises RunMismatchError that names the differences."""
    if differing:
        has = "the same value" if len(differing) == 1 else "the same values"
        raise RunMismatchError(
            f"the run {config.run} began with {shown_values(differing, 0)}, and the config has "
            f"{shown_values(differing, 1)}{reason}; use {has}, or another run folder"
        )


def _with_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """A config with defaults explicit: `null`, or a key of a later version, may equal the other's
    value."""
    model = ModelSection.model_validate(fields["model"]).resolved()
    share = fields["data"].get("forward_share") or DEFAULT_FORWARD_SHARE
    finetune = FinetuneSection.model_validate(fields.get("finetune", {}))
    return fields | {
        "finetune": finetune.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "data": {
            "rows": "stream",
            "weight_positions": "fraction",
            **fields["data"],
            "forward_share": share,
        },
    }
