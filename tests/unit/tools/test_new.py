"""`megaback new`: the file, what is printed, and what is refused."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launcher.plan import main as plan
from megaback.config_file import load_config
from tools.new import main


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def new(*words: str, out: str = "run.yaml") -> Result:
    return CliRunner().invoke(main, [*words, "--out", out])


def test_a_config_is_written_with_reasons_and_planned(finished: Path) -> None:
    words = ["--minutes", "3", "--device-flops", "1e10", "--shards", str(finished)]
    result = new(*words)

    assert result.exit_code == 0, result.output
    text = Path("run.yaml").read_text()
    assert text.startswith("# Written by `megaback new` of megaback ")
    assert ": megaback new --minutes 3.0 --device-flops 10000000000.0\n" in text
    assert "OLMo-core" in text
    assert "OLMo-core" in result.output
    config = load_config(Path("run.yaml"))
    assert config.run == Path("runs/run")
    assert config.data.shards[0].path == str(finished)
    planned = CliRunner().invoke(plan, ["run.yaml"])
    assert planned.exit_code == 0, planned.output

    again = new(*words, out="again.yaml")
    assert again.exit_code == 0
    assert Path("again.yaml").read_text() == text.replace("runs/run", "runs/again")


def test_estimated_minutes_include_the_updates_of_muon() -> None:
    words = ["--parameters", "10M", "--minutes", "5", "--device-flops", "1e11"]

    result = new(*words, "--device-name", "cpu", "--vocab-size", "4096")

    shown = re.search(r"estimate  ([\d.]+) minutes of training steps", result.output)
    assert shown is not None, result.output
    assert 4.5 < float(shown[1]) < 5


def test_an_own_file_is_replaced_on_request_and_others_never() -> None:
    assert new("--parameters", "1M").exit_code == 0
    assert new("--parameters", "2M").exit_code == 44
    assert new("--parameters", "2M", "--overwrite").exit_code == 0
    assert "--parameters 2M" in Path("run.yaml").read_text()
    Path("mine.yaml").write_text("run: mine\n")
    assert new("--parameters", "1M", "--overwrite", out="mine.yaml").exit_code == 44
    assert Path("mine.yaml").read_text() == "run: mine\n"


def test_a_folder_of_a_run_gets_no_second_run() -> None:
    Path("runs/run").mkdir(parents=True)
    Path("runs/run/config.yaml").touch()
    assert new("--parameters", "1M").exit_code == 0
    assert load_config(Path("run.yaml")).run == Path("runs/run-2")


def test_the_time_of_a_gpu_is_by_its_mfu() -> None:
    words = ["--minutes", "60", "--device-name", "h100-80gb", "--devices-per-node", "1"]
    for mfu in ("0.2", "0.4"):
        assert new(*words, "--mfu", mfu, out=f"{mfu}.yaml").exit_code == 0
    slow, fast = (load_config(Path(f"{mfu}.yaml")) for mfu in ("0.2", "0.4"))
    assert slow.model.width < fast.model.width
    assert "which assumes an MFU of 40%" in Path("0.4.yaml").read_text()


def test_offload_is_written_with_the_host_memory_that_it_needs() -> None:
    words = ["--parameters", "70B", "--device-name", "h100-80gb", "--devices-per-node", "1"]

    result = new(*words)

    assert load_config(Path("run.yaml")).zero.offload == "parameters"
    assert re.search(r"[12],\d{3}\.\d GB of host memory per node", result.output)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --parameters, --minutes or --flops"),
        (["--minutes", "1", "--flops", "1e18"], "both limit the length"),
        (["--parameters", "many"], "not a number such as 800k"),
        (["--parameters", "5"], "the smallest model has"),
        (["--minutes", "0.2"], "20 s to start"),
        (["--flops", "1e8"], "suffices for"),
        (["--flops", "1"], "suffices for 1 tokens, and training needs at least"),
        (["--parameters", "7B", "--memory-gb", "8"], "does not fit"),
        (["--parameters", "7B", "--memory-gb", "8", "--minutes", "9"], "does not fit"),
        (["--parameters", "1M", "--device-name", "h10"], "did you mean h100"),
        (["--parameters", "1M", "--shards", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_without_a_file(words: list[str], message: str) -> None:
    result = new(*words)
    assert result.exit_code
    assert message in " ".join(result.output.split())
    assert not Path("run.yaml").exists()
