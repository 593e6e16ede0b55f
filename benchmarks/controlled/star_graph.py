"""Star graphs, after Bachmann and Nagarajan, "The Pitfalls of Next-Token Prediction" (2024).

`degree` arms leave a start node; the end of one arm is the goal. The task is to write the path to
the goal, given the shuffled edges, the start and the goal. After the first node of the arm, each
next node follows from one edge, so a model that sees the true path while it is trained need not
learn to find the first. From the goal backward, every node follows from one edge.
"""

import itertools
import random
import string
from dataclasses import dataclass

NODES = string.ascii_letters
"""One character per node: one token."""
MAX_NODES = len(NODES)


@dataclass(frozen=True)
class StarGraph:
    """Edges point away from the start. `path` begins at the start and ends at the goal."""

    edges: tuple[tuple[int, int], ...]
    path: tuple[int, ...]

    @property
    def path_text(self) -> str:
        return "".join(NODES[node] for node in self.path)

    @property
    def graph_text(self) -> str:
        """The edges, then start and goal."""
        edges = ",".join(NODES[a] + NODES[b] for a, b in self.edges)
        return f"{edges}/{NODES[self.path[0]]}{NODES[self.path[-1]]}"

    @property
    def reversed_graph_text(self) -> str:
        """The graph for a backward model, which reads it as a forward model reads `graph_text`."""
        return self.graph_text[::-1]


def star_graph(degree: int, path_nodes: int, num_nodes: int, generator: random.Random) -> StarGraph:
    """A graph whose arms have `path_nodes` nodes with the start; labels below `num_nodes`."""
    arm = path_nodes - 1
    start, *others = generator.sample(range(num_nodes), 1 + degree * arm)
    arms = [(start, *others[at : at + arm]) for at in range(0, degree * arm, arm)]
    edges = [(a, b) for nodes in arms for a, b in itertools.pairwise(nodes)]
    generator.shuffle(edges)
    return StarGraph(tuple(edges), arms[0])


def star_graphs(
    count: int, degree: int, path_nodes: int, num_nodes: int, seed: int
) -> list[StarGraph]:
    """`count` graphs of a seed."""
    generator = random.Random(seed)
    return [star_graph(degree, path_nodes, num_nodes, generator) for _ in range(count)]
