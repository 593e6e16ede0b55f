"""Text before several endings, written side by side; then one ending, streamed.

`python examples/complete_backward.py MODEL`, where MODEL is a run, a checkpoint, or a folder of
`megaback convert`.
"""

import argparse

import megaback

ENDINGS = ["and they lived happily ever after.", "and that was how the river got its name."]


def complete(model: str, max_new_tokens: int) -> None:
    writer = megaback.load(model, usual_rows=len(ENDINGS))
    options = megaback.SamplingOptions(
        temperature=0.7, top_p=0.95, max_new_tokens=max_new_tokens, seed=1
    )

    # A batch is read through the model once per token. Each text is what it would be alone: text i
    # has the seed options.seed + i.
    for text in writer.complete_many(ENDINGS, options):
        print(text, end="\n\n")

    # A backward model knows the end first, so a stream yields the whole text after each token.
    shown = ENDINGS[0]
    for (text,) in writer.stream(ENDINGS[:1], options):
        print(repr(text.removesuffix(shown)), "+")  # what this token added, at the front
        shown = text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    complete(**vars(parser.parse_args()))
