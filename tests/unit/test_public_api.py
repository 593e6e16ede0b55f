"""The public API: exports, types, documentation and the examples of its page."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import megaback
from data_pipeline.text.codec import Direction, TextCodec
from tests.helpers.models import write_chat_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/python.md").read_text()
INIT = ast.parse(Path(megaback.__file__).read_text())
Codecs = Callable[..., TextCodec]


def public_callables() -> Iterator[tuple[str, Callable[..., object]]]:
    """Functions of the API, and the methods and properties of its classes."""
    for name in megaback.__all__:
        value = getattr(megaback, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            for method, member in vars(value).items():
                function = member.fget if isinstance(member, property) else member
                if inspect.isfunction(function) and (method == "__init__" or method[0] != "_"):
                    yield f"{name}.{method}", function


CALLABLES = dict(public_callables())


def test_exported_names_are_seen_by_type_checkers_and_can_be_imported() -> None:
    (seen,) = (
        {
            alias.asname
            for one in ast.walk(node)
            if isinstance(one, ast.ImportFrom)
            for alias in one.names
        }
        for node in INIT.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    assert seen == set(megaback.__all__)
    assert set(megaback._MODULES) | {"errors"} == seen
    assert set(dir(megaback)) == {*seen, "__version__"}
    assert [name for name in seen if not hasattr(megaback, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        megaback.lod  # type: ignore[attr-defined]  # noqa: B018


def test_every_exported_name_has_a_docstring_and_a_place_on_the_page() -> None:
    assert [name for name in megaback.__all__ if f"`{name}" not in PAGE] == []
    assert [name for name in megaback.__all__ if not getattr(megaback, name).__doc__] == []
    shown = megaback.SamplingOptions, megaback.InfillOptions
    fields = {field.name for options in shown for field in dataclasses.fields(options)}
    pages = PAGE + (ROOT / "docs/infill.md").read_text()
    assert [name for name in fields if f"`{name}`" not in pages] == []


@pytest.mark.parametrize("name", CALLABLES)
def test_every_argument_is_spelled_out_and_typed(name: str) -> None:
    function = CALLABLES[name]
    signature = inspect.signature(function)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    hints = typing.get_type_hints(function)
    assert {*signature.parameters, "return"} - {"self"} == set(hints)
    assert typing.Any not in hints.values()
    is_plain = name.endswith(("__init__", "close", "per_token", "per_byte"))
    assert is_plain or function.__doc__


def test_the_keywords_of_writing_are_the_sampling_options() -> None:
    options = {one.name: one.default for one in dataclasses.fields(megaback.SamplingOptions)}
    for method in (megaback.Writer.complete_backwards, megaback.Writer.complete_forwards):
        _self, _text, *keywords = inspect.signature(method).parameters.values()
        assert {one.name: one.default for one in keywords} == options


def test_every_exported_error_is_a_megaback_error() -> None:
    from data_pipeline import errors as defined

    def of(module: ModuleType) -> dict[str, object]:
        return {name: value for name, value in vars(module).items() if name.endswith("Error")}

    assert of(megaback.errors) == of(defined)
    for one in vars(megaback.errors).values():
        if inspect.isclass(one):
            assert issubclass(one, megaback.errors.MegabackError)
            assert "__doc__" in vars(one)
            assert one is megaback.errors.MegabackError or "exit_code" in vars(one)


def test_importing_megaback_loads_nothing_heavy() -> None:
    code = (
        "import sys, megaback; dir(megaback); megaback.errors.ConfigError; "
        "print({'torch', 'numpy', 'click', 'rich', 'pydantic'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.fixture
def folder(tmp_path: Path, codec: Codecs, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two models and a run."""
    for direction in Direction:
        write_chat_model(tmp_path / "models" / direction.value, codec(direction))
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_page_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) > 5
    assert names["losses"] == {1: 2.5}
    *_, sentence, code = capsys.readouterr().out.splitlines()
    assert sentence.startswith("`device` 'cuda:99' is not available: ")
    assert code == "12"


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        ("load('nowhere')", "CheckpointMissingError", "nowhere does not exist; give a run"),
        ("load('runs')", "CheckpointMissingError", "runs is neither a model's folder"),
        ("load('models/backward', device='gpu')", "BackendError", "`device` 'gpu' is not a device"),
        ("load('models/backward', dtype='half')", "BackendError", "`dtype` is 'half'; use auto"),
        ("load('models/backward', devise='cpu')", "TypeError", "'devise'"),
        ("SamplingOptions(temperature=-1)", "ConfigError", "`temperature` is -1, not in the range"),
        ("SamplingOptions(temperature='0')", "ConfigError", "`temperature` is '0', not a number"),
        ("SamplingOptions(top_k=2.5)", "ConfigError", "`top_k` is 2.5, not a whole number"),
        (
            "InfillOptions(forward_weight=2)",
            "ConfigError",
            "`forward_weight` is 2, not in the range",
        ),
        ("InfillOptions(rescored='3')", "ConfigError", "`rescored` is '3', not a number"),
        (
            "load_chat('models/backward').answer('Mars', count=0)",
            "ConfigError",
            "`count` is 0, not",
        ),
        ("load_scorer('models/backward', form='chatt')", "ConfigError", "`form` is 'chatt'; use"),
        ("load_scorer('models/backward', device='x')", "BackendError", "`device` 'x'"),
        ("load_infiller('models/forward', 'models/forward')", "DirectionMismatchError", "backward"),
        ("load_infiller('models/forward', 'x', device='x')", "BackendError", "`device` 'x'"),
        ("read_metrics('models')", "CheckpointMissingError", "models has no metrics"),
    ],
)
def test_a_wrong_argument_is_named(folder: Path, call: str, error: str, named: str) -> None:
    kind = getattr(megaback.errors, error, TypeError)
    with pytest.raises(kind) as caught:
        eval(f"megaback.{call}")
    assert named in str(caught.value)


