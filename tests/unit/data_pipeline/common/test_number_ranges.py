"""Ranges of all numbers in options, configs, requests and records."""

import json
import math
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel, ValidationError

from data_pipeline.common import number_ranges
from data_pipeline.common.number_ranges import (
    COUNT,
    FP32_MAX,
    INT64_MAX,
    NUMBER,
    POSITIVE,
    Range,
    finite_json,
)
from data_pipeline.errors import BadRecordError
from data_pipeline.sources.documents import Columns, documents_of
from megaback import config
from megaback.cli import main
from tests.helpers.commands import COMMANDS
from tools import infill
from tools.serving import schemas

NOT_NUMBERS = ["nan", "inf", "-inf", "1e39", "-1e39"]
TOO_LARGE = [INT64_MAX + 1, -INT64_MAX - 2]


def number_options() -> Iterator[tuple[str, click.Parameter]]:
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if "int" in parameter.type.name or "float" in parameter.type.name:
                yield f"{name} {parameter.opts[0]}", parameter


OPTIONS = dict(number_options())


def test_the_options_of_all_commands_are_checked() -> None:
    assert len(OPTIONS) > 80
    assert {"plan --training-tokens", "shards build --weight", "rerank --weight"} <= set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_number_of_an_option_is_finite_and_in_a_range(name: str) -> None:
    kind = OPTIONS[name].type
    assert isinstance(getattr(kind, "allowed", None), Range), f"{name}: {kind}"
    large = TOO_LARGE if isinstance(kind, click.IntRange) else []
    for text in [*NOT_NUMBERS, *map(str, large)]:
        with pytest.raises(click.BadParameter):
            kind.convert(text, None, None)


def models(*bases: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for base in bases:
        yield base
        yield from models(*base.__subclasses__())


# Models of input; output is not validated.
MODELS = dict.fromkeys(models(config.Section, schemas.Body, infill.Request))


def number_schemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for part in schema:
            yield from number_schemas(part)
    elif isinstance(schema, dict):
        if schema.get("type") in ("number", "integer") and not {"const", "enum"} & schema.keys():
            yield schema
        for key, part in schema.items():
            if key != "$defs":
                yield from number_schemas(part)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_number_of_a_body_and_of_a_config_is_finite_and_in_a_range(
    model: type[BaseModel],
) -> None:
    for name, field in model.model_json_schema().get("properties", {}).items():
        for schema in number_schemas(field):
            assert {"minimum", "exclusiveMinimum"} & schema.keys(), name
            assert {"maximum", "exclusiveMaximum"} & schema.keys(), name
            large = TOO_LARGE if schema["type"] == "integer" else []
            for value in [*map(float, NOT_NUMBERS), *large]:
                with pytest.raises(ValidationError) as caught:
                    model.model_validate({name: value})
                assert name in {error["loc"][0] for error in caught.value.errors() if error["loc"]}


def test_the_numbers_of_all_models_are_checked() -> None:
    fields = [schema for model in MODELS for schema in number_schemas(model.model_json_schema())]
    assert len(fields) > 50


@pytest.mark.parametrize(
    "allowed",
    [found for found in vars(number_ranges).values() if isinstance(found, Range)],
    ids=str,
)
def test_a_range_means_the_same_to_click_and_pydantic(allowed: Range) -> None:
    from typing import Annotated

    from pydantic import TypeAdapter

    kind = int if allowed.is_whole else float
    adapter = TypeAdapter(Annotated[kind, allowed])
    for value in (allowed.min, allowed.max, allowed.min - 1, allowed.max + 1, 0, 1, 2.0**70):
        is_right = allowed.problem(value) is None
        given = int(value) if allowed.is_whole else float(value)
        try:
            adapter.validate_python(given)
            allowed.option.convert(str(given), None, None)
        except (ValidationError, click.BadParameter):
            assert not is_right
        else:
            assert is_right
    assert allowed.problem(math.nan) == "not a finite number"


def test_storage_limits_are_shown_only_if_exceeded() -> None:
    assert COUNT.described() == "x>=1"
    assert COUNT.problem(0) == "not in the range x>=1"
    assert COUNT.problem(INT64_MAX + 1) == f"not in the range 1<=x<={INT64_MAX}"
    assert NUMBER.described() == "x"
    assert POSITIVE.described() == "x>0"
    assert POSITIVE.problem(-1) == "not in the range x>0"
    assert POSITIVE.problem(1e-40) == "not in the range x>=1.1754944e-38"
    assert "3.4028235e+38" in (NUMBER.problem(FP32_MAX * 2) or "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", ".", "--temp", "inf"], "'--temp': inf is not a finite number"),
        (["sample", ".", "--temp", "1e39"], "'--temp': 1e+39 is not in the range 0<=x<=100"),
        (
            ["plan", "configs/demo.yaml", "--training-tokens", "nan"],
            "'--training-tokens': nan is not a finite",
        ),
        (["rerank", ".", "--in", "a", "--out", "b", "--weight", "nan"], "'--weight': nan is not"),
        (["shards", "build", "--min-language-score", "nan"], "'--min-language-score': nan"),
        (["shards", "build", "--weight", "inf"], "'--weight': inf is not a finite number"),
        (["shards", "build", "--limit-tokens", "-1"], "'--limit-tokens': -1 is not in the range"),
        (["sample", ".", "--seed", "99999999999999999999"], "'--seed': 99999999999999999999"),
        (["convert", ".", "--max-shard-size", "9" * 400 + "TB"], "is not a size"),
        (["backtranslate", ".", "--min-score", "nan"], "'--min-score': nan"),
    ],
)
def test_a_usage_error_names_the_option_and_has_code_2(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, words in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize("text", ["NaN", "[1, Infinity]", '{"a": -Infinity}', "1e999"])
def test_finite_json_refuses_nan_and_infinity(text: str) -> None:
    json.loads(text)
    with pytest.raises(ValueError, match="number"):
        finite_json(text)


@pytest.mark.parametrize("score", [math.nan, math.inf, 10**400])
def test_a_non_finite_score_is_an_error_of_the_record(score: float) -> None:
    record = {"text": "a", "language_score": score}
    with pytest.raises(BadRecordError, match="not a finite number"):
        list(documents_of(record, Columns("text", None, "language_score"), "a.jsonl:1", "a"))
