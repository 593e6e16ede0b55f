"""Two real ranks on two nodes, one of which does not fit: it is named, and the run does not start.

Both nodes are this machine, under two names.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import LaunchError, PreflightError, StorageError
from launcher.ranks.local import rank_environment, rank_names
from megaback.run_folder import BAD_NODES_NAME, PREFLIGHT_NAME
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow

CASES = [
    ("none", "auto"),
    ("none", "off"),
    ("other version", "auto"),
    ("wrong device", "auto"),
    ("own disk", "auto"),
    ("full disk", "auto"),
    ("broken link", "auto"),
    ("slow", "auto"),
    ("slow", "strict"),
    ("skewed", "auto"),
    ("skewed", "strict"),
]
SENTENCES = {
    "other version": "node node1 has torch 1.0, but the other nodes have ",
    "wrong device": "node node1 (rank 1): its device computes wrong products",
    "own disk": "node node1 cannot read the file that node ",
    "slow": "node node1 (rank 1) multiplies at ",
    "skewed": "the clock of node node1 (rank 1) is 300.0 s ahead of the others'",
}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Result of a case."""

    run: Path
    code: int
    sentence: str
    printed: str
    """Standard error of the first rank."""
    printed_by_second: str

    @property
    def report(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads((self.run / PREFLIGHT_NAME).read_text())
        return fields


def run_cases(config: Path, folder: Path, cases: list[tuple[str, str]]) -> dict[Any, Checked]:
    """All cases in one pair of ranks."""
    environment = training_environment() | rank_environment(2)
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.helpers.preflight_rank",
                config,
                folder,
                json.dumps(cases),
            ],
            env=environment | names | {"MEGABACK_LOG": "debug"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for names in rank_names(2)
    ]
    (printed, warnings), (_, others) = (rank.communicate(timeout=120) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], warnings + others
    return {
        case: Checked(
            run=folder / " ".join(case),
            code=ending["code"],
            sentence=ending["sentence"],
            printed=warnings,
            printed_by_second=others,
        )
        for case, ending in zip(cases, json.loads(printed), strict=True)
    }


@pytest.fixture(scope="module")
def checked(
    tmp_path_factory: pytest.TempPathFactory, config_path: Path
) -> dict[tuple[str, str], Checked]:
    return run_cases(config_path, tmp_path_factory.mktemp("preflight"), CASES)


def test_nodes_that_fit_pass_and_record_their_measurements(checked: dict[Any, Checked]) -> None:
    case = checked["none", "auto"]

    assert (case.code, case.report["stops"]) == (0, False)
    assert case.report["all_reduce_gb_s"] > 0
    assert [disk["node"] for disk in case.report["disks"]] == ["node0", "node1"]
    assert all(disk["write_gb_s"] > 0 and disk["read_gb_s"] > 0 for disk in case.report["disks"])
    assert [rank["node"] for rank in case.report["ranks"]] == ["node0", "node1"]
    assert all(rank["multiply_flops"] > 0 for rank in case.report["ranks"])
    assert {path.name for path in case.run.iterdir()} == {PREFLIGHT_NAME}


def test_each_rank_reports_its_node(checked: dict[Any, Checked]) -> None:
    case = checked["none", "auto"]

    for rank, printed in enumerate((case.printed, case.printed_by_second)):
        (line,) = [line for line in printed.splitlines() if "2 ranks, this one on cpu" in line]
        assert f" rank {rank}: megaback: debug: " in line


def test_preflight_that_is_off_does_nothing(checked: dict[Any, Checked]) -> None:
    assert list(checked["none", "off"].run.iterdir()) == []


@pytest.mark.parametrize("name", ["other version", "wrong device", "own disk"])
def test_a_difference_that_makes_a_run_wrong_stops_it_and_names_the_node(
    name: str, checked: dict[Any, Checked]
) -> None:
    case = checked[name, "auto"]

    assert case.code == PreflightError.exit_code
    assert case.sentence.startswith(SENTENCES[name])
    assert f"megaback: error: {case.sentence}\n" in case.printed
    assert case.report["stops"]
    assert (case.run / BAD_NODES_NAME).read_text() == "node1\n"


def test_a_disk_that_refuses_every_node_blames_no_node(checked: dict[Any, Checked]) -> None:
    case = checked["full disk", "auto"]

    assert case.code == StorageError.exit_code
    assert "No space left on device" in case.sentence
    assert not (case.run / BAD_NODES_NAME).exists()


def test_a_network_that_connects_no_rank_blames_no_node(checked: dict[Any, Checked]) -> None:
    case = checked["broken link", "auto"]

    assert case.code == LaunchError.exit_code
    assert case.sentence.startswith("no rank could exchange data with its neighbors within")
    assert not (case.run / BAD_NODES_NAME).exists()


@pytest.mark.parametrize("name", ["slow", "skewed"])
def test_a_difference_that_makes_a_run_slow_is_a_warning(
    name: str, checked: dict[Any, Checked]
) -> None:
    case = checked[name, "auto"]

    assert case.code == 0
    assert f" rank 0: megaback: warning: {SENTENCES[name]}" in case.printed
    assert [item["node"] for item in case.report["findings"]] == ["node1"]
    assert not (case.run / BAD_NODES_NAME).exists()


@pytest.mark.parametrize("name", ["slow", "skewed"])
def test_a_warning_stops_the_run_in_a_strict_config(name: str, checked: dict[Any, Checked]) -> None:
    case = checked[name, "strict"]

    assert case.code == PreflightError.exit_code
    assert case.sentence.startswith(SENTENCES[name])
    assert (case.run / BAD_NODES_NAME).read_text() == "node1\n"
