"""Instruction examples from records, and errors of malformed records."""

import re

import pytest

from data_pipeline.errors import BadRecordError, ConfigError
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.text.chat_format import Example

ALPACA = ExampleColumns()


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_row_with_or_without_input_is_one_example() -> None:
    whole = {"instruction": "Sort.", "input": "b a", "output": "a b"}
    assert ALPACA.examples(whole, "x") == [Example("Sort. b a", "a b")]
    assert ALPACA.examples({**whole, "input": None}, "x") == [Example("Sort.", "a b")]
    assert ALPACA.examples({"instruction": "Go.", "output": "Gone."}, "x") == [
        Example("Go.", "Gone.")
    ]


def test_columns_can_have_other_names() -> None:
    columns = ExampleColumns.parse("instruction=prompt, output=answer")
    record = {"prompt": "Go.", "answer": "Gone.", "input": "now"}
    assert columns.examples(record, "x") == [Example("Go. now", "Gone.")]
    assert ExampleColumns.parse("") == ALPACA


@pytest.mark.parametrize("text", ["instruction", "output=", "prompt=x", "input=a,input=b"])
def test_an_invalid_mapping_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="`columns` contains"):
        ExampleColumns.parse(text)


def test_answered_user_turns_are_examples_and_system_messages_are_skipped() -> None:
    chat = messages(
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "I."),
        ("user", "Here is a poem."),
        ("system", "Be kind."),
        ("user", "Where?"),
        ("assistant", "Here."),
        ("assistant", "And there."),
        ("user", "unanswered"),
    )
    found = ALPACA.read({"messages": chat}, "a.jsonl:7")
    assert found.examples == [
        Example("Who?", "I."),
        Example("Here is a poem.\n\nWhere?", "Here.\n\nAnd there."),
    ]
    assert found.excluded == [
        ("system message", "a.jsonl:7"),
        ("system message", "a.jsonl:7"),
        ("question without an answer", "a.jsonl:7"),
    ]


