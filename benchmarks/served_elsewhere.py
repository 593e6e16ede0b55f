"""A model on a server, compared with the same model here: texts, streams and scores.

    python benchmarks/served_elsewhere.py MODEL http://127.0.0.1:8000

URL is that of vLLM, llama.cpp's server or `megaback serve`; without it, `megaback serve MODEL` is
started. Prints how many greedy texts are equal, by how much log-probabilities differ, and what the
endpoints for texts and chats make of the same ending: the two wrong ways of a backward model.
"""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
from smoke import Benchmark

import megaback
from data_pipeline.common.import_path import module_command
from megaback.errors import BackendError, ServeError

_ENDINGS = (
    " said Mr. Darcy, with a smile.",
    " said she, and burst into tears.",
    " cried Ahab, and the boat was gone.",
    "and they lived happily ever after.",
    "naïve café.",
    "he was not supp",
    "",
    "The end.",
)
_LONGEST_SHOWN = 70


@contextmanager
def served(model: Path, url: str | None) -> Iterator[str]:
    """The address of a server; without one, of a process that serves the model."""
    if url is not None:
        yield url
        return
    command = module_command("megaback", "serve", str(model), "--port", "0", "--device", "cpu")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield next(word for word in line.split() if word.startswith("http"))
        finally:
            process.terminate()


def shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def wrong_ways(writer: megaback.RemoteWriter, ending: str, tokens: int) -> None:
    """Print what the endpoints of texts and chats answer."""
    server = writer.server
    common = {"model": server.name, "max_tokens": tokens, "temperature": 0}
    for name, path, fields in (
        ("text", "/v1/completions", {"prompt": ending}),
        ("chat", "/v1/chat/completions", {"messages": [{"role": "user", "content": ending}]}),
    ):
        answer = "refused"
        with suppress(ServeError):
            choice = server.connection.ask(path, {**common, **fields})["choices"][0]
            answer = shown(choice["text"] if name == "text" else choice["message"]["content"])
        print(f"the {name} endpoint's answer: {answer}")


@click.command(cls=Benchmark, smoke="{backward} --tokens 4")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("url", required=False)
@click.option("--tokens", default=60, show_default=True, help="New tokens per text.")
@click.option("--dtype", default="float32", show_default=True, help="Data type of the model here.")
def main(model: Path, url: str | None, tokens: int, dtype: str) -> None:
    """Compare MODEL on the server at URL with MODEL here."""
    here = megaback.load(model, device="cpu", dtype=dtype)
    with served(model, url) as address:
        there = megaback.remote(address, model)
        print(f"server: {there.server.kind}, context of {there.server.context_tokens} tokens")
        options = megaback.SamplingOptions(tokens, temperature=0)
        expected = here.complete_many(_ENDINGS, options)
        started_s = time.monotonic()
        found = there.complete_many(_ENDINGS, options)
        seconds = time.monotonic() - started_s
        equal = sum(one == other for one, other in zip(found, expected, strict=True))
        print(f"greedy texts equal to those here: {equal} of {len(_ENDINGS)}, in {seconds:.1f} s")
        for ending, one, other in zip(_ENDINGS, found, expected, strict=True):
            if one != other:
                print(f"  {shown(ending)}\n  there {one[:200]!r}\n  here  {other[:200]!r}")
        alone = [there.complete_many([ending], options)[0] for ending in _ENDINGS[:2]]
        print(f"the same alone: {sum(map(str.__eq__, alone, found))} of {len(alone)}")
        *begun, last = there.stream(_ENDINGS[:1], options)
        pairs_of_parts = zip(begun, [*begun[1:], last], strict=True)
        grows = all(after[0].endswith(before[0]) for before, after in pairs_of_parts)
        print(f"stream of {len(begun) + 1} parts, each ending with the one before: {grows}")
        print(f"its last part is the whole text: {last == found[:1]}")
        print(f"  {shown(last[0])}")
        sampled = megaback.SamplingOptions(tokens, seed=1)
        again = [there.complete_many(_ENDINGS[:2], sampled) for _ in range(2)]
        print(f"sampled texts equal when repeated: {again[0] == again[1]}")
        wrong_ways(there, _ENDINGS[0], min(tokens, 24))
        try:
            scorer = megaback.load_scorer(model, form="plain", server=address)
        except BackendError as error:
            print(f"scores: {error}")
            return
        pairs = [megaback.Pair(text[:40], text[40:100]) for text in expected if len(text) > 100]
        pairs = pairs or [megaback.Pair("the cat", " sat.")]
        with scorer, megaback.load_scorer(model, form="plain", device="cpu", dtype=dtype) as local:
            both = zip(scorer.score(pairs), local.score(pairs), strict=True)
            apart = [
                abs(one.log_probability - other.log_probability) / one.tokens for one, other in both
            ]
        print(
            f"log-probabilities of {len(pairs)} texts differ by at most {max(apart):.1e} nats/token"
        )


if __name__ == "__main__":
    main()
