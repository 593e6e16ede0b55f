"""Chats and examples of an export: ids of BackChat's format, and what it cannot express."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import transformers

from data_pipeline.text.chat_format import ChatFormat, Example
from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.exports import of_formats

Codecs = Callable[..., TextCodec]
ExportOf = Callable[..., Any]
QUESTION, GIVEN_INPUT, ANSWER = " Who <|im_end|> is it? ", "\u2581 a\ud800", "A <|response|> ☃.\n"
ASKED = {"role": "user", "content": f"{QUESTION.strip()} {GIVEN_INPUT.strip()}"}
ANSWERED = {"role": "assistant", "content": ANSWER}


@of_formats
def test_examples_and_chats_have_the_ids_of_an_instruction_data_set(
    direction: Direction, unit: Unit, export: ExportOf, codec: Codecs
) -> None:
    """Also where a text spells markers; loss is on the part that the model writes."""
    loaded = transformers.AutoTokenizer.from_pretrained(
        export(direction, unit), trust_remote_code=True
    )
    expected = ChatFormat(codec(direction, unit)).encode(Example.of(QUESTION, GIVEN_INPUT, ANSWER))
    ids, num_given = expected.ids.tolist(), expected.num_given
    mask = [0] * num_given + [1] * (len(ids) - num_given)

    example = loaded.example(QUESTION, ANSWER, input=GIVEN_INPUT)
    assert example["input_ids"] == ids
    assert example["labels"] == [-100] * num_given + ids[num_given:]
    assert example["attention_mask"] == [1] * len(ids)
    columns = loaded.example([QUESTION, "b"], [ANSWER, "c"], input=[GIVEN_INPUT, None])
    assert [columns[name][0] for name in example] == list(example.values())
    assert columns["input_ids"][1] == loaded.example("b", "c")["input_ids"]

    chat = loaded.apply_chat_template(
        [ASKED, ANSWERED], return_assistant_tokens_mask=True, return_dict=True
    )
    assert (chat["input_ids"], chat["assistant_masks"]) == (ids, mask)
    given = ANSWERED if direction is Direction.BACKWARD else ASKED
    for how in ({}, {"add_generation_prompt": True}):
        assert loaded.apply_chat_template([given], return_dict=False, **how) == ids[:num_given]
    opened = loaded.apply_chat_template([given], add_generation_prompt=False)["input_ids"]
    assert opened == ids[: num_given - 2]
    prompt = loaded.chat_prompt(given["content"].strip())
    found = loaded.apply_chat_template([given], return_tensors="pt")
    assert found["input_ids"].tolist() == prompt["input_ids"].tolist()

    batch = loaded.apply_chat_template(
        [[ASKED, ANSWERED], [given]],
        padding=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    assert batch["input_ids"][0].tolist() == ids
    assert batch["input_ids"][1, -num_given:].tolist() == ids[:num_given]
    assert batch["assistant_masks"].tolist() == [mask, [0] * len(ids)]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids), num_given]
    assert loaded.written(batch["input_ids"])[0] == (
        ASKED["content"] if direction is Direction.BACKWARD else ANSWER.strip()
    )


SYSTEM = {"role": "system", "content": "Be brief."}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a system message": (lambda t: t.apply_chat_template([SYSTEM, ANSWERED]), "role 'system'"),
    "a second turn": (
        lambda t: t.apply_chat_template([ASKED, ANSWERED, ASKED]),
        "more than one message of 'user'",
    ),
    "an answer before its question": (
        lambda t: t.apply_chat_template([ANSWERED, ASKED]),
        "follows one of the assistant",
    ),
    "a question alone": (lambda t: t.apply_chat_template([ASKED]), "no message of 'assistant'"),
    "no message": (lambda t: t.apply_chat_template([]), "conversation is empty"),
    "an empty message": (
        lambda t: t.apply_chat_template([{"role": "assistant", "content": " "}]),
        "message of 'assistant' is empty",
    ),
    "no text": (
        lambda t: t.apply_chat_template([{"role": "assistant", "content": None}]),
        "not a message of text",
    ),
    "an image": (
        lambda t: t.apply_chat_template(
            [{"role": "assistant", "content": [{"type": "image", "url": "x"}]}]
        ),
        "not a message of text",
    ),
    "a call of a tool": (
        lambda t: t.apply_chat_template([{**ANSWERED, "tool_calls": [{"name": "x"}]}]),
        "'tool_calls'",
    ),
    "a prompt of a whole chat": (
        lambda t: t.apply_chat_template([ASKED, ANSWERED], add_generation_prompt=True),
        "is the one that the model writes",
    ),
    "a prompt that fills the context": (
        lambda t: t.apply_chat_template([{"role": "assistant", "content": "x y " * 40}]),
        "context of 64",
    ),
    "text": (lambda t: t.apply_chat_template([ANSWERED], tokenize=False), "tokenize=False"),
    "tools": (lambda t: t.apply_chat_template([ANSWERED], tools=[len]), "tools is not supported"),
    "an open message": (
        lambda t: t.apply_chat_template([ANSWERED], continue_final_message=True),
        "continue_final_message",
    ),
    "documents": (
        lambda t: t.apply_chat_template([ANSWERED], documents=["x"]),
        "documents is not supported",
    ),
    "another stored template": (
        lambda t: setattr(t, "chat_template", "{{ messages }}"),
        "cannot take another chat template",
    ),
    "truncation": (lambda t: t.apply_chat_template([ANSWERED], truncation=True), "truncation"),
    "an option of a template": (
        lambda t: t.apply_chat_template([ANSWERED], enable_thinking=True),
        "enable_thinking",
    ),
    "an example without an instruction": (lambda t: t.example(" ", "x"), "instruction is empty"),
    "an example without a response": (lambda t: t.example("x", ""), "response is empty"),
    "an example of two kinds": (lambda t: t.example("x", ["y"]), "or a list of each"),
    "examples of two lengths": (lambda t: t.example(["x", "z"], ["y"]), "not as long"),
    "one input of several examples": (lambda t: t.example(["x"], ["y"], "z"), "not as long"),
    "a missing instruction": (lambda t: t.example(["x", None], ["y", "z"]), "instruction is empty"),
    "new ids alone": (lambda t: t.written([1, 2]), "pass the prompt's ids too"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_format_cannot_express_is_refused(name: str, tokenizer: Any) -> None:
    use, message = REFUSED[name]
    with pytest.raises((ValueError, NotImplementedError, TypeError), match=re.escape(message)):
        use(tokenizer)


def test_what_a_server_tries_at_startup_is_a_value_error(tokenizer: Any) -> None:
    """vLLM ends with any other error."""
    for option in ({"cohere_format": True}, {"enable_thinking": False}):
        with pytest.raises(ValueError, match=r"not supported|no message of 'assistant'"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}], **option)


def test_the_stored_template_is_an_error_for_programs_that_render_text(
    tokenizer: Any, tmp_path: Any
) -> None:
    """Also after the tokenizer is saved."""
    tokenizer.save_pretrained(tmp_path)
    for loaded in (
        tokenizer,
        transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        stock = transformers.PreTrainedTokenizerBase.apply_chat_template
        with pytest.raises(Exception, match="chats of this model are ids"):
            stock(loaded, [ANSWERED], tokenize=False)
        assert loaded.apply_chat_template([ANSWERED], chat_template=loaded.chat_template)


@pytest.mark.parametrize("direction", Direction)
def test_the_pipeline_answers_messages(direction: Direction, export: ExportOf) -> None:
    """Alone, in batches and streamed, as `chat_prompt` and `written` do."""
    folder = str(export(direction))
    write = transformers.pipeline("megaback-reverse", model=folder, trust_remote_code=True)
    given, role = (ANSWERED, "user") if direction is Direction.BACKWARD else (ASKED, "assistant")
    how = {"do_sample": False, "max_new_tokens": 12}
    text = given["content"].strip()
    ids = write.model.generate(**write.tokenizer.chat_prompt(text), **how)
    answer = {"role": role, "content": write.tokenizer.written(ids)[0]}
    kept = {**given, "content": text}
    whole = [answer, kept] if direction is Direction.BACKWARD else [kept, answer]

    assert write([given], **how) == [{"generated_text": whole}]
    assert write([[given], [given]], batch_size=2, **how) == [[{"generated_text": whole}]] * 2
    parts: list[str] = []
    streamer = write.tokenizer.streamer(parts.append)
    found = write([given], streamer=streamer, return_full_text=False, **how)
    assert found == [{"generated_text": answer["content"]}]
    assert (
        "".join(reversed(parts) if direction is Direction.BACKWARD else parts)
        == (answer["content"])
    )
    with pytest.raises(ValueError, match="has both messages"):
        write(whole, **how)


def test_an_export_of_examples_ends_chats_by_plain_ids(export: ExportOf) -> None:
    """`generate` without the rules of `chat_prompt` may write the end marker and stops there."""
    folder = export(on_examples=True)
    loaded = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = transformers.GenerationConfig.from_pretrained(folder)
    stop_id = loaded.chat_format.stop_id
    assert config.eos_token_id == [loaded.eos_token_id, stop_id]
    assert not {stop_id, loaded.eos_token_id} & {*config.suppress_tokens}
    plain = transformers.GenerationConfig.from_pretrained(export())
    assert plain.eos_token_id == loaded.eos_token_id
    assert stop_id in plain.suppress_tokens
