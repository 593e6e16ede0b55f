"""The transformers export: its loaders, the code of its card, and its tokenizer."""

import ast
import copy
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

from data_pipeline.text.codec import Direction, TextCodec, Unit
from megaback.weights.model_folder import HF_TOKENIZER_NAME
from tests.helpers.exports import write_checkpoint
from tests.helpers.paths import ROOT
from tools.convert import convert
from tools.export.model_card import COMMIT

Codecs = Callable[..., TextCodec]
ExportOf = Callable[..., Path]
ENDING = "and they lived happily ever after."
FORMATS = [(direction, unit) for direction in Direction for unit in Unit]
of_formats = pytest.mark.parametrize(
    ("direction", "unit"), FORMATS, ids=[f"{one.value}-{two.value}" for one, two in FORMATS]
)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary module cache in place of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> ExportOf:
    """`export(direction, unit, context_tokens=64, qk_norm=False)`: a new export folder."""

    def of(
        direction: Direction = Direction.BACKWARD,
        unit: Unit = Unit.TOKEN,
        context_tokens: int = 64,
        **model: object,
    ) -> Path:
        folder = tmp_path_factory.mktemp("export")
        ours = codec(direction, unit)
        write_checkpoint(folder / "run", ours, context_tokens=context_tokens, **model)
        convert(folder / "run", folder / "model", "hf", "float32")
        return folder / "model"

    return of


@pytest.fixture(scope="module")
def hf(export: ExportOf) -> Path:
    """A backward Llama."""
    return export()


