"""Fingerprints of mixtures, of which those of constant weights never change, and val sets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megaback.config_data import DataSection
from megaback.open_shards import _fingerprint, open_shards

WEIGHTS = (3, 1, 0.7)


def fingerprint(*parts: dict[str, Any], **more: Any) -> str:
    data_sets: Any = [
        SimpleNamespace(manifest=SimpleNamespace(fingerprint=letter * 64))
        for letter in "abc"[: len(parts)]
    ]
    shards = [{"path": "shards", **part} for part in parts]
    return _fingerprint(data_sets, DataSection.model_validate({"shards": shards, **more}))


def mixture_with(part: dict[str, Any], **more: Any) -> str:
    return fingerprint(*({"weight": weight} for weight in WEIGHTS[:2]), part, **more)


RECORDED = "14c5b531e71dc431e32d9c3e6fe153d47d8b18114f28da08781ba52fc5a1367f"


@pytest.mark.parametrize(
    "part",
    [
        {"weight": 0.7},
        {"weight": {0: 0.7, 0.5: 0.7}},
        {"weight": 0.7, "max_epochs": 2, "after_max_epochs": "stop"},
    ],
)
def test_a_constant_mixture_has_the_recorded_fingerprint(part: dict[str, Any]) -> None:
    """Recorded values: a change here refuses to resume every run with a mixture."""
    assert mixture_with(part) == RECORDED


def test_a_single_data_set_has_its_own_fingerprint() -> None:
    assert fingerprint({"weight": 2, "max_epochs": 3}) == "a" * 64


def test_all_that_changes_the_rows_changes_the_fingerprint() -> None:
    changing = {"weight": {0: 0.7, 0.5: 1}}
    found = [
        RECORDED,
        mixture_with({"weight": 0.7, "max_epochs": 2}),
        mixture_with({"weight": 0.7, "max_epochs": 3}),
        mixture_with(changing),
        mixture_with({**changing, "weight_interpolation": "linear"}),
        mixture_with({**changing, "max_epochs": 2}),
        mixture_with(changing, weight_positions="tokens"),
        mixture_with({"weight": {0: 0.7, 0.6: 1}}),
    ]
    assert len(set(found)) == len(found)


def test_the_val_set_of_a_data_set_that_is_given_twice_is_measured_once(
    tiny_shards: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tiny_shards)

    def val_rows(*paths: Path) -> list[int]:
        shards = open_shards(
            DataSection.model_validate({"shards": [{"path": str(p)} for p in paths]})
        )
        return [rows.frames.num_frames for rows in shards.val_rows(64)]

    assert val_rows(tiny_shards, link, tiny_shards) == val_rows(tiny_shards)
