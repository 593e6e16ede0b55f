"""Parsing of bodies: any bytes give a request or an error of status 4xx."""

import json
import time
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tools.serving import schemas
from tools.serving.errors import ProblemError
from tools.serving.parsing import REQUESTS, parse_body

INFILL = {"beginning": "a", "ending": "a"}
NUMBERS = st.sampled_from([0, -1, 1, 2**63, 10**4000, 1e300, -0.0, 0.5, True]) | st.integers()
TEXTS = st.text(max_size=8) | st.sampled_from(["\ud800", "a", "user", "text", "\x00"])
VALUES: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def parsed(path: str, body: bytes) -> "schemas.Body | ProblemError":
    try:
        return parse_body(REQUESTS[path], body)
    except ProblemError as error:
        problem = error
    assert 400 <= problem.status < 500
    assert 0 < len(problem.message) < 1000
    assert json.loads(bytes(problem.response().body))["error"]["message"] == problem.message
    return problem


@pytest.mark.parametrize("path", REQUESTS)
def test_any_json_value_of_any_field_is_parsed_or_rejected(path: str) -> None:
    fields = [*REQUESTS[path].model_fields, "none of them"]

    @given(st.dictionaries(st.sampled_from(fields) | TEXTS, VALUES, max_size=5))
    def try_out(values: dict[str, Any]) -> None:
        found = parsed(path, json.dumps(values).encode())
        if not isinstance(found, ProblemError):
            assert set(values) <= set(fields)

    try_out()


@given(st.binary(max_size=60), st.sampled_from(sorted(REQUESTS)))
@example(b"\xef\xbb\xbf{}", "/v1/score")
@example('{"texts": ["a"]}'.encode("utf-16"), "/v1/score")
@example(b'{"texts": ["a"], "texts": 1}', "/v1/score")
@example(b"-", "/v1/score")
@example(b'{"\\ud800": 1}', "/v1/score")
@example(b'{"seed": ' + b"9" * 5000 + b"}", "/v1/infill")
@example(b'{"temperature": -1e999}', "/v1/infill")
@example(b'{"temperature": Infinity}', "/v1/infill")
def test_any_bytes_are_parsed_or_rejected(body: bytes, path: str) -> None:
    parsed(path, body)


def filled(before: str, item: str, after: str) -> bytes:
    """A body of a mebibyte."""
    return (before + item * ((1 << 20) // len(item)) + after).encode()


@pytest.mark.parametrize(
    "body",
    [
        ("{" + ",".join(f'"{number}": 1' for number in range(80_000)) + "}").encode(),
        filled('{"prompt": [', "1,", "1]}"),
        filled('{"prompt": [["a"],', "[],", "[]]}"),
        filled('{"prompt": ["a",', "1,", '"a"]}'),
        filled('{"prompt": "a", "stop": [', "1,", "1]}"),
        filled('{"prompt": "a", "stop": [', '"a",', '"a"]}'),
        filled('{"texts": [', "1,", "1]}"),
        filled('{"messages": [', "{},", "{}]}"),
        filled('{"messages": [{"role": "user", "content": [', "{},", "{}]}]}"),
        filled('{"prompt": "a", "logit_bias": {"1": 1', ', "2": 1e5', "}}"),
        filled('{"temperature": 0.', "1", "}"),
        filled('{"prompt": ', "[", "}"),
        filled('{"a": ', '{"a": ', "}"),
        filled('{"prompt": "', "\\ud800", '"}'),
        filled('{"', "\\ud800", '": 1}'),
    ],
)
@pytest.mark.parametrize("path", REQUESTS)
def test_a_body_of_a_mebibyte_is_parsed_within_seconds(path: str, body: bytes) -> None:
    started_s = time.process_time()
    parsed(path, body)
    assert time.process_time() - started_s < 2  # a third of a second here


@pytest.mark.parametrize(
    ("path", "values", "words"),
    [
        ("completions", {"prompt": "a", "n": 65}, "n: Input should be less than or equal to 64"),
        ("completions", {"prompt": "a", "best_of": 2}, "best_of: Input should be 1"),
        ("completions", {"prompt": "a", "logprobs": 21}, "less than or equal to 20"),
        ("completions", {"prompt": "a", "top_logprobs": 21}, "top_logprobs: Extra"),
        ("completions", {"prompt": ["a"] * 65}, "at most 64 items"),
        ("completions", {"prompt": [[1]] * 65}, "at most 64 items"),
        ("completions", {"prompt": [1] * (2**20 + 1)}, "at most 1048576 items"),
        ("completions", {"prompt": "a", "stop": ["a"] * 5}, "at most 4 items"),
        ("completions", {"prompt": "a", "stop": ["a" * 201]}, "at most 200 characters"),
        ("completions", {"prompt": "a", "logit_bias": {"5": 1}}, "at most 0 items"),
        ("completions", {"prompt": "a", "temperature": 101}, "less than or equal to 100"),
        ("completions", {"prompt": "a", "seed": 2**53}, "less than or equal to 9007199254740991"),
        ("completions", {"prompt": "a", "max_tokens": 2**63}, "less than or equal to 92233720"),
        ("completions", {str(at): 1 for at in range(65)}, "65 fields; the limit is 64"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}] * 1025}, "1024 items"),
        ("chat/completions", {"messages": [], "n": 65}, "less than or equal to 64"),
        ("backchat", {"response": "a", "n": 65}, "less than or equal to 64"),
        ("score", {"texts": ["a"] * 65}, "at most 64 items"),
        ("infill", {**INFILL, "n": 65}, "less than or equal to 64"),
        ("infill", {**INFILL, "candidates": 65}, "less than or equal to 64"),
        ("infill", {**INFILL, "max_tokens": 257}, "less than or equal to 256"),
    ],
)
def test_values_above_a_limit_are_rejected_with_the_limit(
    path: str, values: dict[str, Any], words: str
) -> None:
    found = parsed(f"/v1/{path}", json.dumps(values).encode())
    assert isinstance(found, ProblemError)
    assert words in found.message