@pytest.fixture(scope="module")
def tokenizer(hf: Path) -> Any:
    return AutoTokenizer.from_pretrained(hf, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(hf: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(hf)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "AutoTokenizer": AutoTokenizer.from_pretrained,
    "AutoTokenizer, no trust": lambda path: AutoTokenizer.from_pretrained(
        path, trust_remote_code=False
    ),
    "AutoTokenizer, slow": lambda path: AutoTokenizer.from_pretrained(path, use_fast=False),
    "AutoTokenizer of a type": lambda path: AutoTokenizer.from_pretrained(
        path, tokenizer_type="qwen3"
    ),
    "AutoProcessor": transformers.AutoProcessor.from_pretrained,
    "pipeline": lambda path: pipeline("text-generation", model=str(path)),
    "pipeline for features": lambda path: pipeline("feature-extraction", model=str(path)),
    **{
        name: getattr(transformers, name).from_pretrained
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


def test_the_pipeline_of_an_export_matches_generate(hf: Path, tokenizer: Any, model: Any) -> None:
    write = pipeline("text-generation", model=str(hf), trust_remote_code=True)
    how = {"do_sample": False, "max_new_tokens": 8}
    ids = model.generate(**tokenizer.prompt(ENDING), **how)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True)

    assert expected.endswith(ENDING)
    assert write(ENDING, **how) == [{"generated_text": expected}]
    only_new = write([ENDING, ENDING], return_full_text=False, **how)
    assert only_new == [[{"generated_text": expected.removesuffix(ENDING)}]] * 2
    assert len(write(ENDING, num_return_sequences=2, max_new_tokens=2)) == 2


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "the stock pipeline": (
        lambda m, t: pipeline("text-generation", model=m, tokenizer=t)(ENDING, max_new_tokens=2),
        "trust_remote_code=True",
    ),
    "a streamer": (
        lambda m, t: m.generate(**t.prompt(ENDING), max_new_tokens=2, streamer=TextStreamer(t)),
        "grows at its beginning",
    ),
    "stop strings": (
        lambda m, t: m.generate(
            **t.prompt(ENDING), max_new_tokens=2, stop_strings=["x"], tokenizer=t
        ),
        "stop_strings",
    ),
    "a chat template": (
        lambda _, t: t.apply_chat_template([{"role": "user", "content": "x"}], chat_template="x"),
        "chat_prompt",
    ),
    "split words": (
        lambda _, t: t(["the", "end"], is_split_into_words=True),
        "is_split_into_words",
    ),
    "split words, encode": (
        lambda _, t: t.encode(["the", "end"], is_split_into_words=True),
        "is_split_into_words",
    ),
    "offsets": (lambda _, t: t(ENDING, return_offsets_mapping=True), "offsets"),
    "new tokens": (lambda _, t: t.add_tokens(["<new>"]), "cannot add '<new>'"),
    "a new pad token": (
        lambda _, t: t.add_special_tokens({"pad_token": "<pad>"}),
        "cannot add '<pad>'",
    ),
    "new markers": (
        lambda _, t: t.add_special_tokens({"additional_special_tokens": ["<new>"]}),
        "cannot add '<new>'",
    ),
    "a pad token by name": (lambda _, t: setattr(t, "pad_token", "<pad>"), "cannot add '<pad>'"),
    "a prompt that fills the context": (lambda _, t: t.prompt("x y " * 40), "context of 64"),
    "a prompt of no text": (lambda _, t: t.prompt([]), "list of strings"),
    "messages as a prompt": (lambda _, t: t.prompt([{"role": "user"}]), "list of strings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_uses_raise_an_error_and_change_nothing(
    name: str, tokenizer: Any, model: Any
) -> None:
    use, message = REFUSED[name]
    before = (len(tokenizer), tokenizer(ENDING)["input_ids"], tokenizer.special_tokens_map)
    kinds = (NotImplementedError, ValueError, TypeError)

    with pytest.raises(kinds, match=re.escape(message)):
        use(model, tokenizer)

    after = (len(tokenizer), tokenizer(ENDING)["input_ids"], tokenizer.special_tokens_map)
    assert after == before


def test_options_that_change_the_added_markers_are_refused(hf: Path) -> None:
    for how in ({"add_eos_token": True}, {"add_bos_token": False}):
        with pytest.raises(ValueError, match="append eos_token_id yourself"):
            AutoTokenizer.from_pretrained(hf, trust_remote_code=True, **how)


def test_a_forward_export_works_with_stock_pipelines_and_streamers(
    export: ExportOf, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(Direction.FORWARD)
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    stock = pipeline("text-generation", model=model, tokenizer=loaded)
    (found,) = stock("Once upon", do_sample=False, max_new_tokens=4)
    assert found["generated_text"].startswith("Once upon")
    given = loaded("Once upon", return_tensors="pt")
    model.generate(**given, do_sample=False, max_new_tokens=4, streamer=TextStreamer(loaded))
    assert "Once upon" in capsys.readouterr().out


@of_formats
def test_a_pair_is_read_as_one_text_after_the_other(
    direction: Direction, unit: Unit, export: ExportOf, codec: Codecs
) -> None:
    loaded = AutoTokenizer.from_pretrained(export(direction, unit), trust_remote_code=True)
    ours = codec(direction, unit)
    first, second = ours.encode("the end.").tolist(), ours.encode("No more").tolist()
    is_backward = direction is Direction.BACKWARD
    ids = second + first if is_backward else first + second
    marked = [ours.begin_id, *ids]

    found = loaded("the end.", "No more", return_special_tokens_mask=True)
    assert found["input_ids"] == marked == loaded.encode("the end.", "No more")
    assert found["special_tokens_mask"] == [1, *[0] * len(ids)]
    assert loaded([["the end.", "No more"], ["a", "b"]])["input_ids"][0] == marked
    assert loaded(["the end."], ["No more"])["input_ids"] == [marked]
    assert loaded("the end.", "No more", add_special_tokens=False)["input_ids"] == ids
    assert loaded.convert_tokens_to_ids(loaded.tokenize("the end.", "No more")) == ids
    assert loaded.build_inputs_with_special_tokens(first, second) == marked
    types = loaded.create_token_type_ids_from_sequences(first, second)
    assert [i for i, kind in zip(marked, types, strict=True) if kind] == second
    if unit is Unit.TOKEN:
        assert loaded.decode(marked, skip_special_tokens=True) == "the end.No more"
    for special in (True, False):
        kept = loaded(
            *("the end.", "No more"),
            truncation="only_first",
            max_length=len(second) + special + 1,
            add_special_tokens=special,
        )["input_ids"]
        cut = second + first[:1] if is_backward else first[:1] + second
        assert kept == [ours.begin_id, *cut][1 - special :]


@of_formats
def test_a_batch_of_prompts_generates_the_same_as_each_alone(
    direction: Direction, unit: Unit, export: ExportOf
) -> None:
    folder = export(direction, unit)
    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    texts = [ENDING, "", "the end.", "Ünd ☃"]
    how = {"do_sample": False, "max_new_tokens": 6}

    for prompt in (loaded.prompt, loaded.chat_prompt):
        together = model.generate(**prompt(texts), **how)
        for text, row in zip(texts, together, strict=True):
            alone = model.generate(**prompt(text), **how)[0]
            new = alone[len(prompt(text)["input_ids"][0]) :].tolist()
            assert row[-6:].tolist()[: len(new)] == new
    written = loaded.decode(model.generate(**loaded.prompt(texts), **how), skip_special_tokens=True)
    side = str.endswith if direction is Direction.BACKWARD else str.startswith
    assert all(side(found, text) for found, text in zip(written, texts, strict=True))
    beams = model.generate(**loaded.prompt(texts), num_beams=2, num_return_sequences=2, **how)
    pairs = zip(loaded.batch_decode(beams, skip_special_tokens=True), range(8), strict=True)
    assert all(side(found, texts[number // 2]) for found, number in pairs)
    answers = loaded.written(model.generate(**loaded.chat_prompt(texts), **how))
    assert len(answers) == 4
    assert answers[0] == loaded.written(model.generate(**loaded.chat_prompt(ENDING), **how)[0])


def test_generation_ends_at_the_end_of_the_context(tokenizer: Any, model: Any) -> None:
    ids = model.generate(**tokenizer.prompt(ENDING), max_new_tokens=500)[0]
    assert len(ids) <= 64


def test_the_length_that_a_caller_asks_for_is_obeyed(tokenizer: Any, model: Any) -> None:
    """Evaluation harnesses pass `max_length`, which a `max_new_tokens` of the folder overrides."""
    asked = {"max_length": 60, "min_length": 60, "do_sample": False}
    assert len(model.generate(**tokenizer.prompt("."), **asked)[0]) == 60


def test_padding_and_truncation_sides_refer_to_ids(tokenizer: Any, codec: Codecs) -> None:
    """The left side is the end of the text; the begin marker is kept."""
    ids = codec().encode(ENDING).tolist()
    found = tokenizer(ENDING, truncation=True, max_length=5)["input_ids"]
    assert found == [tokenizer.bos_token_id, *ids[:4]]
    assert (
        tokenizer.decode(found, skip_special_tokens=True)
        == ENDING[-len(tokenizer.decode(ids[:4])) :]
    )
    batch = tokenizer([ENDING, "x"], padding=True, return_tensors="pt")
    num_padding = int((batch["attention_mask"][1] == 0).sum())
    assert batch["input_ids"][1, :num_padding].tolist() == [tokenizer.pad_token_id] * num_padding
    assert batch["input_ids"][1, num_padding].item() == tokenizer.bos_token_id
    right = tokenizer([ENDING, "x"], padding=True, padding_side="right")
    assert right["input_ids"][1][0] == tokenizer.bos_token_id


def test_encoding_and_decoding_round_trip_through_every_method(tokenizer: Any) -> None:
    text = "Who 's there ? It is n't <|im_end|> ."
    ids = tokenizer.encode(text)
    bare = tokenizer.encode(text, add_special_tokens=False)
    assert ids == [tokenizer.bos_token_id, *bare]
    for how in ({}, {"clean_up_tokenization_spaces": True}):
        assert tokenizer.decode(ids, skip_special_tokens=True, **how) == text
        assert tokenizer.batch_decode([ids, bare], skip_special_tokens=True, **how) == [text] * 2
    assert tokenizer.decode(ids) == text + tokenizer.bos_token
    assert tokenizer.decode(torch.tensor(bare[0])) == "."
    assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(bare)) == text
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert tokenizer("", add_special_tokens=False)["input_ids"] == []
    assert tokenizer(["", text])["input_ids"] == [[tokenizer.bos_token_id], ids]
    assert tokenizer(text, split_special_tokens=False)["input_ids"] == ids
    assert tokenizer(text_target=text)["input_ids"] == ids
    assert tokenizer("x", text_target=text)["labels"] == ids
    assert tokenizer.num_special_tokens_to_add() == tokenizer.num_special_tokens_to_add(True) == 1
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)[:2] == [1, 0]
    assert tokenizer.add_tokens([tokenizer.convert_ids_to_tokens(bare)[0]]) == 0
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab())
    with pytest.raises(ValueError, match="not available"):
        tokenizer(text).tokens()
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other.encode(text) == ids


def test_a_saved_tokenizer_loads_unchanged(tokenizer: Any, tmp_path: Path) -> None:
    for number in range(2):
        tokenizer.save_pretrained(tmp_path / str(number))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / str(number), trust_remote_code=True)
    config = json.loads((tmp_path / "1" / "tokenizer_config.json").read_text())
    assert (config["direction"], config["unit"]) == ("backward", "token")
    assert tokenizer.decode(tokenizer(ENDING)["input_ids"], skip_special_tokens=True) == ENDING
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 64
    with pytest.raises(Exception, match="trust_remote_code=True"):
        transformers.LlamaTokenizer.from_pretrained(tmp_path / "1")
