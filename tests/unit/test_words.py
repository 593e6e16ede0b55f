"""Prose is in the words of the field: see tests/helpers/words.py."""

from pathlib import Path

import pytest

from tests.helpers import words

CODE = Path("megaback/planted.py")
TEST = Path("tests/unit/test_planted.py")
PAGE = Path("docs/planted.md")


@pytest.mark.parametrize(
    "code",
    [
        '"""Module.\n\nA run goes on from its newest checkpoint.\n"""\n',
        '"""What a run starts from."""\n',
        'def f() -> None:\n    """Of the peak, what is left."""\n',
        "# The loss, in nats a token.\n",
        "x = 1\n# after so\n# many steps\n",
        'message = f"no number in {step}; " f"mend " "it"\n',
        'message = (\n    "the run goes "\n    "on at step 3"\n)\n',
        'help = "Colour of the line."\n',
        "def test_a_rank_is_told() -> None: ...\n",
    ],
)
def test_a_banned_phrase_of_code_is_found(code: str) -> None:
    assert list(words.problems_of(CODE, code))


@pytest.mark.parametrize(
    "code",
    [
        '"""Initial weights, from a model folder."""\n',
        "goes_on = told = colour = 1\n",
        "first = 'goes'\non = 'on'\n",
    ],
)
def test_code_without_banned_phrases_passes(code: str) -> None:
    assert not list(words.problems_of(CODE, code))


def test_strings_of_tests_are_data_and_the_rest_is_prose() -> None:
    code = '"""A test."""\n\ntext = "and so he goes on"\n\n\ndef f():\n    """A line a step."""\n'

    (problem,) = words.problems_of(TEST, code)

    assert problem == f"{TEST}:7: 'line a step': per"


def test_a_problem_has_the_line_of_its_phrase() -> None:
    page = "# Title\n\nA build that is killed goes\non when it is run again.\n"

    (problem,) = words.problems_of(PAGE, page)

    assert problem == f"{PAGE}:3: 'goes on': resume, continue, or happen"


def test_the_lint_reads_the_projects_code_docs_and_files() -> None:
    checked = {path.as_posix() for path in words.tracked_files()}

    assert {"megaback/train.py", "README.md", "slurm/train.sbatch", "configs/demo.yaml"} <= checked
    assert {"Makefile", ".ci/run", "docs/decisions/0001-markers.md"} <= checked


def test_no_prose_of_the_project_has_a_banned_phrase() -> None:
    assert words.main([]) == 0
