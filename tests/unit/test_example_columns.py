"""From a record to instruction examples: what is read, and what is refused in which words."""

import re

import pytest

from data_pipeline.chat_format import Example
from data_pipeline.errors import BadRecordError, ConfigError
from data_pipeline.example_columns import ExampleColumns

ALPACA = ExampleColumns()


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_row_is_one_example_with_or_without_input() -> None:
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
def test_a_mapping_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--columns has"):
        ExampleColumns.parse(text)


def test_each_answered_message_of_a_user_is_an_example_and_what_a_system_says_is_none() -> None:
    chat = messages(
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "I."),
        ("user", "unanswered"),
        ("user", "Where?"),
        ("assistant", "Here."),
        ("assistant", "And there."),
    )
    assert ALPACA.examples({"messages": chat}, "x") == [
        Example("Who?", "I."),
        Example("Where?", "Here."),
    ]


def test_messages_in_sharegpts_words_are_read() -> None:
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
        ({"messages": "hello"}, "'messages' is of type str, not a list of messages"),
        ({"messages": ["hello"]}, "'messages' is of type str, not a list of messages"),
        ({"messages": [{"role": "user"}]}, "no text under 'content' or 'value'"),
        ({"messages": messages(("user", "Who?"))}, "no message of a user in 'messages'"),
        ({"messages": []}, "no message of a user in 'messages'"),
    ],
)
def test_a_record_that_holds_no_example_is_bad_and_says_why(
    record: dict[str, object], message: str
) -> None:
    with pytest.raises(BadRecordError, match=re.escape("a.jsonl:3: ")) as caught:
        ALPACA.examples(record, "a.jsonl:3")
    assert message in str(caught.value)
