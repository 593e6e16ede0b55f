"""Generation with an export: prompts, batches, the pipeline and the end of the context."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

import megaback
from data_pipeline.text.codec import Direction, TextCodec, Unit
from megaback.inference.sampling import SamplingOptions
from tests.helpers.exports import of_formats

Codecs = Callable[..., TextCodec]
ExportOf = Callable[..., Path]
ENDING = "and they lived happily ever after."


@of_formats
def test_the_pipeline_writes_what_megaback_writes(
    direction: Direction, unit: Unit, export: ExportOf
) -> None:
    """Greedily: alone, in batches of texts of other lengths, streamed, and up to a stop text."""
    folder = export(direction, unit)
    write = transformers.pipeline("megaback-reverse", model=str(folder), trust_remote_code=True)
    texts = [ENDING, "the end.", "Ünd ☃", ""]
    how = {"do_sample": False, "max_new_tokens": 12}
    options = SamplingOptions(temperature=0, max_new_tokens=12)
    wholes = megaback.load(folder).complete_many(texts, options)
    is_backward = direction is Direction.BACKWARD
    without = str.removesuffix if is_backward else str.removeprefix
    new = [without(whole, text) for whole, text in zip(wholes, texts, strict=True)]

    assert [write(text, **how) for text in texts] == [[{"generated_text": one}] for one in wholes]
    assert write(texts, batch_size=3, **how) == [[{"generated_text": one}] for one in wholes]
    how["return_full_text"] = False
    assert write(texts, batch_size=4, **how) == [[{"generated_text": one}] for one in new]

    stop = new[0][3:6]
    parts: list[str] = []
    for stops in (None, [stop, "never written"]):
        parts.clear()
        streamer = write.tokenizer.streamer(parts.append)
        (found,) = write(ENDING, stop=stops, streamer=streamer, **how)
        assert all(parts)
        assert "".join(reversed(parts) if is_backward else parts) == found["generated_text"]
    expected = new[0].rpartition(stop)[2] if is_backward else new[0].partition(stop)[0]
    assert found["generated_text"] == expected != new[0]
    assert write([ENDING, ""], stop=stop, batch_size=2, **how)[0] == [found]


def test_a_row_ends_at_its_stop_text(tokenizer: Any, hf: Path) -> None:
    """The held-back piece of the given text, which is in the first new id, is no stop text."""
    loader = transformers.dynamic_module_utils.get_class_from_dynamic_module
    stop_at_text = loader("generation_megaback.StopAtText", str(hf))
    given_tokens = tokenizer.prompt("x.")["input_ids"].shape[1]
    samples_BT = tokenizer(["it was x.", "he was x."], padding=True, padding_side="right")
    for stop, ends in (("it", [True, False]), ("was", [True, True]), ("x", [False, False])):
        stops = stop_at_text(given_tokens, [tokenizer.new_text("x.", stop)])
        assert stops(torch.tensor(samples_BT.input_ids), None).tolist() == ends


def test_several_samples_of_a_prompt_are_apart(hf: Path) -> None:
    write = transformers.pipeline("text-generation", model=str(hf), trust_remote_code=True)
    found = write(
        [ENDING, "x"], batch_size=2, num_return_sequences=2, num_beams=2, max_new_tokens=2
    )
    assert [[one["generated_text"][-1] for one in row] for row in found] == [[".", "."], ["x", "x"]]
    (long,) = write("x", min_new_tokens=50)  # as the text may end early
    assert len(write.tokenizer(long["generated_text"]).input_ids) > 30  # not 20 new ones


def test_options_of_generate_are_added_to_those_of_a_prompt_or_refused(hf: Path) -> None:
    write = transformers.pipeline("megaback-reverse", model=str(hf), trust_remote_code=True)
    how = {"do_sample": False, "max_new_tokens": 4, "return_full_text": False}
    ((first,),) = write(["x"], **how)
    decode, character = write.tokenizer.decode, first["generated_text"][-1]
    unwanted = [i for i in range(len(write.tokenizer)) if character in decode([i])]

    (other,) = write("x", suppress_tokens=unwanted, logits_processor=[], **how)
    assert character not in other["generated_text"]
    assert write("x", return_dict_in_generate=True, **how) == [first]
    assert write([], **how) == []
    assert write(Dataset.from_dict({"text": ["x"]})["text"], **how) == write(("x",), **how)
    with pytest.raises(ValueError, match="eos_token_id cannot be given"):
        write("x", eos_token_id=5, **how)
    for wrong in (None, 5, [None]):
        with pytest.raises(TypeError, match="give a text, the messages of a chat"):
            write(wrong, **how)


STREAMED_WRONGLY: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a batch": (lambda t: t.prompt([ENDING, "x"]), "one text at a time, and 2"),
    "samples": (lambda t: {**t.prompt(ENDING), "num_return_sequences": 2}, "at a time, and 2"),
    "another text": (lambda t: t.prompt("x"), "streamer(given=text)"),
}


@pytest.mark.parametrize("name", STREAMED_WRONGLY)
def test_a_streamer_refuses_what_it_cannot_show(name: str, tokenizer: Any, model: Any) -> None:
    asked, message = STREAMED_WRONGLY[name]
    streamer = tokenizer.streamer(given=ENDING)
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**asked(tokenizer), max_new_tokens=2, streamer=streamer)


def test_a_streamer_is_iterated_while_another_thread_generates(tokenizer: Any, model: Any) -> None:
    """The whole text so far, of a prompt with a held-back piece, of plain ids and of a chat."""
    how = {"do_sample": False, "max_new_tokens": 8}
    plain = tokenizer(ENDING, return_tensors="pt")
    for prompt, given in ((tokenizer.prompt(ENDING), ENDING), (plain, ENDING)):
        streamer = tokenizer.streamer(given=given, whole=True, timeout_s=60)
        ids = model.generate(**prompt, **how)[0]
        thread = Thread(target=model.generate, kwargs={**prompt, **how, "streamer": streamer})
        thread.start()
        shown = list(streamer)
        thread.join()
        assert all(later.endswith(text) for text, later in pairwise(shown))
        assert shown[-1] == tokenizer.decode(ids, skip_special_tokens=True)
    chat = tokenizer.chat_prompt(ENDING)
    streamer = tokenizer.streamer()
    ids = model.generate(**chat, **how, streamer=streamer)[0]
    assert "".join(reversed(list(streamer))) == tokenizer.written(ids)


def test_a_forward_export_works_with_stock_pipelines_and_streamers(
    export: ExportOf, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = export(Direction.FORWARD)
    loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    stock = transformers.pipeline("text-generation", model=model, tokenizer=loaded)
    (found,) = stock("Once upon", do_sample=False, max_new_tokens=4)
    assert found["generated_text"].startswith("Once upon")
    given = loaded("Once upon", return_tensors="pt")
    model.generate(
        **given, do_sample=False, max_new_tokens=4, streamer=transformers.TextStreamer(loaded)
    )
    assert "Once upon" in capsys.readouterr().out


@of_formats
def test_a_batch_of_prompts_generates_the_same_as_each_alone(
    direction: Direction, unit: Unit, export: ExportOf
) -> None:
    folder = export(direction, unit)
    loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
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
