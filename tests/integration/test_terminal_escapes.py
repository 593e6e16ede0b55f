"""Commands on a real terminal with untrusted text: no control sequence is passed through."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

import megaback
from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.common.control_characters import escaped
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from megaback.faults.exit_record import record_exit, record_start
from tests.helpers.models import write_chat_model
from tests.helpers.tiny_run import training_environment

TITLE = "\x1b]0;pwned\x07"
HOSTILE = f"{TITLE}\x1b[2J\x9b31m\u202e\x7f[bold]loud[/bold]"
_OURS = re.compile(r"\x1b\[(?:\d+(?:;\d+)*)?[mAK]|\x1b\[\?25[hl]|\r")
_COMMANDS = """
import json, sys
from megaback.cli import main
for words in json.loads(sys.argv[1]):
    try:
        main(words, prog_name="megaback")
    except SystemExit:
        pass
    print("=====", flush=True)
"""


def on_terminal(*command: object, folder: Path) -> str:
    """Output of a process whose standard output and standard error are a terminal."""
    ours, theirs = os.openpty()
    environment = {**training_environment(), "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    how = {"stdin": subprocess.DEVNULL, "stdout": theirs, "stderr": theirs, "cwd": folder}
    process = subprocess.Popen([sys.executable, *command], env=environment, **how)
    os.close(theirs)
    parts = []
    with suppress(OSError):
        while part := os.read(ours, 1 << 16):
            parts.append(part)
    os.close(ours)
    process.wait(timeout=60)
    return b"".join(parts).decode()


def require_harmless(output: str) -> str:
    """Only sequences that lay out and color a terminal, none of them within what is hostile."""
    plain = _OURS.sub("", output)
    assert escaped(plain) == plain, ascii(output)
    assert "\x1b[2J" not in output
    return plain


@pytest.fixture
def server() -> Iterator[str]:
    """A server that answers with a hostile reason phrase. `server`: its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(1 << 16)
                        head = f"HTTP/1.1 404 {HOSTILE}\r\ncontent-length: 0\r\n\r\n"
                        connection.sendall(head.encode("latin-1", "replace"))

        Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def shards(tmp_path: Path, codec: Callable[..., TextCodec]) -> Path:
    """A data set of hostile documents, from a source with such a name."""
    source = tmp_path / f"{HOSTILE.replace('/', '')}.jsonl"
    source.write_text("".join(json.dumps({"text": f"{n} {HOSTILE}"}) + "\n" for n in range(20)))
    settings = BuildSettings(
        sources=(WeightedSource(str(source)),),
        tokenizer_sha256=codec().format.tokenizer_sha256,
        val_fraction=0.1,
        frame_tokens=1024,
    )
    folder = tmp_path / "shards"
    build_shards(settings, codec(), folder, workers=1)
    return folder


def test_control_sequences_in_untrusted_text_are_shown_escaped(
    tmp_path: Path, shards: Path, server: str, codec: Callable[..., TextCodec]
) -> None:
    model = write_chat_model(tmp_path / "model", codec())
    run = tmp_path / f"run{HOSTILE.replace('/', '')}"
    run.mkdir()
    record_start(run, step=0, world_size=2)
    record_exit(run, 51, "rank lost", f"rank 1 said {HOSTILE}")
    bad_config = tmp_path / "bad.yaml"
    bad_config.write_text(json.dumps({"run": "r", HOSTILE: 1}))
    commands = [
        [
            "sample",
            model,
            "--ending",
            HOSTILE,
            "--max-new-tokens",
            60,
            "--temp",
            3,
            "--num-samples",
            2,
        ],
        ["shards", "inspect", shards],
        ["shards", "inspect", shards, "--document", 1],
        ["shards", "inspect", shards, "--document", 1, "--stored"],
        ["shards", "verify", shards],
        ["status", run],
        ["watch", run],
        ["jobs", tmp_path],
        ["inspect", run],
        ["inspect", shards],
        ["inspect", tmp_path / HOSTILE.replace("/", "")],
        ["train", bad_config],
        ["chat", model, "--response", HOSTILE, "-n", 2, "--max-new-tokens", 20, "--temp", 2],
        ["sample", model, "--max-new-tokens", HOSTILE],
        [HOSTILE],
        [*("tokenizer", "train", "--source", f"{server}/a.jsonl", "--out", tmp_path / "spm")],
    ]
    words = json.dumps([[str(word) for word in command] for command in commands])
    output = require_harmless(on_terminal("-c", _COMMANDS, words, folder=tmp_path))
    shown = output.split("=====")[:-1]
    assert len(shown) == len(commands), output
    assert "Traceback" not in output
    assert "404" in shown[-1], shown[-1]
    for number in (0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 13, 14):
        assert r"\x1b]0;pwned" in shown[number], (commands[number], shown[number])


def test_a_hostile_run_is_trained_on_a_terminal(
    tmp_path: Path, shards: Path, config_path: Path
) -> None:
    run = "run=" + json.dumps(f"{tmp_path}/{TITLE}\x1b[2J")
    words = (f"data.shards={shards}", "training.steps=2", "hardware.processes=1")
    output = on_terminal(
        *("-m", "megaback", "train", config_path, run, *words, "batch.global_batch_rows=2"),
        folder=tmp_path,
    )
    plain = require_harmless(output)
    assert "2/2" in plain
    assert r"\x1b]0;pwned\x07\x1b[2J: 2 steps" in plain


def test_samples_in_a_pipe_are_exact(tmp_path: Path, codec: Callable[..., TextCodec]) -> None:
    model = write_chat_model(tmp_path / "model", codec())
    text = megaback.load(model, device="cpu").complete_backwards(
        HOSTILE, max_new_tokens=60, temperature=3.0
    )
    command = [*("sample", model, "--ending", HOSTILE, "--max-new-tokens", 60, "--temp", 3)]
    done = subprocess.run(
        [sys.executable, "-m", "megaback", *map(str, command)], capture_output=True, check=True
    )
    assert done.stdout == f"{text}\n".encode()
    assert escaped(text.removesuffix(HOSTILE)) != text.removesuffix(
        HOSTILE
    )  # as the command itself does
