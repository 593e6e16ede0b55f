"""Rows of published benchmarks as choices, in the words of lm_eval's tasks.

Each format states the task of lm_eval 0.4.13 that it follows and that task's version, so that a
forward model's accuracy is the one that lm_eval reports. Columns are those of the data set on the
hub; where saved copies have others, both are read.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megaback.scoring.choices import Choice

Fields = Mapping[str, Any]

_LETTERS = "ABCDE"


@dataclass(frozen=True)
class ChoiceRow:
    """The choices of a row, and the number of the correct one."""

    choices: tuple[Choice, ...]
    label: int
    texts: tuple[str, ...]
    """Answers whose lengths normalize the scores of `acc_norm`."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark: where its rows are, and how they become choices."""

    hub: str
    """Data set on the hub."""
    config: str | None = None
    saved: str
    """Folder of its saved copies, within which each split has one."""
    splits: tuple[str, ...]
    """Splits that are evaluated, the one of lm_eval first."""
    row: Callable[[Fields], ChoiceRow]
    task: str
    """Task of lm_eval, with its version."""
    num_choices: int = 4
    """Usual number of answers; 1 for texts, whose last word is predicted."""
    has_normalized: bool = False
    """Whether the task also reports `acc_norm`."""

    @property
    def is_text(self) -> bool:
        """Whether a row is one text, whose likelihood is measured."""
        return self.num_choices == 1


def _answers(context: str, texts: "list[str] | tuple[str, ...]", label: int) -> ChoiceRow:
    """Answers to one question, after a space each."""
    choices = tuple(Choice(context, f" {text}") for text in texts)
    return ChoiceRow(choices, label, tuple(texts))


def _labeled(fields: Fields) -> tuple[list[str], int]:
    choices = fields["choices"]
    return choices["text"], choices["label"].index(fields["answerKey"].lstrip())


def _arc(fields: Fields) -> ChoiceRow:
    return _answers(f"Question: {fields['question']}\nAnswer:", *_labeled(fields))


def _openbookqa(fields: Fields) -> ChoiceRow:
    return _answers(fields["question_stem"], *_labeled(fields))


def _listed(question: str, texts: "list[str]") -> str:
    lines = [f"{letter}. {text}\n" for letter, text in zip(_LETTERS, texts, strict=False)]
    return f"{question.strip()}\n{''.join(lines)}Answer:"


def _commonsense_qa(fields: Fields) -> ChoiceRow:
    texts, label = _labeled(fields)
    return _answers(f"Question: {_listed(fields['question'], texts)}", [*_LETTERS], label)


def _social_iqa(fields: Fields) -> ChoiceRow:
    texts = [fields[f"answer{letter}"] for letter in "ABC"]
    context = f"Q: {fields['context']} {fields['question']}\nA:"
    return _answers(context, texts, int(fields["label"]) - 1)


def _hellaswag(fields: Fields) -> ChoiceRow:
    context = f"{fields['ctx_a']} {fields['ctx_b'].capitalize()}"
    query = _without_brackets(f"{fields['activity_label']}: {context}")
    texts = [_without_brackets(text) for text in fields["endings"]]
    return _answers(query, texts, int(fields["label"]))