@pytest.mark.parametrize("user", ["user", "human", "prompter", " User "])
@pytest.mark.parametrize(
    "assistant", ["assistant", "gpt", "chatgpt", "bing", "bard", "model", "ChatGPT", "Assistant"]
)
def test_roles_of_common_data_sets_are_recognized(user: str, assistant: str) -> None:
    found = ALPACA.read({"messages": messages((user, "Who?"), (assistant, "I."))}, "x")
    assert (found.examples, found.excluded) == ([Example("Who?", "I.")], [])


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}
HELLO = messages(("user", "Say hello."), ("assistant", "Hello."))
ASKED = messages(("user", "Weather?"))
AFTER = messages(("tool", "19 C"), ("assistant", "It is 19 C."), ("assistant", "More?"))
NO_TEXT = "exchange whose answer has no text, such as a tool call"
UNKNOWN = "exchange with a message of an unknown role"
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("others", "excluded"),
    [
        ([*ASKED, CALL, *AFTER], [(NO_TEXT, "x:1")]),
        ([*ASKED, {**CALL, "content": ""}, *AFTER], [(NO_TEXT, "x:1")]),
        ([*ASKED, {"role": "assistant"}], [(NO_TEXT, "x:1")]),
        ([*ASKED, {"role": "assistant", "content": 5}], [(NO_TEXT, "x:1")]),
        (AFTER, [("tool message and the answer to it", "x:1")]),
        ([*ASKED, *AFTER], [("tool message and the answer to it", "x:1")]),
        (ASKED, [("question without an answer", "x:1")]),
        ([*ASKED, {"role": "critic", "content": "Hm."}], [(UNKNOWN, "x:1: role 'critic'")]),
        ([*ASKED, {"content": "Hm."}], [(UNKNOWN, "x:1: role None")]),
        (
            [{"role": "user", "content": None}, {"role": "assistant", "content": "What?"}],
            [("exchange whose question has no text", "x:1")],
        ),
        (
            [{"role": "user", "content": [IMAGE]}, {"role": "assistant", "content": "A cat."}],
            [
                ("part of a message that is not text", "x:1: type 'image_url'"),
                ("exchange whose question has no text", "x:1"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_only_the_unreadable_exchange_is_skipped_and_its_cause_recorded(
    others: list[dict[str, object]], excluded: list[tuple[str, str]], is_first: bool
) -> None:
    chat = [*others, *HELLO] if is_first else [*HELLO, *others]
    if is_first and others == ASKED:
        return  # two consecutive user messages are one turn
    found = ALPACA.read({"messages": chat}, "x:1")
    assert found.examples == [Example("Say hello.", "Hello.")]
    assert found.excluded == excluded


def test_an_answer_before_any_question_is_skipped() -> None:
    found = ALPACA.read({"messages": [*messages(("assistant", "Welcome!")), *HELLO]}, "x:1")
    assert found.examples == [Example("Say hello.", "Hello.")]
    assert found.excluded == [("answer without a question", "x:1")]


def test_content_in_parts_is_read() -> None:
    parts = [{"type": "text", "text": "What is"}, IMAGE, {"type": "text", "text": "this?"}]
    chat = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A cat."}]},
    ]
    found = ALPACA.read({"messages": chat}, "x:1")
    assert found.examples == [Example("What is\nthis?", "A cat.")]
    assert found.excluded == [
        ("part of a message that is not text", "x:1: type 'image_url'"),
    ]


@pytest.mark.parametrize(
    ("record", "suggested"),
    [
        ({"conversations": HELLO, "id": 1}, "messages=conversations"),
        ({"talk": [{"from": "Kim", "value": "Hi."}]}, "messages=talk"),
        ({"prompt": "x", "completion": "y"}, "instruction=prompt,output=completion"),
        ({"Question": "x", "Answer": "y"}, "instruction=Question,output=Answer"),
        ({"instruction": "x", "response": "y"}, "instruction=instruction,output=response"),
        ({"conversation": "plain text", "id": 1}, ""),
        ({"text": "x"}, ""),
    ],
)
def test_columns_are_suggested_from_records(record: dict[str, object], suggested: str) -> None:
    with pytest.raises(BadRecordError) as caught:
        ALPACA.examples(record, "x:1")
    _, separator, found = str(caught.value).partition("perhaps `columns` ")
    assert found.partition(", or remove")[0] == suggested
    if separator:
        assert suggested in caught.value.place
        assert ExampleColumns.parse(suggested) != ALPACA


def test_messages_in_sharegpts_format_are_read() -> None:
    chat = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]
    columns = ExampleColumns.parse("messages=conversations")
    assert columns.examples({"conversations": chat}, "x") == [Example("Who?", "I.")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "no columns 'instruction' and 'output', and no 'messages'"),
        ({"instruction": "Go."}, "no columns 'instruction' and 'output'"),
        ({"instruction": 1, "output": "x"}, "'instruction' is of type int, not text"),
        ({"instruction": "x", "output": None}, "'output' is null, not text"),
        ({"instruction": "x", "input": [], "output": "x"}, "'input' is of type list, not text"),
        ({"messages": None, "id": 1}, "'messages' is null, not a list of messages"),
        ({"messages": "hello"}, "'messages' is of type str, not a list of messages"),
        ({"messages": ["hello"]}, "'messages' is of type str, not a list of messages"),
        ({"messages": [{"role": "user"}]}, "(exchange whose question has no text)"),
        ({"messages": messages(("user", "Who?"))}, "no user message in 'messages' has an answer"),
        ({"messages": [*ASKED, CALL]}, "has an answer (exchange whose answer has no text"),
        ({"messages": []}, "no user message in 'messages' has an answer (no user message)"),
    ],
)
def test_a_record_without_an_example_is_bad(record: dict[str, object], message: str) -> None:
    with pytest.raises(BadRecordError, match=re.escape("a.jsonl:3: ")) as caught:
        ALPACA.examples(record, "a.jsonl:3")
    assert message in str(caught.value)
