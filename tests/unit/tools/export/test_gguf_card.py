"""Card of a GGUF file, with llama.cpp's own server."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.exports import write_checkpoint
from tools.convert import convert
from tools.export.model_card import example_of

Codecs = Callable[..., TextCodec]
CONTEXT_TOKENS = 48
FORMATS = [
    (Direction.BACKWARD, Unit.TOKEN),
    (Direction.BACKWARD, Unit.WORD),
    (Direction.FORWARD, Unit.TOKEN),
]

_SERVERS = """
import contextlib, io, json, os, sys
import xllamacpp

found = []
for path, code in json.loads(sys.argv[1]):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = path, 48, False, -1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    base = server.listening_address
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code.replace("http://127.0.0.1:8080", base), {})
    found.append(printed.getvalue())
print()
print(json.dumps(found), flush=True)
os._exit(0)  # its threads never exit
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> list[Path]:
    """One GGUF export per format."""
    made = []
    for direction, unit in FORMATS:
        folder = tmp_path_factory.mktemp("gguf")
        ours = codec(direction, unit)
        write_checkpoint(folder / "run", ours, context_tokens=CONTEXT_TOKENS)
        convert(folder / "run", folder / "model", "gguf", "float32")
        made.append(folder / "model")
    return made


@pytest.fixture(scope="module")
def served(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Output of the code of each backward model's card."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    asked = []
    for folder in folders[:2]:
        blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        asked.append([str(folder / "model.gguf"), "".join(blocks)])
    path = tmp_path_factory.mktemp("llama") / "servers.py"
    path.write_text(_SERVERS)
    result = subprocess.run(
        [sys.executable, path, json.dumps(asked)],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith('["')]
    return list(json.loads(line))


@pytest.mark.parametrize("number", [0, 1], ids=["token", "word"])
def test_the_code_of_a_backward_models_card_writes_before_the_ending(
    number: int, served: list[str], codec: Codecs
) -> None:
    printed = served[number]
    given, new_tokens = example_of(codec(*FORMATS[number]), CONTEXT_TOKENS)
    assert printed.endswith(given + "\n")
    assert len(printed) > len(given) + 4
    assert 1 + new_tokens + len(codec(*FORMATS[number]).encode(given)) <= CONTEXT_TOKENS


def test_the_metadata_describe_the_direction(folders: list[Path]) -> None:
    import gguf

    for folder, (direction, unit) in zip(folders, FORMATS, strict=True):
        fields = {
            key: field.contents()
            for key, field in gguf.GGUFReader(folder / "model.gguf").fields.items()
        }
        text = fields["general.description"]
        card = (folder / "README.md").read_text()
        assert text in card
        assert (fields["megaback.direction"], fields["megaback.unit"]) == (direction, unit)
        assert "tokenizer.chat_template" in fields
        assert ("noise" in text) == (direction is Direction.BACKWARD)
        assert ("**Not right:**" in card) == (direction is Direction.BACKWARD)
