"""Selection of the examples that `megaback backtranslate` keeps."""

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tools.backtranslation.example_selection import Choice

PROPOSALS = st.lists(
    st.lists(
        st.fixed_dictionaries(
            {
                "instruction": st.sampled_from(["a", "A", " a", "b", "c"]),
                "score": st.floats(-2, 2),
                "log_probability": st.floats(-9, 0),
            }
        ),
        max_size=3,
    ),
    max_size=8,
)


@given(PROPOSALS, st.integers(1, 3), st.none() | st.floats(-2, 2))
def test_an_instruction_is_assigned_to_the_text_with_its_best_score(
    proposals: list[list[dict[str, Any]]], keep: int, min_score: float | None
) -> None:
    records = [
        {"index": number, "position": f"{number}", "text": "t", "proposals": of_one}
        for number, of_one in enumerate(proposals)
    ]
    counts: Counter[str] = Counter()
    rows = list(Choice(keep, min_score).examples(lambda: records, counts))
    offered = [
        (one["instruction"].strip().lower(), one["score"])
        for of_one in proposals
        for one in of_one[:keep]
        if min_score is None or one["score"] >= min_score
    ]
    assert {row["instruction"].strip().lower() for row in rows} == {name for name, _ in offered}
    for row in rows:
        name = row["instruction"].strip().lower()
        assert row["score"] == max(score for other, score in offered if other == name)
    assert counts["texts"] == len(proposals)
    assert counts["examples"] == len(rows)
