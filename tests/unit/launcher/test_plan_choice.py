"""`megaback plan --choose`: what is printed, what `--write` changes, and what is refused."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.plan import main
from megaback.config_file import load_config
from tests.helpers.paths import ROOT

CLUSTER = ("--nodes", "8", "--device-name", "h100-80gb")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "reverse_1b.yaml").read_text(encoding="utf-8")
    Path("run.yaml").write_text(text.replace("stage: 1", "stage: 1  # of ZeRO"))


def choose(*words: str, config: str = "run.yaml") -> Result:
    return CliRunner().invoke(main, [config, *CLUSTER, "--choose", *words])


def test_the_fastest_settings_are_printed_with_their_parts_and_what_is_assumed() -> None:
    result = choose()

    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("choice   the 5 fastest of ")
    assert lines[1].split()[:4] == ["s", "per", "step", "arithmetic"]
    assert [line.split()[0] for line in lines[2:7]] == ["1", "2", "3", "4", "5"]
    assert sum(line.endswith("  none") for line in lines[2:8]) == 1
    assert "not measured" in result.output
    assert Path("run.yaml").read_text().count("# of ZeRO") == 1


def test_the_choice_can_be_printed_as_json_and_is_repeated() -> None:
    result = choose("--json")

    fields = json.loads(result.output)
    assert len(fields["choices"]) == 5
    best = fields["choices"][0]
    parts = best["parts"]
    total = sum(value for key, value in parts.items() if key != "hidden_network_s")
    assert best["step_s"] == pytest.approx(total)
    assert best["fits"]
    assert fields["given"]["changes"] == {}
    assert fields["given"]["step_s"] >= best["step_s"]
    assert fields["written"] is None
    assert choose("--json").output == result.output


def test_the_first_choice_is_written_alone_and_once() -> None:
    Path("run.yaml").chmod(0o640)
    before = Path("run.yaml").read_text()
    changes = json.loads(choose("--json").output)["choices"][0]["changes"]
    assert changes

    result = choose("--write")

    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1].startswith("written  wrote ")
    after = Path("run.yaml").read_text()
    assert "# of ZeRO" in after
    assert Path("run.yaml").stat().st_mode & 0o777 == 0o640
    different = {*after.splitlines()} ^ {*before.splitlines()}
    names = {key.split(".")[1] for key in changes}
    assert {line.partition(":")[0].strip() for line in different} == names
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in changes.items())
    Path("before.yaml").write_text(before)
    assert load_config(Path("run.yaml")) == load_config(Path("before.yaml"), overrides)

    again = choose("--write")
    assert again.output.splitlines()[-1] == "written  run.yaml has the fastest settings already"
    assert Path("run.yaml").read_text() == after
    assert {path.name for path in Path().iterdir()} == {"run.yaml", "before.yaml"}


def test_a_link_stays_a_link() -> None:
    Path("link.yaml").symlink_to("run.yaml")

    assert choose("--write", config="link.yaml").exit_code == 0

    assert Path("link.yaml").is_symlink()
    assert load_config(Path("link.yaml")) == load_config(Path("run.yaml"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--write", "zero.stage=2"), 10, "the choice would depend on the overrides zero.stage=2"),
        (("--mfu", "0.4"), 10, "predicts the speed"),
        (("--memory-gb", "2"), 14, "no settings fit runs/reverse_1b into the 2.0 GB"),
        (("--device-name", "cpu"), 10, "on cpu cannot be predicted"),
    ],
    ids=["overrides", "mfu", "nothing fits", "cpu"],
)
def test_what_cannot_be_chosen_is_refused_and_nothing_is_written(
    words: tuple[str, ...], code: int, message: str
) -> None:
    before = Path("run.yaml").read_bytes()

    result = choose(*words)

    assert result.exit_code == code
    assert message in " ".join(result.output.split())
    assert Path("run.yaml").read_bytes() == before


def test_a_write_needs_a_choice_and_a_config_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = CliRunner().invoke(main, ["run.yaml", *CLUSTER, "--write"])
    assert (alone.exit_code, "give both" in alone.output) == (10, True)

    Path("run").mkdir()
    for name in ("config.resolved.yaml", "config.yaml"):
        Path("run", name).write_bytes(Path("run.yaml").read_bytes())
    Path("run/history.jsonl").write_text('{"event": "start", "time": "now"}\n')
    for name in ("config.resolved.yaml", "config.yaml"):
        refused = choose("--write", config=f"run/{name}")
        assert refused.exit_code == 10
        assert "is the record of a run" in refused.output
    assert choose(config="run/config.yaml").exit_code == 0

    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)
    assert "is not writable" in choose("--write").output
    assert "not a file" in choose("--write", config="missing.yaml").output