def test_a_typo_in_a_keyword_of_a_method_is_named(folder: Path) -> None:
    writer = megaback.load("models/backward", device="cpu")
    with pytest.raises(TypeError, match=r"complete_backwards\(\) got .* 'temprature'"):
        writer.complete_backwards("the end.", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(megaback.errors.ConfigError, match="`temperature` is -1, not in the range"):
        writer.complete_backwards("the end.", temperature=-1)
    with pytest.raises(megaback.errors.PromptError, match="`given` is a str; give a list"):
        writer.complete_many("the end.")


USER_PROGRAM = """
from megaback import Infill, InfillOptions, Pair, SamplingOptions, Score
import megaback

writer: megaback.Writer = megaback.load("model", device="cpu", dtype="bfloat16")
text: str = writer.complete_backwards("the end.", temperature=0.7, stop_ids=(3,))
texts: list[str] = writer.complete_many(["a", "b"], SamplingOptions(top_k=5))
with megaback.load_scorer("model", form="plain") as scorer:
    scores: list[Score] = scorer.score([Pair("a", "b")])
fills: list[Infill] = megaback.load_infiller("f", "b").fill("a", "b", InfillOptions(rescored=3))
dataset: megaback.RowDataset = megaback.open_dataset({"a": 1.0}, context_tokens=64, seed=1)
sizes: list[int] = [row["input_ids"].numel() for row in dataset]
try:
    steps = [int(line["step"]) for line in megaback.read_metrics("run")]
except megaback.errors.CheckpointMissingError as error:
    code: int = error.exit_code
"""
WRONG_LINES = """
writer.complete_backwards("the end.", temprature=0.7)
megaback.load("model", device=3)
megaback.load_scorer("model", prior=False)
megaback.lod
megaback.open_dataset("a", context_tokens=64, split="test")
"""


def test_a_type_checker_sees_the_api_from_outside(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_PROGRAM + WRONG_LINES)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file", ROOT / "pyproject.toml"),
            *("--cache-dir", ROOT / ".mypy_cache", tmp_path / "user.py"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    first = USER_PROGRAM.count("\n") + 2
    found = re.findall(r"user\.py:(\d+): error: .*\[(.*)\]", done.stdout)
    assert found == [
        (str(first), "call-arg"),
        (str(first + 1), "arg-type"),
        (str(first + 2), "call-arg"),
        (str(first + 3), "attr-defined"),
        (str(first + 4), "arg-type"),
    ], done.stdout
