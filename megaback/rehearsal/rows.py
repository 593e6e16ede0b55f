"""Check that the rows of all ranks are a step's rows, each once. Loads no torch and no rows."""

import numpy as np

from data_pipeline.loading.loader import TrainingLoader
from megaback.config import Config
from megaback.open_shards import open_shards
from megaback.rehearsal.report import RowsCheck


def check_rows(config: Config, world_size: int, steps: int) -> RowsCheck:
    """Compare the rows of every rank with those of one process that reads all of them.

    Raises the errors of data sets, and BatchError.
    """
    batch = config.batch
    shards = open_shards(config.data)
    streams = shards.streams(batch, config.training.seed)
    mixture = shards.mixed(batch, config.training, streams).mixture

    def loader(rank: int, ranks: int) -> TrainingLoader:
        return TrainingLoader(streams, mixture, batch.global_batch_rows, rank, ranks, 1)

    whole = loader(0, 1)
    groups = batch.row_groups(world_size)
    ranks = [loader(group, groups) for group in range(groups)]
    problems = []
    for step in range(steps):
        expected = np.stack(whole.places(step))
        found = np.concatenate([np.stack(one.places(step)) for one in ranks], axis=1)
        if not np.array_equal(found, expected):
            problems.append(f"step {step + 1}: the rows of the ranks are not those of the step")
    return RowsCheck(steps=steps, rows_per_step=batch.global_batch_rows, problems=tuple(problems))
