"""The texts and questions of the controlled tasks, and how their answers are counted."""

import math
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.controlled.facts import Order, ask, is_asked_as_stated, make_facts
from benchmarks.controlled.multiplication import (
    NUM_WRONG,
    PUBLISHED,
    SCORINGS,
    Form,
    Product,
    Question,
    accuracies,
    factor_entropy,
    factorizations,
    questions,
    split_products,
    wrong_choices,
)
from benchmarks.controlled.runner import Folder, cell, config_of
from benchmarks.controlled.star_graph import NODES, star_graphs
from data_pipeline.errors import ConfigError
from megaback.config_file import load_config

CONFIG = config_of("star_graph")
FACTORS = st.integers(10, 999)


@given(FACTORS, FACTORS, st.sampled_from(Form), st.integers(0, 1000))
def test_wrong_choices_differ_in_one_digit_and_are_wrong(
    m: int, n: int, form: Form, seed: int
) -> None:
    left, right = Product(m, n).text(form).split("=")

    wrong = wrong_choices(right, random.Random(seed))

    assert len({*wrong}) == NUM_WRONG
    for text in wrong:
        assert sum(a != b for a, b in zip(text, right, strict=True)) == 1
        assert [c for c in text if not c.isdigit()] == [c for c in right if not c.isdigit()]
        numbers = [math.prod(map(int, side.split("*"))) for side in (left, text)]
        assert numbers[0] != numbers[1]


