"""Everything that the documentation shows exists: commands, options, keys, files, names."""

import ast
import importlib
import re
import shlex
import textwrap
from collections.abc import Iterator
from itertools import dropwhile, pairwise, product
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

import megaback
from data_pipeline.errors import MegabackError
from megaback.cli import main
from megaback.config import Config
from megaback.config_file import load_config
from tests.helpers.commands import COMMANDS_OF_MEGABACK
from tests.helpers.paths import ROOT
from tools.sweeps.axes import axes_of, overrides_of, points_of

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "examples")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
COMMENTED = [*sorted((ROOT / "configs").glob("*.yaml")), *sorted((ROOT / "slurm").iterdir())]
SCRIPTS = [
    path for name in ("benchmarks", "examples") for path in sorted((ROOT / name).glob("*.py"))
]
MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = re.findall(r'^        "([a-z-]+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
WITH_EXAMPLES = [
    name
    for name, command in COMMANDS_OF_MEGABACK.items()
    if not (isinstance(command, click.Group) and name) and not name.startswith("slurm-job ")
]
BY_FILE = {
    "build_shards.sbatch": ["shards", "build"],
    "convert.sbatch": ["convert"],
    "backtranslate.sbatch": ["backtranslate"],
    "train.sbatch": ["train"],
    "finetune.sbatch": ["train"],
}
"""Commands whose options the shipped files forward."""
SHELLS = ("", "bash", "console", "sh", "shell")
_OPERATORS = re.compile(r"[;|&<>()]+")
_PLACEHOLDER = re.compile(r"…|\$?[A-Z][A-Z0-9]*")


def fenced(text: str, *languages: str) -> Iterator[str]:
    """The blocks of a page in one of these languages."""
    for found, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        if found in languages:
            yield textwrap.dedent(block)


def simple_commands(block: str) -> Iterator[list[str]]:
    """Words of every simple command of a shell block, without comments."""
    for line in block.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # prose, with an apostrophe
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if not _OPERATORS.fullmatch(word):
                command.append(word)
            elif command:
                yield command
                command = []


def typed(words: list[str]) -> tuple[str, list[str]] | None:
    """The program that is started, and its words; None for programs of others."""
    while words and (words[0] in ("do", "srun") or re.fullmatch(r"[A-Z_]+=.*", words[0])):
        wrapper, *words = words
        if wrapper == "srun":
            words = words[words.index("megaback") :]
    program, *rest = words or [""]
    if program == "sbatch":
        at = next(at for at, word in enumerate(rest) if word.startswith("slurm/"))
        assert (ROOT / rest[at]).is_file(), f"there is no {rest[at]}"
        return "megaback", [*BY_FILE[Path(rest[at]).name], *rest[at + 1 :]]
    if program == "torchrun":
        program, rest = "python", [*dropwhile(lambda word: "/" not in word, rest)]
    if program == "python" and rest and rest[0].startswith(("benchmarks/", "examples/")):
        return rest[0], rest[1:]
    program = program.removeprefix(".venv/bin/")
    is_checked = program in ("megaback", "make", "deepspeed", "pip", "pytest", "python")
    return (program, rest) if is_checked else None


def require(program: str, words: list[str]) -> None:
    """Raise AssertionError or click's error for a command, option or key that does not exist."""
    if program == "make":
        targets = {word for word in words if "=" not in word}
        assert targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)), words
    elif program == "pip":
        extras = re.findall(r"\[([a-z,-]+)\]", " ".join(words))
        assert {one for some in extras for one in some.split(",")} <= set(EXTRAS), words
    elif program == "deepspeed":
        names = [word for word in words if word.startswith("megaback")]
        assert all((ROOT / name).is_file() or importlib.util.find_spec(name) for name in names)
    elif program == "pytest":
        paths = [word for word in words if word.startswith("tests")]
        assert all((ROOT / path).exists() for path in paths), paths
    elif program == "python":
        for option, module in pairwise(words):
            assert option != "-m" or find_module(module), f"no module {module}"
    elif program == "megaback":
        require_command(words)
    else:
        if has_placeholder(Path(program).stem):
            return
        assert (ROOT / program).is_file(), f"there is no {program}"
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        known = set(re.findall(r'"(--[a-z-]+)"', text_of_script(ROOT / program)))
        assert given <= {*known, "--smoke"}, given - known


