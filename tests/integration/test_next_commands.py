"""Every command that is printed as a next step works when typed as printed.

The folder's name has a space and a quote. A shell splits the lines; commands that train run as
processes or in reused ranks, all others in this process.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from data_pipeline.text.codec import Direction, TextCodec
from launcher.train_result import show_result
from megaback.cli import main as megaback
from megaback.config_file import load_config
from tests.helpers.models import random_model, write_chat_model, write_model
from tests.helpers.tiny_run import FORWARD, read_run_config, training_environment, wait_for_step
from tests.helpers.warm_ranks import WarmRanks

pytestmark = pytest.mark.slow

_NEXT = re.compile(r"^(?:next:?)? +(megaback .*)$", re.MULTILINE)
Codecs = Callable[..., TextCodec]
RunOf = Callable[..., Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory."""
    folder = tmp_path_factory.mktemp("next") / "a user's files"
    folder.mkdir()
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def typed(*words: object) -> str:
    """Output of a command, run in this process."""
    result = CliRunner().invoke(megaback, [str(word) for word in words])
    assert result.exit_code == 0, f"{words}\n{result.output}{result.exception!r}"
    return result.output


def split(line: str) -> list[str]:
    """A line split into words by a shell."""
    script = f"set -- {line}\nprintf '%s\\0' \"$@\""
    said = subprocess.run(["sh", "-c", script], capture_output=True, check=True, text=True)
    return said.stdout.split("\0")[:-1]


def following(output: str) -> list[list[str]]:
    """The commands that are named, without `megaback`."""
    lines = _NEXT.findall(output)
    assert lines, output
    return [split(line)[1:] for line in lines]


def type_all(output: str) -> dict[str, str]:
    """Output of each named command, except those that train."""
    return {
        " ".join(words[:2]): typed(*words) for words in following(output) if words[0] != "train"
    }


def trained(words: list[str], stop_at_step: int | None = None) -> str:
    """Output of a command that trains, to its end or until it is stopped."""
    command = [sys.executable, "-m", "megaback", *words]
    (run,) = (Path(word.partition("=")[2]) for word in words if word.startswith("run="))
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=training_environment(),
    )
    if stop_at_step is not None:
        wait_for_step(process, run, stop_at_step)
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == (0 if stop_at_step is None else 75), output
    return output


@pytest.fixture(scope="module")
def shards_told(place: Path, tiny_text_folder: Path) -> str:
    """Output of training a tokenizer, and of the build command that it names."""
    shutil.copytree(tiny_text_folder, place / "my text")
    tokenizer = typed(
        "tokenizer",
        "train",
        "--source",
        "my text",
        "--out",
        "my data/tok'enizer",
        "--vocab-size",
        "600",
    )
    (words,) = following(tokenizer)
    assert words[:2] == ["shards", "build"]
    return typed(*words, "--workers", "1", "--val-fraction", "0.1")


def test_the_command_named_by_a_build_trains_in_a_new_folder(place: Path, shards_told: str) -> None:
    (place / "runs/shards").mkdir(parents=True)
    (place / "runs/shards/config.yaml").touch()  # a finished run of that name
    (words,) = following(typed("shards", "finalize", "my data/shards"))
    assert "run=runs/shards" in following(shards_told)[0]
    assert "run=runs/shards-2" in words
    trained(words, stop_at_step=1)
    assert (place / "runs/shards/config.yaml").read_text() == ""
    assert list((place / "runs/shards-2/checkpoints").glob("step-*/meta.json"))


@pytest.mark.parametrize(
    "options", [("--frame-tokens", "128"), ("--unit", "word", "--direction", "forward")]
)
def test_a_build_of_another_kind_names_the_keys_to_change(
    options: tuple[str, ...], shards_told: str, tmp_path: Path
) -> None:
    from megaback.data import open_data

    assert shards_told
    source = ("--source", "my text", "--tokenizer", "my data/tok'enizer/tokenizer.model")
    told = typed("shards", "build", *source, "--out", tmp_path / "of a kind", *options)
    (words,) = following(told)
    config = load_config(Path(words[1]), tuple(words[2:]))
    assert open_data(config, 0, 2).total_steps


def test_the_command_named_by_a_plan_or_unfinished_build_finishes_it(shards_told: str) -> None:
    assert shards_told
    source = ("--source", "my text", "--tokenizer", "my data/tok'enizer/tokenizer.model")
    planned = typed("shards", "plan", *source, "--out", "my data/planned", "--tasks", "2")
    whole, one = following(planned)
    assert one[-4:] == ["--tasks", "2", "--task-index", "0"]
    typed(*one, "--workers", "1")
    (rest,) = following(typed("inspect", "my data/planned"))
    assert rest == whole
    typed(*one[:-1], "1", "--workers", "1")
    assert "fingerprint" in typed(*whole)  # done already, so it may be typed again