def test_all_factorizations_are_counted() -> None:
    everything = Counter(m * n for m in range(10, 100) for n in range(10, 100))

    assert factorizations(1200, 2) == [
        (m, 1200 // m) for m in (15, 16, 20, 24, 25, 30, 40, 48, 50, 60, 75, 80)
    ]
    assert all(len(factorizations(p, 2)) == everything[p] for p in range(1, 9900, 7))


@pytest.mark.parametrize("digits", [1, 2])
def test_the_factor_entropy_is_that_of_the_counted_factorizations(digits: int) -> None:
    factors = range(10 ** (digits - 1), 10**digits)
    logs = [math.log(len(factorizations(m * n, digits))) for m in factors for n in factors]

    assert factor_entropy(digits) == pytest.approx(sum(logs) / len(logs), abs=1e-12)


@pytest.mark.parametrize("max_pairs", [50, 10_000])
def test_no_held_out_pair_is_trained_on_in_either_order(max_pairs: int) -> None:
    split = split_products(2, max_pairs, seed=0)
    train, held_out = ({(one.m, one.n) for one in part} for part in (split.train, split.held_out))

    assert not train & held_out
    assert {(n, m) for m, n in train} == train
    assert {(n, m) for m, n in held_out} == held_out
    assert len(train) == len(split.train)
    assert split == split_products(2, max_pairs, seed=0) != split_products(2, max_pairs, seed=1)
    if max_pairs > 4095:
        assert train | held_out == {(m, n) for m in range(10, 100) for n in range(10, 100)}


def test_a_scoring_gives_what_its_direction_reads_first() -> None:
    halves = {
        one.name: one.halves(Product(12, 34).text(one.form))[:: 1 if one.is_forward else -1]
        for one in SCORINGS
    }

    assert halves == {  # given, predicted
        "L2R": ("12*34=", "408"),
        "R2L(m,n)": ("=408", "12*34"),
        "R2L(m)": ("*34=408", "12"),
        "R2L": ("=12*34", "408"),
        "L2R(m,n)": ("408=", "12*34"),
        "L2R(n)": ("408=12*", "34"),
    }
    assert [*PUBLISHED] == [*halves]


def test_a_question_is_right_only_if_the_truth_is_strictly_best() -> None:
    asked = [
        Question("2*3", "6", (("5", "7"), ("8", "9"))),
        Question("2*4", "8", (("1", "2"),) * 2),
    ]
    scores = [
        {"6": -1.0, "5": -2.0, "7": -0.5, "8": -3.0, "9": -1.5},
        {"8": -1.0, "1": -1.0, "2": -4},
    ]

    assert accuracies(asked, scores) == [0.0, 0.5]


def test_draws_of_a_question_differ_and_its_candidates_begin_with_the_truth() -> None:
    (question,) = questions([Product(12, 34)], Form.FORWARD_X, 10, seed=0)

    assert question.candidates[0] == "408"
    assert {*question.candidates} == {"408", *(text for draw in question.draws for text in draw)}
    assert len({*question.draws}) > 1


@given(st.integers(2, 4), st.integers(3, 6), st.integers(0, 100))
def test_a_star_graph_has_one_path_to_its_goal(degree: int, nodes: int, seed: int) -> None:
    for graph in star_graphs(3, degree, nodes, 50, seed):
        arm = nodes - 1
        sources, targets = zip(*graph.edges, strict=True)
        start, goal = graph.path[0], graph.path[-1]
        previous = {target: source for source, target in graph.edges}
        assert len({*targets}) == len(graph.edges) == degree * arm  # one way into each node
        assert Counter(sources)[start] == degree
        assert all(count == 1 for node, count in Counter(sources).items() if node != start)
        assert goal not in sources
        back = [goal]
        while back[-1] != start:
            back.append(previous[back[-1]])
        assert tuple(back[::-1]) == graph.path
        assert len(graph.path) == nodes


def test_both_directions_read_the_same_characters_of_a_graph() -> None:
    (graph,) = star_graphs(1, 2, 5, 50, seed=0)

    assert graph.reversed_graph_text[::-1] == graph.graph_text
    assert graph.graph_text.endswith(f"/{graph.path_text[0]}{graph.path_text[-1]}")
    edges, _, _ = graph.graph_text.partition("/")
    assert edges.split(",") == [NODES[a] + NODES[b] for a, b in graph.edges]


def test_training_graphs_are_shuffled_and_not_the_test_graphs() -> None:
    train, test = (star_graphs(500, 2, 5, 50, seed) for seed in (0, 1))

    assert not {*train} & {*test}
    is_first = [graph.edges[0] == graph.path[:2] for graph in train]
    assert 0.05 < sum(is_first) / 500 < 0.2  # one edge of eight


def test_facts_are_stated_in_one_order_only() -> None:
    facts = make_facts(200, seed=0)

    assert len({fact.name for fact in facts}) == len({fact.description for fact in facts}) == 200
    assert Counter(fact.order for fact in facts) == dict.fromkeys(Order, 100)
    for fact in facts:
        for sentence in fact.sentences():
            at = [sentence.index(f" {text}") for text in (fact.name, fact.description)]
            assert (at[0] < at[1]) is (fact.order is Order.NAME_FIRST)
    text = "\n".join(sentence for fact in facts for sentence in fact.sentences())
    for fact in facts:
        stated = [line for line in text.splitlines() if f" {fact.description}" in line]
        assert sorted(stated) == sorted(fact.sentences())


@pytest.mark.parametrize("is_forward", [True, False])
@pytest.mark.parametrize("for_name", [True, False])
def test_the_known_text_of_a_question_is_read_before_the_answer(
    is_forward: bool, for_name: bool
) -> None:
    for fact in make_facts(20, seed=0):
        question = ask(fact, for_name=for_name, is_forward=is_forward)
        known, asked = fact.description, fact.name
        if not for_name:
            known, asked = asked, known

        assert question.answer == f" {asked}"
        assert known in (question.before if is_forward else question.after)
        assert known not in (question.after if is_forward else question.before)
        sentence = question.before + question.answer + question.after
        as_stated = is_asked_as_stated(fact.order, for_name=for_name, is_forward=is_forward)
        assert (sentence in fact.sentences()) is as_stated


def test_a_folder_of_other_options_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out", CONFIG, ("forward",), 1, 5)
    folder.claim(digits=2)
    folder.claim(digits=2)

    with pytest.raises(ConfigError, match="other options"):
        folder.claim(digits=3)
    with pytest.raises(ConfigError, match="other options"):
        Folder(folder.out, CONFIG, ("forward",), 1, 6).claim(digits=2)
    with pytest.raises(ConfigError, match="something else"):
        Folder(tmp_path, CONFIG, ("forward",), 1, 5).claim(digits=2)


def test_a_cell_has_the_standard_error_of_several_seeds() -> None:
    assert cell([0.5], 2) == "0.50"
    assert cell([0.4, 0.5, 0.6], 3) == "0.500 ± 0.058"


@pytest.mark.parametrize("task", ["multiplication", "star_graph", "reversal_facts", "selection"])
def test_the_config_of_a_task_is_that_of_a_small_model(task: str) -> None:
    config = load_config(config_of(task))

    assert config.hardware.processes == 1
    assert config.model.num_layers * config.model.width**2 * 12 < 1_000_000


def test_a_model_of_both_is_measured_in_each_direction_after_the_single_ones() -> None:
    folder = Folder(Path("out"), CONFIG, ("both", "forward"), 1, 5)

    assert folder.measured == [
        ("forward", "forward", "forward"),
        ("both", "both, backward", "backward"),
        ("both", "both, forward", "forward"),
    ]
