"""The contents of data sets and models, read as a whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.shards.data_set import DataSet


def document_ids(data_set: DataSet, split: str) -> Iterator[npt.NDArray[np.unsignedinteger[Any]]]:
    """The ids of every document of a split, markers included, in stored order."""
    for entry in data_set.manifest.split(split):
        with data_set.open_shard(entry) as reader:
            yield from reader.documents()


def read_weights(folder: Path) -> dict[str, Any]:
    """The tensors of a model's folder, verified."""
    from megaback.weights.model_folder import open_weights, read_description

    stored = open_weights(folder, read_description(folder))
    return {name: stored.read(name) for name, _ in stored.shapes()}