def _without_brackets(text: str) -> str:
    """Text without the markup of WikiHow, which some rows of hellaswag have."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(fields: Fields) -> ChoiceRow:
    texts = [fields["sol1"], fields["sol2"]]
    return _answers(f"Question: {fields['goal']}\nAnswer:", texts, fields["label"])


def _winogrande(fields: Fields) -> ChoiceRow:
    """Two contexts, each with an option in the blank, before the rest of the sentence."""
    before, _, after = fields["sentence"].partition("_")
    texts = tuple(before + fields[f"option{number}"] for number in (1, 2))
    choices = tuple(Choice(text, f" {after.strip()}") for text in texts)
    return ChoiceRow(choices, int(fields["answer"]) - 1, texts)


def _mmlu(fields: Fields) -> ChoiceRow:
    about = f"The following are multiple choice questions (with answers) about {_subject(fields)}."
    context = f"{about}\n\n{_listed(fields['question'], fields['choices'])}"
    return _answers(context, [*_LETTERS[:4]], fields["answer"])


def _mmlu_continuation(fields: Fields) -> ChoiceRow:
    about = f"The following are questions (with answers) about {_subject(fields)}."
    context = f"{about}\n\nQuestion: {fields['question'].strip()}\nAnswer:"
    return _answers(context, fields["choices"], fields["answer"])


def _subject(fields: Fields) -> str:
    subject: str = fields["subject"].replace("_", " ")
    return subject


def _sciq(fields: Fields) -> ChoiceRow:
    context = f"{fields['support'].lstrip()}\nQuestion: {fields['question']}\nAnswer:"
    texts = [*(fields[f"distractor{number}"] for number in (1, 2, 3)), fields["correct_answer"]]
    return _answers(context, texts, 3)


def _boolq(fields: Fields) -> ChoiceRow:
    context = f"{fields['passage']}\nQuestion: {fields['question']}?\nAnswer:"
    label = fields["label"] if "label" in fields else fields["answer"]
    return _answers(context, ["no", "yes"], int(label))


def _lambada(fields: Fields) -> ChoiceRow:
    """The last word after the rest of the text."""
    request = fields.get("request")
    text: str = fields["text"] if request is None else request["context"] + request["continuation"]
    context, _, word = text.rpartition(" ")
    return _answers(context, [word], 0)


_TEST, _VALIDATION = ("test", "validation"), ("validation",)
_ARC: dict[str, Any] = {
    "hub": "allenai/ai2_arc",
    "splits": _TEST,
    "row": _arc,
    "has_normalized": True,
}
_MMLU: dict[str, Any] = {
    "hub": "cais/mmlu",
    "config": "all",
    "saved": "hails/mmlu_no_train/*",
    "splits": ("test",),
}

BENCHMARKS = {
    "arc_easy": Benchmark(**_ARC, config="ARC-Easy", saved="ai2_arc/ARC-Easy", task="arc_easy 1.0"),
    "arc_challenge": Benchmark(
        **_ARC, config="ARC-Challenge", saved="ai2_arc/ARC-Challenge", task="arc_challenge 1.0"
    ),
    "openbookqa": Benchmark(
        hub="allenai/openbookqa",
        config="main",
        saved="openbookqa/main",
        splits=_TEST,
        row=_openbookqa,
        has_normalized=True,
        task="openbookqa 1.0",
    ),
    "commonsense_qa": Benchmark(
        hub="tau/commonsense_qa",
        saved="tau/commonsense_qa/none",
        splits=_VALIDATION,
        row=_commonsense_qa,
        task="commonsense_qa",
        num_choices=5,
    ),
    "social_iqa": Benchmark(
        hub="lighteval/siqa",
        saved="social_i_qa/none",
        splits=_VALIDATION,
        row=_social_iqa,
        task="social_iqa 0.0",
        num_choices=3,
    ),
    "hellaswag": Benchmark(
        hub="Rowan/hellaswag",
        saved="hellaswag/none",
        splits=_VALIDATION,
        row=_hellaswag,
        has_normalized=True,
        task="hellaswag 1.0",
    ),
    "piqa": Benchmark(
        hub="baber/piqa",
        saved="piqa/plain_text",
        splits=_VALIDATION,
        row=_piqa,
        has_normalized=True,
        task="piqa 1.0",
        num_choices=2,
    ),
    "winogrande": Benchmark(
        hub="allenai/winogrande",
        config="winogrande_xl",
        saved="winogrande/winogrande_xl",
        splits=_VALIDATION,
        row=_winogrande,
        task="winogrande 1.0",
        num_choices=2,
    ),
    "mmlu": Benchmark(**_MMLU, row=_mmlu, task="mmlu 2"),
    "mmlu_continuation": Benchmark(
        **_MMLU, row=_mmlu_continuation, task="mmlu_continuation 1.0", has_normalized=True
    ),
    "sciq": Benchmark(
        hub="allenai/sciq",
        saved="sciq/none",
        splits=_TEST,
        row=_sciq,
        task="sciq 1.0",
        has_normalized=True,
    ),
    "boolq": Benchmark(
        hub="aps/super_glue",
        config="boolq",
        saved="boolq/none",
        splits=_VALIDATION,
        row=_boolq,
        task="boolq 2.0",
        num_choices=2,
    ),
    "lambada": Benchmark(
        hub="EleutherAI/lambada_openai",
        config="default",
        saved="lambada/bpb_0shot",
        splits=("test",),
        row=_lambada,
        task="lambada_openai 1.0",
        num_choices=1,
    ),
}
