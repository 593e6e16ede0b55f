"""The best of several answers, by how well each explains its question.

`python examples/rerank_answers.py MODEL --question Q --answer A --answer B`, where MODEL is a
BackChat run or model. `--form plain` is for a base model, which saw no instructions.
"""

import argparse

import megaback


def rank(
    model: str, question: str, answers: list[str], form: str
) -> list[tuple[str, megaback.Score]]:
    """The answers with their scores, the best first."""
    pairs = [megaback.Pair(question, answer) for answer in answers]
    with megaback.load_scorer(model, form=form) as scorer:
        scores = scorer.score(pairs)
    # log P(question | answer): the question is the same for all, so it needs no normalization, and
    # a long answer is not at a disadvantage, as its own tokens are given.
    return sorted(
        zip(answers, scores, strict=True), key=lambda pair: pair[1].log_probability, reverse=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--question", required=True)
    parser.add_argument("--answer", action="append", dest="answers", required=True)
    parser.add_argument("--form", choices=["chat", "plain"], default="chat")
    for answer, score in rank(**vars(parser.parse_args())):
        print(f"{score.log_probability:9.3f} nats  {answer}")
