"""Models and tokens for a size, a time or a number of FLOPs."""

from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError
from megaback.planning.budget import Budget, sized_run
from megaback.planning.data_summary import DataSummary
from megaback.planning.flops import ModelSize, flops_per_token
from megaback.planning.scaling_rules import muon_flops

NONE_YET = DataSummary.assumed(4096)


@pytest.mark.parametrize("parameters", [1e6, 3.3e6, 1e7, 5e7, 124e6, 350e6, 1e9, 7e9, 13e9])
def test_a_size_is_met_within_a_few_percent(parameters: float) -> None:
    run = sized_run(Budget(parameters=parameters), NONE_YET)
    size = ModelSize.of(run.shape, 4096)

    assert size.total == pytest.approx(parameters, rel=0.1 if parameters < 3e6 else 0.05)
    assert run.tokens == 12 * run.parameters


@pytest.mark.parametrize("flops", [1e15, 1e17, 1e19, 1e21, 1e23])
def test_flops_are_spent_on_a_usual_number_of_tokens_per_parameter(flops: float) -> None:
    run = sized_run(Budget(flops=flops), NONE_YET)
    attended = (run.context_tokens + 1) / 2

    assert run.tokens * flops_per_token(run.shape, 4096, attended) == pytest.approx(flops)
    assert 8 < run.tokens_per_parameter < 18


def test_time_is_spent_on_steps_and_their_updates() -> None:
    budget = Budget(seconds=600.0, sustained_flops=5e10)
    run = sized_run(budget, NONE_YET)
    steps = run.tokens / run.batch_tokens
    flops = run.tokens * flops_per_token(run.shape, 4096, (run.context_tokens + 1) / 2)

    assert flops + steps * muon_flops(run.shape) == pytest.approx(3e13, rel=1e-3)
    larger = sized_run(budget.at_rate(5e11), NONE_YET)
    assert larger.parameters > run.parameters
    assert larger.tokens > run.tokens


def test_a_short_run_of_a_large_model_has_a_batch_that_muons_update_does_not_dominate() -> None:
    short, long = (
        sized_run(Budget(parameters=1e7, seconds=seconds, sustained_flops=5e10), NONE_YET)
        for seconds in (240.0, 24_000.0)
    )

    assert short.batch_tokens > 2 * short.ladder_batch_tokens
    assert long.batch_tokens == long.ladder_batch_tokens > short.batch_tokens


def test_a_size_with_a_budget_has_the_tokens_of_the_budget() -> None:
    sized = sized_run(Budget(parameters=1e6), NONE_YET)
    both = sized_run(Budget(parameters=1e6, flops=1e12), NONE_YET)

    assert both.shape == sized.shape
    assert both.tokens < sized.tokens


def test_epochs_are_capped_and_the_rest_goes_into_the_model() -> None:
    few = DataSummary(shards="few", vocab_size=4096, train_tokens=1_000_000)
    free, capped = (sized_run(Budget(flops=3e13), data) for data in (NONE_YET, few))

    assert free.tokens > 4_000_000 >= capped.tokens
    assert capped.parameters > free.parameters
    # With far too little text, no model is chosen that has under 3 tokens per parameter.
    starved = sized_run(Budget(flops=1e18), few)
    assert starved.is_capped
    assert starved.tokens == 4_000_000
    assert starved.tokens_per_parameter >= 3


@pytest.mark.parametrize(
    ("parameters", "message"), [(1000, "the smallest model has"), (1e15, "give at most")]
)
def test_a_size_without_a_model_is_refused(parameters: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sized_run(Budget(parameters=parameters), NONE_YET)


def test_a_data_set_is_summarized(finished: Path) -> None:
    data = DataSummary.of(str(finished))
    assert data.data_set is not None
    frame = data.data_set.manifest.frame_tokens

    assert data.train_tokens
    assert data.long_tokens
    for context in (64, 256, 4096):
        fitting = data.fitting_context(context)
        assert fitting <= context
        assert frame % fitting == 0
    assert data.fitting_context(1 << 20) <= max(2 * data.long_tokens, 256)
    assert 0 < data.attended_tokens(256) < 256
