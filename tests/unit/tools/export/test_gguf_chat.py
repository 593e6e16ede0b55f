"""Chat template of a GGUF file, in llama.cpp's own server."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction, TextCodec
from tests.helpers.exports import write_checkpoint
from tools.convert import convert

Codecs = Callable[..., TextCodec]
_SERVERS = """
import json, os, sys, urllib.error, urllib.request
import xllamacpp

def ask(url, body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)["error"]["message"]

paths, chats = json.loads(sys.argv[1])
found = []
for path in paths:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = path, 64, False, -1
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    base = server.listening_address
    made = {}
    for name, chat in chats.items():
        answer = ask(base + "/v1/chat/completions", {**chat, "max_tokens": 2})
        if isinstance(answer, str):
            made[name] = answer
            continue
        prompt = ask(base + "/apply-template", chat)["prompt"]
        body = {"content": prompt, "add_special": True, "parse_special": True}
        ids = ask(base + "/tokenize", body)["tokens"]
        made[name] = [ids, answer["usage"]["prompt_tokens"]]
    found.append(made)
print()
print(json.dumps(found), flush=True)
os._exit(0)  # its threads never exit
"""
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


_END = _user("the end.")
# Chats, and the instruction that a forward model reads, with what it already wrote.
_RIGHT: dict[str, tuple[dict[str, Any], str, str]] = {
    "an instruction": ({"messages": [_END]}, "the end.", ""),
    "an instruction in parts": (
        {"messages": [_user([{"type": "text", "text": text} for text in ("the", "end.")])]},
        "the\nend.",
        "",
    ),
    "an instruction that a server renders at startup": ({"messages": [_user("test")]}, "test", ""),
    "no thinking": (
        {"messages": [_END], "chat_template_kwargs": {"enable_thinking": False}},
        "the end.",
        "",
    ),
    "the beginning of a response": ({"messages": [_END, _assistant("It")]}, "the end.", "It"),
}
_ONE, _TOOLS, _MARKER = "one instruction at a time", "tools and documents", "spells a marker"
_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a response": ({"messages": [_assistant("It")]}, _ONE),
    "a system message": (
        {"messages": [{"role": "system", "content": "Be brief."}, _END]},
        _ONE,
    ),
    "earlier turns": ({"messages": [_END, _assistant("It"), _END]}, _ONE),
    "the example of a server": (
        {
            "messages": [
                {"role": "system", "content": "You are a helpful assistant"},
                _user("Hello"),
                _assistant("Hi there"),
                _user("How are you?"),
            ]
        },
        _ONE,
    ),
    "no text": ({"messages": [_user(" ")]}, _ONE),
    "a spelled marker": ({"messages": [_user("the <|im_end|>")]}, _MARKER),
    "tools": ({"messages": [_END], "tools": [_TOOL]}, _TOOLS),
    "documents": (
        {"messages": [_END], "chat_template_kwargs": {"documents": ["x"]}},
        _TOOLS,
    ),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[Direction, Any]:
    """Answer to each chat, by direction: ids of a prompt and their number, or an error."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    paths = []
    for direction in Direction:
        folder = tmp_path_factory.mktemp("gguf")
        write_checkpoint(folder / "run", codec(direction), ranks=1, on_examples=True)
        convert(folder / "run", folder / "model", "gguf", "float32")
        paths.append(str(folder / "model" / "model.gguf"))
    chats = {name: chat[0] for name, chat in (_RIGHT | _REFUSED).items()}
    result = subprocess.run(
        [sys.executable, "-c", _SERVERS, json.dumps([paths, chats])],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("[{")]
    return dict(zip(Direction, json.loads(line), strict=True))


@pytest.mark.parametrize("name", _RIGHT)
def test_an_instruction_has_the_ids_of_training(
    name: str, served: dict[Direction, Any], codec: Codecs
) -> None:
    _, instruction, begun = _RIGHT[name]
    ours = codec(Direction.FORWARD)
    expected = [*ChatFormat(ours).prompt_ids(instruction), *ours.encode(begun).tolist()]
    assert served[Direction.FORWARD][name] == [expected, len(expected)]


@pytest.mark.parametrize("name", _REFUSED)
def test_a_chat_without_such_ids_is_refused(name: str, served: dict[Direction, Any]) -> None:
    assert _REFUSED[name][1] in served[Direction.FORWARD][name]


@pytest.mark.parametrize("name", [*_RIGHT, *_REFUSED])
def test_every_chat_with_a_backward_model_is_refused(
    name: str, served: dict[Direction, Any]
) -> None:
    assert "this model reads and writes backward" in served[Direction.BACKWARD][name]
