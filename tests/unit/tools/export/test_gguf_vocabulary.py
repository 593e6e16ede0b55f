"""Byte-level BPE in a GGUF file: llama.cpp's own ids, or a refusal."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import TokenizerError
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.tokenizer.markers import with_markers
from tests.helpers.bpe import qwen_content, qwen_fields
from tests.helpers.exports import write_checkpoint
from tools.convert import convert
from tools.export.gguf_vocabulary import llama_cpp_splits

TEXTS = [
    "The captain's ship <think>sailed</think> in 1999.\n\n  caf\u00e9 \u8239 \U0001f600",
    "\u2581 e\u0301\r\n\t x  y",
    "don't I'LL <tool_call> <|box_start> 3.14",
    "12345 x1y22  333\n4444\u0663\u00bd",
]
_TOKENIZE = """
import json, os, sys, urllib.request
import xllamacpp

def tokenize(base, text):
    body = {"content": text, "add_special": False, "parse_special": False}
    request = urllib.request.Request(
        base + "/tokenize", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]

path, texts = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.verbosity = path, 64, False, -1
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
try:
    found = [tokenize(server.listening_address, text) for text in texts]
    print()
    print(json.dumps(found), flush=True)
finally:
    os._exit(0)  # its threads do not end by themselves
"""


_TO_BYTES = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_GPT2 = {"pre_tokenizer": _TO_BYTES}
_SMOLLM = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [_DIGITS, _TO_BYTES]}}


def _llama_3() -> dict[str, Any]:
    fields = qwen_fields()
    split, to_bytes = fields["pre_tokenizer"]["pretokenizers"]
    expression = split["pattern"]["Regex"].replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    split = {**split, "pattern": {"Regex": expression}}
    splits = {**fields["pre_tokenizer"], "pretokenizers": [split, to_bytes]}
    return {"pre_tokenizer": splits, "model": {**fields["model"], "ignore_merges": True}}


@pytest.mark.parametrize(
    ("name", "changes"),
    [("qwen2", {}), ("llama-bpe", _llama_3()), ("gpt-2", _GPT2), ("smollm", _SMOLLM)],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_llama_cpp_has_our_ids(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp is not installed")
    assert llama_cpp_splits({**qwen_fields(), **changes}) == name
    content = with_markers(qwen_content(**changes)).content
    codec = TextCodec(content, Direction.FORWARD, Unit.TOKEN)
    write_checkpoint(tmp_path / "run", codec, ranks=1, qk_norm=True)
    convert(tmp_path / "run", tmp_path / "model", "gguf", "float32")
    asked = json.dumps([str(tmp_path / "model" / "model.gguf"), TEXTS])
    result = subprocess.run(
        [sys.executable, "-c", _TOKENIZE, asked],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("[[")]
    assert json.loads(line) == [codec.encode(text).tolist() for text in TEXTS]


def test_splits_without_a_name_in_llama_cpp_are_refused() -> None:
    twice = {"type": "Sequence", "pretokenizers": [_DIGITS, _DIGITS, _TO_BYTES]}
    with pytest.raises(TokenizerError, match="no name for the tokenizer's splits"):
        llama_cpp_splits({**qwen_fields(), "pre_tokenizer": twice})
