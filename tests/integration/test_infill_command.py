"""Two trained models fill gaps, as a real process in a pipe."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny_run import FORWARD

pytestmark = pytest.mark.slow


def test_a_trained_pair_fills_gaps_with_its_training_text(
    lonely_run_of: Callable[..., Path],
    model_of: Callable[[Path], Path],
    run_megaback: Callable[..., "subprocess.CompletedProcess[str]"],
) -> None:
    forward, backward = model_of(lonely_run_of(*FORWARD)), model_of(lonely_run_of("zero.stage=1"))
    cuts = [("The harbour", " letter near the river."), ("<|im_end|>", " rain began.")]
    lines = [{"beginning": beginning, "ending": ending} for beginning, ending in cuts]
    result = run_megaback(
        *("infill", "--forward", forward, "--backward", backward, "--device", "cpu"),
        *("--max-new-tokens", 16, "--candidates", 24, "--json"),
        input="".join(json.dumps(line) + "\n" for line in [*lines, {"beginning": "a"}]),
    )
    assert result.returncode == 23, result.stderr
    assert "1 of 3 lines have errors; the first is line 3: 'ending'" in result.stderr
    *answers, _ = map(json.loads, result.stdout.splitlines())
    for line, answer in zip(lines, answers, strict=True):
        assert (answer["beginning"], answer["ending"]) == (line["beginning"], line["ending"])
        scores = [one["score"] for one in answer["infills"]]
        assert scores == sorted(scores, reverse=True)
    # One model continues the beginning, the other the ending.
    assert answers[0]["middle"].startswith(" master ")
    assert answers[0]["middle"].endswith(" the long")
