"""The exported tokenizer with byte-level BPE, against `TextCodec`; stock classes load none."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import megaback
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.tokenizer.markers import with_markers
from megaback.inference.sampling import SamplingOptions
from tests.helpers.bpe import NUM_IDS, qwen_content
from tests.helpers.exports import write_checkpoint
from tools.convert import convert

TEXTS = [
    "The captain's ship <think>sailed</think> in 1999.\n\n  caf\u00e9 \u8239 \U0001f600",
    "\ud83d <|im_end|><|startoftext|> \u2581 \x00 e\u0301",
    "",
]
ExportOf = Callable[..., Path]


@pytest.fixture(scope="module")
def of_bpe(
    export: ExportOf,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, TextCodec]:
    """A Qwen3 with a Qwen tokenizer, whose embedding has more rows than it needs."""
    folder = tmp_path_factory.mktemp("bpe")
    content = with_markers(qwen_content(), NUM_IDS + 40).content
    codec = TextCodec(content, Direction.BACKWARD, Unit.TOKEN)
    write_checkpoint(folder / "run", codec, qk_norm=True)
    convert(folder / "run", folder / "model", "hf", "float32")
    return folder / "model", codec


@pytest.fixture(scope="module")
def loaded(of_bpe: tuple[Path, TextCodec]) -> Any:
    return AutoTokenizer.from_pretrained(of_bpe[0], trust_remote_code=True)


def test_ids_and_texts_are_the_codec_s(of_bpe: tuple[Path, TextCodec], loaded: Any) -> None:
    _, codec = of_bpe
    in_a_process = pickle.loads(pickle.dumps(loaded))  # of `map` with num_proc
    for text in TEXTS:
        ids = loaded(text)["input_ids"]
        assert ids == [codec.begin_id, *codec.encode(text).tolist()]
        assert in_a_process(text)["input_ids"] == copy.deepcopy(loaded)(text)["input_ids"] == ids
        assert loaded.decode(ids, skip_special_tokens=True) == text
    assert loaded.vocab_size == codec.vocab_size
    assert loaded._pieces.texts == [codec.piece_bytes(i) for i in range(codec.vocab_size)]
    assert loaded.convert_tokens_to_ids("<|startoftext|>") == codec.begin_id


def test_a_prompt_and_a_greedy_sample_are_ours(of_bpe: tuple[Path, TextCodec], loaded: Any) -> None:
    folder, codec = of_bpe
    ending = "is not supported"
    prompt = loaded.prompt(ending)
    expected = codec.prompt(ending)
    assert prompt["input_ids"].tolist() == [expected.ids]
    assert prompt["logits_processor"][0].first_ids == [expected.first_ids.tolist()]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=12)[0]
    options = SamplingOptions(temperature=0.0, max_new_tokens=12)
    (ours,) = megaback.load(folder, device="cpu").complete_many([ending], options)
    assert loaded.decode(ids, skip_special_tokens=True) == ours
    assert len(ours) > len(ending)


def test_a_saved_copy_is_equal_and_stock_classes_load_none(
    of_bpe: tuple[Path, TextCodec], loaded: Any, tmp_path: Path
) -> None:
    loaded.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert copy(TEXTS[0])["input_ids"] == loaded(TEXTS[0])["input_ids"]
    for folder in (of_bpe[0], tmp_path):
        with pytest.raises(Exception, match="trust_remote_code"):
            PreTrainedTokenizerFast.from_pretrained(folder)
