"""Branches of horizons that began from steps which a rollback of their trunk has excluded since."""

from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.faults.exit_record import read_history
from megaback.faults.run_state import ROLLBACK_EVENT
from megaback.horizons import horizons_of


def require_no_rolled_back_branch(config: Config) -> None:
    """Raises ConfigError for a branch that is no longer one of its trunk."""
    rollbacks = [line for line in read_history(config.run) if line.get("event") == ROLLBACK_EVENT]
    for horizon in horizons_of(config):
        run = horizon.run(config.run)
        began = next(iter(read_history(run)), None)
        for line in rollbacks:
            is_later = began is not None and line["time"] > began["time"]
            if is_later and line["step"] < horizon.branch_step:
                raise ConfigError(
                    f"optimizer.decay_at: {run} began at step {horizon.branch_step:,} of the "
                    f"trunk, before it was rolled back to step {line['step']:,}; move the branch "
                    "to another place, and it is trained again"
                )