def test_commands_named_by_inspect_for_data_work(shards_told: str) -> None:
    assert shards_told
    told = typed("inspect", "my data/shards")
    assert type_all(told).keys() == {"shards inspect"}
    assert following(told)[1][0] == "train"
    shard = next(Path("my data/shards").glob("train-*.zst"))
    assert type_all(typed("inspect", shard)).keys() == {"inspect my data/shards"}
    (words,) = following(typed("inspect", "my data/tok'enizer"))
    assert words[:2] == ["shards", "build"]
    typed(*words, "--workers", "1")


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("to", ["full", "hf"])
def test_commands_named_by_convert_and_inspect_fit_the_model(
    direction: Direction, to: str, place: Path, codec: Codecs
) -> None:
    folder = place / f"a {direction.value} model"
    write_model(folder, random_model(), codec(direction))
    out = f"it's {direction.value}, {to}"
    told = typed("convert", folder, "--to", to, "--out", out)
    for output in (told, typed("inspect", out)):
        (words,) = following(output)
        given = {Direction.BACKWARD: "--ending", Direction.FORWARD: "--beginning"}[direction]
        assert words[:3] == ["sample", out, given]
        typed(*words, "--max-new-tokens", "2")


@pytest.mark.parametrize("direction", list(Direction))
def test_convert_names_chat_for_a_chat_model(
    direction: Direction, place: Path, codec: Codecs
) -> None:
    folder = place / f"a {direction.value} chat"
    write_chat_model(folder, codec(direction), on_examples=True)
    told = typed("convert", folder, "--out", f"it's a {direction.value} chat")
    assert type_all(told).keys() == {f"chat it's a {direction.value} chat"}


@pytest.fixture(scope="module")
def base(place: Path, run_of: RunOf) -> Path:
    """A finished run, as a user has it."""
    return Path(shutil.copytree(run_of("zero.stage=1"), place / "runs/a base"))


def test_commands_named_by_inspect_for_a_run_and_its_checkpoints_work(
    base: Path, warm_ranks: Callable[[int], WarmRanks], place: Path
) -> None:
    for path in ("runs/a base", f"runs/a base/checkpoints/{_newest(base)}"):
        told = typed("inspect", path)
        *uses, again = following(told)
        assert again[:2] == ["train", "runs/a base/config.yaml"]
        type_all(told)
        assert {words[0] for words in uses} >= {"sample", "convert"}
    warm_ranks(2).train(Path(again[1]), again[2:], place / "again.txt", place)


def test_a_finished_run_names_its_folder_and_next_command(
    base: Path,
    lonely_run_of: RunOf,
    capsys: pytest.CaptureFixture[str],
    place: Path,
    tiny_shards: Path,
) -> None:
    forward = Path(shutil.copytree(lonely_run_of(*FORWARD), place / "runs/forward"))
    for run, given in ((base, "--ending"), (forward, "--beginning")):
        shown = run.relative_to(place)
        config = read_run_config(tiny_shards, f"run={shown}")
        show_result(config, 83.0)
        told = capsys.readouterr().out
        assert told.startswith(f"{shown}: ")
        assert "steps, 1m23s in this session" in told
        assert re.search(r"^val loss \d\.\d{4} nats/token, at step \d+$", told, re.MULTILINE)
        use, convert = following(told)
        assert use[:3] == ["sample", str(shown), given]
        typed(*use)
        assert following(typed(*convert))[0][2] == given


def test_rollback_names_its_run(
    base: Path, place: Path, warm_ranks: Callable[[int], WarmRanks]
) -> None:
    run = Path(shutil.copytree(base, place / "runs/rolled back"))
    (words,) = following(typed("rollback", "runs/rolled back", "--steps", "30"))
    assert words == ["train", "runs/rolled back/config.yaml", "run=runs/rolled back"]
    before = _newest(run)
    warm_ranks(2).train(Path(words[1]), words[2:], place / "back.txt", place)
    assert _newest(run) >= before


def test_the_command_named_by_instruct_build_fine_tunes_even_without_a_val_set(
    base: Path, place: Path, tokenizer_path: Path
) -> None:
    rows = [{"instruction": f"Count to {n}.", "output": "one two three " * n} for n in range(9)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build = ("instruct", "build", "--tokenizer", tokenizer_path, "--source", "rows.jsonl")
    told = typed(*build, "--out", "my rows", "--val-fraction", "0", "--workers", "1")
    assert "the val set is empty" in told
    (words,) = following(told)
    assert words[2].startswith("init_from=runs/")
    use, _ = following(trained(words))
    assert use[:2] == ["chat", "runs/my rows"]
    typed(*use, "--max-new-tokens", "3")


def _newest(run: Path) -> str:
    return max(path.name for path in (run / "checkpoints").glob("step-*"))


def test_a_line_is_split_as_a_shell_splits_it() -> None:
    assert split("megaback x 'a b' \"c\" # d") == ["megaback", "x", "a b", "c"]
    assert shlex.split("a 'b c'") == split("a 'b c'")
