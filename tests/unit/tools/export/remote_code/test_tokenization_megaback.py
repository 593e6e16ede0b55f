"""The tokenizer of an export: its ids and texts, its sides, and what it refuses."""

import ast
import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.builds import HARD_TEXTS
from tests.helpers.exports import of_formats
from tools.export.model_card import REMOTE_CODE

Codecs = Callable[..., TextCodec]
ExportOf = Callable[..., Path]
ENDING = "and they lived happily ever after."


@pytest.mark.parametrize("unit", Unit)
@pytest.mark.parametrize("direction", Direction)
def test_the_exported_tokenizer_matches_the_codec(
    direction: Direction, unit: Unit, tokenizer_path: Path, codec: Codecs
) -> None:
    from tools.export.remote_code.tokenization_megaback import MegabackTokenizer

    ours = codec(direction, unit)
    shipped = MegabackTokenizer(str(tokenizer_path), direction.value, unit.value)

    for text in [*HARD_TEXTS, "", " ", "<|im_end|> is text", "a\u2581b", "lone \ud800", "the end."]:
        ids = shipped(text)["input_ids"]
        assert ids == [ours.begin_id, *ours.encode(text).tolist()]
        assert shipped.decode(ids, skip_special_tokens=True) == text
        prompt, expected = shipped.prompt(text), ours.prompt(text)
        assert prompt["input_ids"].tolist() == [expected.ids]
        (processor,) = prompt["logits_processor"]
        first_ids = None if len(expected.ids) == 1 and not text else expected.first_ids.tolist()
        assert processor.first_ids == [first_ids]

    form = ChatFormat(ours)
    for text in [*HARD_TEXTS, "<|im_end|> is text", "the end."]:
        asked, expected = shipped.chat_prompt(text), form.prompt(text)
        assert asked["input_ids"].tolist() == [expected.ids]
        (processor,) = asked["logits_processor"]
        assert processor.first_ids == [expected.first_ids.tolist()]
        assert asked["eos_token_id"] == expected.end_id
        allowed = ours.writable_ids(form.stop_id)
        assert sorted({*range(ours.vocab_size)} - {*asked["suppress_tokens"]}) == allowed.tolist()
        ids = [*expected.ids, *form.written_ids(text)]
        assert shipped.written(ids) == text
        assert shipped.written(torch.tensor(ids[:-1])) == text


def test_the_tokenizer_loads_without_torch() -> None:
    """Programs without torch (mlx-lm) use it, and others whose torchvision is broken."""
    from tools.export.remote_code import tokenization_megaback

    folder = Path(tokenization_megaback.__file__).parent
    waiting, loaded = ["tokenization_megaback"], set[str]()
    while waiting:
        loaded.add(name := waiting.pop())
        for node in ast.parse((folder / f"{name}.py").read_text()).body:
            if isinstance(node, ast.Import):
                assert "torch" not in [alias.name for alias in node.names], name
            elif isinstance(node, ast.ImportFrom) and node.level:
                waiting += {str(node.module)} - loaded
    assert "prompts_megaback" in loaded
    assert "generation_megaback" not in loaded


@pytest.mark.parametrize(
    ("module", "program"),
    {
        "llamafactory.data.template": "LLaMA-Factory",
        "llamafactory.data.processor.pretrain": "LLaMA-Factory",
        "axolotl.prompt_tokenizers": "axolotl",
        "axolotl.prompt_strategies.chat_template": "axolotl",
        "trl.data_utils": "TRL",
    }.items(),
)
@pytest.mark.parametrize(
    "call", ["t.encode('a')", "t('a')", "t.apply_chat_template([{'role': 'user', 'content': 'a'}])"]
)
def test_trainers_that_encode_texts_are_refused(
    call: str, module: str, program: str, tokenizer_path: Path
) -> None:
    from tools.export.remote_code.tokenization_megaback import MegabackTokenizer

    scope = {"__name__": module, "t": MegabackTokenizer(str(tokenizer_path))}
    with pytest.raises(NotImplementedError, match=f"{program} cannot encode texts"):
        eval(call, scope)
    assert scope["t"].encode("a") == eval("t.encode('a')", {**scope, "__name__": "axolotl.train"})


REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "the stock pipeline": (
        lambda m, t: transformers.pipeline("text-generation", model=m, tokenizer=t)(
            ENDING, max_new_tokens=2
        ),
        "trust_remote_code=True",
    ),
    "a streamer": (
        lambda m, t: m.generate(
            **t.prompt(ENDING), max_new_tokens=2, streamer=transformers.TextStreamer(t)
        ),
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
        "chat_template is not supported",
    ),
    "the stock pipeline with a chat": (
        lambda m, t: transformers.pipeline("text-generation", model=m, tokenizer=t)(
            [{"role": "assistant", "content": "x"}]
        ),
        "trust_remote_code=True",
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
    "labels as text": (
        lambda _, t: t.decode(t.example("x", "y")["labels"]),
        "id -100 is not in the vocabulary",
    ),
    "ids of a larger vocabulary": (lambda _, t: t.decode([3, 10**6]), "id 1000000 is not in"),
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
            transformers.AutoTokenizer.from_pretrained(hf, trust_remote_code=True, **how)


@of_formats
def test_a_pair_is_read_as_one_text_after_the_other(
    direction: Direction, unit: Unit, export: ExportOf, codec: Codecs
) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(
        export(direction, unit), trust_remote_code=True
    )
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
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            tmp_path / str(number), trust_remote_code=True
        )
    config = json.loads((tmp_path / "1" / "tokenizer_config.json").read_text())
    assert (config["direction"], config["unit"]) == ("backward", "token")
    assert tokenizer.decode(tokenizer(ENDING)["input_ids"], skip_special_tokens=True) == ENDING
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 64
    with pytest.raises(Exception, match="trust_remote_code=True"):
        transformers.LlamaTokenizer.from_pretrained(tmp_path / "1")
    assert {path.name for path in (tmp_path / "1").glob("*.py")} == {
        path.name for path in REMOTE_CODE
    }
