"""The transformers export: which classes load it, trust in its code, and its card."""

import ast
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers

from data_pipeline.text.codec import Direction, TextCodec, Unit
from megaback.weights.model_folder import HF_TOKENIZER_NAME
from tests.helpers.paths import ROOT
from tools.export.model_card import COMMIT

Codecs = Callable[..., TextCodec]
ExportOf = Callable[..., Path]
ENDING = "and they lived happily ever after."


LOADERS: dict[str, Callable[[Path], Any]] = {
    "AutoTokenizer": lambda path: transformers.AutoTokenizer.from_pretrained(path),
    "AutoTokenizer, no trust": lambda path: transformers.AutoTokenizer.from_pretrained(
        path, trust_remote_code=False
    ),
    "AutoTokenizer, slow": lambda path: transformers.AutoTokenizer.from_pretrained(
        path, use_fast=False
    ),
    "AutoTokenizer of a type": lambda path: transformers.AutoTokenizer.from_pretrained(
        path, tokenizer_type="qwen3"
    ),
    "AutoProcessor": lambda path: transformers.AutoProcessor.from_pretrained(path),
    "pipeline": lambda path: transformers.pipeline("text-generation", model=str(path)),
    "pipeline for features": lambda path: transformers.pipeline(
        "feature-extraction", model=str(path)
    ),
    **{
        name: lambda path, name=name: getattr(transformers, name).from_pretrained(path)
        for name in (
            *("LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"),
            *("PreTrainedTokenizer", "T5Tokenizer", "GemmaTokenizer", "GPT2Tokenizer"),
        )
    },
}


@pytest.mark.parametrize("qk_norm", [False, True], ids=["llama", "qwen3"])
def test_no_tokenizer_loads_without_trust_remote_code(
    qk_norm: bool, export: ExportOf, hf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a stock forward tokenizer nor an empty one."""
    monkeypatch.setattr("builtins.input", lambda _question: "n")
    folder = export(qk_norm=True) if qk_norm else hf
    for name, load in LOADERS.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each library has its own
            print(name, load(folder)("the end."))
        if name in ("AutoTokenizer", "LlamaTokenizer", "PreTrainedTokenizerFast"):
            assert "trust_remote_code=True" in str(caught.value)


def test_no_file_of_the_folder_has_a_name_that_stock_classes_look_for(hf: Path) -> None:
    names = {path.name for path in hf.iterdir()}
    assert HF_TOKENIZER_NAME in names
    assert not [name for name in names if name.endswith((".model", "vocab.json", "vocab.txt"))]


def test_the_tokenizer_imports_all_code_of_the_folder_and_the_card_lists_it(hf: Path) -> None:
    """Only what it imports is saved with it; transformers 4 does not follow imports of imports."""
    code = {path.name for path in hf.glob("*.py")}
    utils = transformers.dynamic_module_utils
    imported = utils.get_relative_imports(hf / "tokenization_megaback.py")
    assert code == {"tokenization_megaback.py", *(f"{name}.py" for name in imported)}
    pipeline = hf / "generation_megaback.py"
    direct = {str(hf / f"{name}.py") for name in utils.get_relative_imports(pipeline)}
    assert direct == {*utils.get_relative_import_files(pipeline)}
    card = (hf / "README.md").read_text()
    assert code == set(re.findall(r"`(\w+_megaback\.py)`", card))


def test_calls_that_trust_remote_code_name_a_commit(hf: Path) -> None:
    """Every call of the card and the docs; calls of the project's code trust none."""
    root = ROOT
    card = (hf / "README.md").read_text()
    places = {"card": card, "page": (root / "docs/exports.md").read_text()}
    for name, text in places.items():
        calls = re.findall(
            r"(?:from_pretrained|pipeline)\([^()]*trust_remote_code=True[^()]*\)", text
        )
        assert calls, name
        assert all("revision=" in call for call in calls), calls
    assert "a branch can be moved" in card
    for package in ("megaback", "tools", "data_pipeline", "launcher"):
        for path in (root / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text())):
                keywords = call.keywords if isinstance(call, ast.Call) else []
                for keyword in keywords:
                    if keyword.arg == "trust_remote_code":
                        assert ast.unparse(keyword.value) == "False", path


def test_the_placeholder_of_a_card_loads_nothing_from_a_hub(
    hf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The hub has this model on branch `main`, and no revision named COMMIT."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            data = None
            if "/resolve/main/" in self.path:
                path = hf / self.path.partition("/resolve/main/")[2]
                data = path.read_bytes() if path.is_file() else None
            self.send_response(200 if data is not None else 404)
            self.send_header("X-Error-Code", "RevisionNotFound" if data is None else "")
            self.send_header("Content-Length", str(len(data or b"")))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"0"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data or b"")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None: ...

    code = "import sys; from transformers import AutoTokenizer\n"
    code += (
        "AutoTokenizer.from_pretrained('me/model', revision=sys.argv[1], trust_remote_code=True)"
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", code, COMMIT], env=environment, capture_output=True, text=True
        )
        server.shutdown()
    assert done.returncode == 1
    assert any(f"/resolve/{COMMIT}/" in path for path in asked), asked
    assert not [path for path in asked if "/main/" in path]
    assert "tokenization_megaback" not in " ".join(asked)


CARDS = [
    (Direction.BACKWARD, Unit.TOKEN, 64),
    (Direction.BACKWARD, Unit.WORD, 32),
    (Direction.BACKWARD, Unit.TOKEN, 4),
    (Direction.FORWARD, Unit.TOKEN, 12),
]


@pytest.mark.parametrize(("direction", "unit", "context_tokens"), CARDS)
def test_the_code_of_a_card_runs_as_printed_within_the_context(
    direction: Direction,
    unit: Unit,
    context_tokens: int,
    export: ExportOf,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = export(direction, unit, context_tokens)
    monkeypatch.chdir(folder.parent)
    card = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2

    longest = 0
    for block in blocks:
        found: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(block, found)
        (given,) = re.findall(r'(?:prompt|write)\("(.*?)"', block)
        printed = capsys.readouterr().out[:-1]
        is_backward = direction is Direction.BACKWARD
        assert printed.endswith(given) if is_backward else printed.startswith(given)
        assert len(printed) > len(given)
        longest = max(longest, len(found.get("ids", ())))
    assert 2 < longest <= context_tokens


def test_the_generation_config_is_valid_and_generation_warns_of_nothing(
    tokenizer: Any, model: Any, hf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.GenerationConfig.from_pretrained(hf)
    config.validate(strict=True)
    assert model.generation_config == config
    suppressed = [tokenizer.convert_ids_to_tokens(i) for i in config.suppress_tokens]
    assert {"<|startoftext|>", "<|im_start|>"} < {*suppressed}
    assert not any(tokenizer._pieces.texts[i] for i in config.suppress_tokens)

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    plain = tokenizer(ENDING, return_tensors="pt")
    for prompt in (tokenizer.prompt(ENDING), tokenizer.chat_prompt(ENDING), plain):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.generate(**prompt, max_new_tokens=2)
    write = transformers.pipeline("megaback-reverse", model=str(hf), trust_remote_code=True)
    write([ENDING], stop="x")
    logger.removeHandler(caplog.handler)
    others = ("wandb", "asyncio")  # threads of theirs, which earlier tests started, report late
    assert [one.message for one in caplog.records if not one.name.startswith(others)] == []
