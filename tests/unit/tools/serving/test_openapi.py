"""Server against its OpenAPI description: generated requests get described answers, never a 5xx."""

from collections.abc import Callable, Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode

# A valid request may still exceed this model's context or limits, or not suit its direction.
from schemathesis.checks import positive_data_acceptance

from data_pipeline.text.codec import TextCodec
from tests.helpers.server import Running, serving, tiny_models
from tools.serving.request_limits import Limits

OPERATIONS = [
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /v1/backchat",
    "POST /v1/score",
    "POST /v1/infill",
]


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]
) -> Iterator[Running]:
    limits = Limits(tokens=24, request_s=20)
    with serving(tiny_models(tmp_path_factory.mktemp("serve"), codec), limits) as running:
        yield running


@pytest.fixture(scope="module")
def operations(running: Running) -> dict[str, schemathesis.schemas.APIOperation]:
    description = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    found = [one.ok() for one in description.get_all_operations()]
    return {one.label: one for one in found}


def test_every_described_operation_is_tested(
    operations: dict[str, schemathesis.schemas.APIOperation],
) -> None:
    assert sorted(operations) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        for name in OPERATIONS
        if name.startswith("POST") or mode is GenerationMode.POSITIVE  # a GET has no invalid input
    ],
)
def test_answers_match_the_description(
    operations: dict[str, schemathesis.schemas.APIOperation], name: str, mode: GenerationMode
) -> None:
    @settings(max_examples=25, suppress_health_check=list(HealthCheck))
    @given(operations[name].as_strategy(generation_mode=mode))
    def answer(case: Case) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)

    answer()