def text_of_script(path: Path) -> str:
    """The code of a script and of the modules beside it that it imports, where options may be."""
    text = path.read_text()
    imported = re.findall(r"^from ([\w.]+) import", text, re.MULTILINE)
    beside = [path.parent.joinpath(*name.split(".")).with_suffix(".py") for name in imported]
    return "\n".join([text, *(module.read_text() for module in beside if module.is_file())])


def find_module(name: str) -> bool:
    """Whether a module of ours exists; true for modules of other projects."""
    parts = name.split(".")
    if not (ROOT / parts[0]).is_dir():
        return True
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def command_of(words: list[str]) -> tuple[click.Command, list[str]]:
    """The subcommand and its words."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and words[0][:1].isalpha():
        found = command.get_command(click.Context(command), words[0])
        assert found, f"there is no command {words[0]}"
        command, words = found, words[1:]
    return command, words


def require_command(words: list[str]) -> None:
    """Check a command line: its options and their values, its arguments, its config keys."""
    is_whole = "…" not in words
    command, words = command_of([word for word in words if word != "…"])
    context = click.Context(command, **command.context_settings)
    parsed, left, _ = command.make_parser(context).parse_args(list(words))
    assert not left, f"{left} is more than {command.name} takes"
    for parameter in command.params:
        value = parsed.get(parameter.name or "")
        is_given = value is not None and not str(value).startswith("Sentinel") and value != ()
        if not is_given:
            assert not (is_whole and parameter.required), f"{parameter.name} is missing"
        elif not isinstance(parameter.type, click.Path) and not has_placeholder(value):
            parameter.type_cast_value(context, value)
    configs = [word for word in words if re.fullmatch(r"configs/\w+\.yaml", word)]
    overrides = [word for word in words if re.match(r"[a-z_0-9.]+=", word)]
    if any(word.startswith("init_from=") for word in overrides):  # whose model is not there
        overrides += ["model.num_layers=1", "model.width=64", "model.num_heads=1"]
    points: list[list[str]] = [overrides]
    if command.name == "sweep":
        axes, common = axes_of(overrides)
        zipped = parsed.get("zipped") or ()
        points = [[*common, *overrides_of(point)] for point in points_of(axes, zipped)]
    for config, point in product(configs, points):
        load_config(ROOT / config, tuple(point))


def has_placeholder(value: object) -> bool:
    return any(_PLACEHOLDER.search(word) for word in re.findall(r"[^',()\[\] ]+", str(value)))


def all_commands(text: str) -> list[list[str]]:
    return [words for block in fenced(text, *SHELLS) for words in simple_commands(block)]


def other_commands(prose: str) -> list[list[str]]:
    """Commands of other programs in code spans."""
    spans = re.findall(r"`((?:make|pip|pytest|python|torchrun|deepspeed) [^`\n]+)`", prose)
    return [words for code in spans for words in simple_commands(code.replace("…", ""))]


def problems_of(commands: list[list[str]]) -> list[str]:
    found = []
    for words in commands:
        try:
            if what := typed(words):
                require(*what)
        except (AssertionError, click.ClickException, MegabackError) as error:
            found.append(f"{shlex.join(words)}: {error}")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_commands_of_a_page_exist(path: Path) -> None:
    assert problems_of(all_commands(path.read_text())) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_within_a_sentence_have_options_that_exist(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    wrong = []
    for code in re.findall(r"`megaback ([^`]+)`", prose):
        try:
            command, words = command_of(re.sub(r"[\[\]…]", " ", code).split())
        except AssertionError as error:
            wrong.append(f"{code}: {error}")
            continue
        known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        given = {word.partition("=")[0] for word in words if word.startswith("-")}
        wrong += [f"{code}: {name}" for name in given - known - {"--help", "--version"}]
    assert wrong == []
    assert problems_of(other_commands(prose)) == []


def keys_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_keys_of_the_config_within_a_sentence_exist(path: Path) -> None:
    known = set(keys_of(Config))
    sections = "|".join(Config.model_fields)
    named = re.findall(rf"`((?:{sections})\.[a-z_0-9]+)(?:=[^`]*)?`", path.read_text())
    others = re.compile(r"\w+\.(md|py|json|safetensors|gguf|bin|sbatch)|model\.generate")
    assert [key for key in named if key not in known and not others.fullmatch(key)] == []


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_command_exist(name: str) -> None:
    block = (COMMANDS_OF_MEGABACK[name].epilog or "").partition("\b\n")[2]
    lines = list(simple_commands(block))
    of_command = [words for words in lines if shlex.join(words[1:]).startswith(name)]
    assert len(of_command) > 1, "help ends with two examples or more: epilog=examples(…)"
    assert max(map(len, block.splitlines())) <= 76
    assert problems_of(lines) == []


@pytest.mark.parametrize("path", COMMENTED, ids=lambda path: path.name)
def test_the_commands_in_the_comments_of_a_shipped_file_exist(path: Path) -> None:
    lines = [line[1:] for line in path.read_text().splitlines() if line.startswith("#  ")]
    block = "\n".join(line.split("  # ")[0] for line in lines)
    assert problems_of(list(simple_commands(block))) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_commands_in_a_scripts_docstring_exist(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    block = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    commands = list(simple_commands(re.sub(r"[\[\]]", " ", block)))
    assert problems_of(commands + other_commands(text)) == []


NOT_INSTALLED = {"langchain_openai", "mlx_lm"}
"""Other people's programs that are too large for the tests' environment."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_of_a_page_compiles_and_its_names_resolve(path: Path) -> None:
    for block in fenced(path.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module not in NOT_INSTALLED:
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "megaback":
                assert hasattr(megaback, node.attr), ast.unparse(node)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("megaback smaple models/m", "no command smaple"),
        ("megaback sample models/m --endings x", "--endings"),
        ("megaback sample models/m --max-new-tokens many", "'many' is not a valid integer"),
        ("megaback convert runs/a --to full", "missing"),
        ("megaback convert runs/a --to fll --out m", "'fll'"),
        ("megaback sample models/m more", "is more than"),
        ("megaback train configs/demo.yaml optimizer.learning_rat=1", "learning_rate"),
        ("megaback train configs/absent.yaml", "absent.yaml"),
        ("cd x && megaback jobs --nothing | head", "--nothing"),
        ("A=1 srun -n 2 megaback plan configs/demo.yaml --nodes many", "'many'"),
        ("sbatch --nodes=2 slurm/absent.sbatch x", "no slurm/absent.sbatch"),
        ("sbatch slurm/convert.sbatch runs/a --too full", "--too"),
        ("make demos", "demos"),
        ("pip install 'megaback[serv]'", "serv"),
        ("deepspeed --module megaback.trian configs/demo.yaml", ""),
        ("python benchmarks/loader.py SHARDS --second 2", "--second"),
        ("torchrun --nproc-per-node 2 examples/pytorch_loop.py SHARDS FOLDER --step 2", "--step"),
        ("python examples/absent.py", "no examples/absent.py"),
        ("python -m megaback.trian configs/demo.yaml", "no module megaback.trian"),
        ("OMP_NUM_THREADS=1 .venv/bin/pytest -q tests/unit/test_absent.py", "test_absent"),
    ],
)
def test_a_command_option_or_key_that_does_not_exist_is_found(line: str, problem: str) -> None:
    (found,) = problems_of(all_commands(f"```\n{line}\n```\n"))
    assert problem in found.removeprefix(line)


def test_a_correct_command_passes() -> None:
    lines = (
        'megaback sample models/m --max-new-tokens 5 \\\n  --ending "it\'s"   # so\nls --nothing\n'
    )
    assert problems_of(all_commands(f"```\n{lines}```\n")) == []
