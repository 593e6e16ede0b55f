"""Generation with an export: prompts, batches, the pipeline and the end of the context."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.exports import of_formats

Codecs = Callable[..., TextCodec]
ExportOf = Callable[..., Path]
ENDING = "and they lived happily ever after."


def test_the_pipeline_of_an_export_matches_generate(hf: Path, tokenizer: Any, model: Any) -> None:
    write = transformers.pipeline("text-generation", model=str(hf), trust_remote_code=True)
    how = {"do_sample": False, "max_new_tokens": 8}
    ids = model.generate(**tokenizer.prompt(ENDING), **how)[0]
    expected = tokenizer.decode(ids, skip_special_tokens=True)

    assert expected.endswith(ENDING)
    assert write(ENDING, **how) == [{"generated_text": expected}]
    only_new = write([ENDING, ENDING], return_full_text=False, **how)
    assert only_new == [[{"generated_text": expected.removesuffix(ENDING)}]] * 2
    assert len(write(ENDING, num_return_sequences=2, max_new_tokens=2)) == 2


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
