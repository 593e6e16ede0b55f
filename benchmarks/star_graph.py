"""Paths in star graphs, after Bachmann and Nagarajan, "The Pitfalls of Next-Token Prediction"
(2024).

    python benchmarks/star_graph.py --out runs/star_graph

Models are given the edges of a graph, its start and a goal, and write the path greedily: the
forward one from the start, the backward one from the goal. Both read the same ids of the graph, and
have loss on the path only. The same command resumes after an interruption.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from controlled.runner import CHARACTER_PIECES, Folder, cell, cpu_line, folder_options
from controlled.star_graph import MAX_NODES, NODES, StarGraph, star_graphs
from smoke import Benchmark

from data_pipeline.common.number_ranges import COUNT
from data_pipeline.errors import ConfigError
from data_pipeline.text.chat_format import ChatFormat
from megaback.inference.generate import sample_many
from megaback.inference.sampling import SamplingOptions
from megaback.inference.text_writer import load

_TRAIN_SEED, _TEST_SEED = 0, 1
_AT_ONCE = 64
_PUBLISHED = {"forward": "1/degree", "backward": "solved"}


def row(graph: StarGraph, direction: str) -> dict[str, str]:
    """An instruction example, in which the model writes the path."""
    if direction == "forward":
        return {"instruction": graph.graph_text, "output": graph.path_text}
    return {"instruction": graph.path_text, "output": graph.reversed_graph_text}


def measure(run: Path, direction: str, graphs: Sequence[StarGraph]) -> dict[str, Any]:
    """Fractions of paths, and of nodes after the start, that are right."""
    writer = load(run, device="cpu", usual_rows=_AT_ONCE)
    chat = ChatFormat(writer.codec)
    given = "instruction" if direction == "forward" else "output"
    prompts = [chat.prompt(row(graph, direction)[given]) for graph in graphs]
    options = SamplingOptions(max_new_tokens=len(graphs[0].path) + 1, temperature=0.0)
    paths = [
        writer.codec.render(ids)
        for at in range(0, len(prompts), _AT_ONCE)
        for ids in sample_many(writer.decoder, writer.codec, prompts[at : at + _AT_ONCE], options)
    ]
    both = list(zip(paths, graphs, strict=True))
    return {
        "path": sum(path == graph.path_text for path, graph in both) / len(graphs),
        "leading": sum(path[1:2] == graph.path_text[1] for path, graph in both) / len(graphs),
        "any arm": sum(_is_a_path(path, graph) for path, graph in both) / len(graphs),
    }


def _is_a_path(path: str, graph: StarGraph) -> bool:
    """Whether a text follows edges, from the start to the end of any arm."""
    edges = {NODES[a] + NODES[b] for a, b in graph.edges}
    steps = [path[at : at + 2] for at in range(len(path) - 1)]
    return len(path) == len(graph.path) and edges.issuperset(steps)


def table(found: dict[str, list[dict[str, Any]]], degree: int) -> Iterator[str]:
    """The figures of each direction over seeds, as Markdown."""
    yield "| | path to the goal | node after the start | path along any arm | published: path |"
    yield "|---|---|---|---|---|"
    for direction, results in found.items():
        cells = [cell([one[key] for one in results], 3) for key in ("path", "leading", "any arm")]
        yield f"| {direction} | {' | '.join(cells)} | {_PUBLISHED[direction]} |"
    yield f"| chance | | {1 / degree:.3f} | | |"


@click.command(
    cls=Benchmark,
    smoke="--out {out} --config {config} --steps 2 --num-seeds 1 --direction backward"
    " --graphs 200 --test-graphs 4",
)
@click.option(
    "--degree", type=click.IntRange(2), default=2, show_default=True, help="Number of arms."
)
@click.option(
    "--path-nodes",
    type=click.IntRange(3),
    default=5,
    show_default=True,
    help="Nodes of a path, with start and goal.",
)
@click.option(
    "--num-nodes",
    type=click.IntRange(5, MAX_NODES),
    default=50,
    show_default=True,
    help="Number of different labels of nodes.",
)
@click.option(
    "--graphs",
    "num_graphs",
    type=COUNT.option,
    default=50_000,
    show_default=True,
    help="Number of graphs to train on.",
)
@click.option(
    "--test-graphs",
    "num_test_graphs",
    type=COUNT.option,
    default=500,
    show_default=True,
    help="Number of graphs to write the path of.",
)
@folder_options("star_graph")
def main(
    degree: int,
    path_nodes: int,
    num_nodes: int,
    num_graphs: int,
    num_test_graphs: int,
    **options: Any,
) -> None:
    """Make the graphs, train, write the paths, and print the table."""
    if 1 + degree * (path_nodes - 1) > num_nodes:
        raise ConfigError(
            f"`--num-nodes` is {num_nodes}, fewer than the {1 + degree * (path_nodes - 1)} nodes "
            "of a graph; use more, or fewer or shorter arms"
        )
    folder = Folder(**options)
    shape = {"degree": degree, "path_nodes": path_nodes, "num_nodes": num_nodes}
    folder.claim(**shape, graphs=num_graphs, test_graphs=num_test_graphs)
    graphs = star_graphs(num_graphs, seed=_TRAIN_SEED, **shape)
    test_graphs = star_graphs(num_test_graphs, seed=_TEST_SEED, **shape)
    text = folder.texts("tokenizer", ({"text": graph.graph_text} for graph in graphs[:1000]))
    tokenizer = folder.tokenizer(text, CHARACTER_PIECES + num_nodes + len(",/"))
    found = {}
    for direction in folder.directions:
        rows = folder.texts(direction, (row(graph, direction) for graph in graphs))
        shards = folder.examples(direction, rows, tokenizer, direction)

        def measured(run: Path, direction: str = direction) -> dict[str, Any]:
            return measure(run, direction, test_graphs)

        found[direction] = folder.results("paths", shards, direction, measured)
    click.echo("")
    for line in table(found, degree):
        click.echo(line)
    click.echo(f"\n{cpu_line(one for results in found.values() for one in results)}.")


if __name__ == "__main__":
    main()
