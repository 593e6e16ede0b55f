"""`megaback plot`: a picture and a self-contained page of runs."""

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from data_pipeline.errors import ConfigError
from megaback.run_folder import METRICS_NAME, SAMPLES_NAME
from tests.helpers.runs import add_suites, finished_steps, suite_metric
from tools.plot import main as plot_command

Steps = Callable[..., Path]


@pytest.fixture
def run_of(tmp_path: Path) -> Steps:
    """`run_of(name, steps)`: folder of a finished run with one restart and one skipped step."""
    return lambda name, steps: finished_steps(tmp_path / name, steps)


def plot(*words: object) -> Result:
    return CliRunner().invoke(plot_command, [str(word) for word in words])


class _Loads(HTMLParser):
    """Collects the external resources of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe"):
            self.found.append(tag)
        self.found += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_self_contained_and_shows_the_results(run_of: Steps, tmp_path: Path) -> None:
    runs = [run_of("<b>&", 20), run_of("second", 1), run_of("empty", 0)]
    result = plot(*runs, "--out", tmp_path / "curves", "--by", "tokens")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = _Loads()
    page.feed((tmp_path / "curves.html").read_text())
    assert page.found == []
    assert page.text.count("<b>&") >= 2  # as text
    assert "8.0000" in page.text
    before = (tmp_path / "curves.html").read_bytes(), (tmp_path / "curves.png").read_bytes()
    plot(*runs, "--out", tmp_path / "curves", "--by", "tokens")
    after = (tmp_path / "curves.html").read_bytes(), (tmp_path / "curves.png").read_bytes()
    assert after == before


def test_a_page_shows_the_newest_samples(run_of: Steps, tmp_path: Path) -> None:
    run = run_of("run", 20)
    lines = [
        (0, "", "a first one"),
        (20, "", "<b>once</b> upon"),
        (20, "& then.", "It was & then."),
        (20, "It", "It was"),
    ]
    (run / SAMPLES_NAME).write_text(
        "".join(
            json.dumps({"step": step, "given": given, "text": text}) + "\n"
            for step, given, text in lines
        )
    )

    assert plot(run, "--out", tmp_path / "curves").exit_code == 0

    page, html = _Loads(), (tmp_path / "curves.html").read_text()
    page.feed(html)
    assert "<b>once</b> upon" in page.text
    assert "It was <b>&amp; then.</b>" in html
    assert "<b>It</b> was" in html
    assert "a first one" not in page.text


def test_suites_are_panels_and_a_table(run_of: Steps, tmp_path: Path) -> None:
    runs = [run_of("forward", 20), run_of("backward", 20)]
    lambada = {"lambada": {"bits_per_byte": suite_metric(1.25, None)}}
    add_suites(runs[0], {0: {"sciq": {"acc": suite_metric(0.3)}, **lambada}})
    add_suites(runs[1], {20: {"sciq": {"question": suite_metric(0.5)}}})

    assert plot(*runs, "--out", tmp_path / "curves").exit_code == 0

    page = _Loads()
    page.feed((tmp_path / "curves.html").read_text())
    for text in (
        "sciq: accuracy, 200 rows",
        "lambada: bits/byte, 200 rows",
        "sciq0.250acc 0.300 (0.200 to 0.400)question 0.500 (0.400 to 0.600)",
        "lambada–bits_per_byte 1.250 (1.150 to 1.350)–",
    ):
        assert text in page.text


def test_another_format_is_refused(run_of: Steps, tmp_path: Path) -> None:
    result = plot(run_of("run", 20), "--out", tmp_path / "curves.pdf")

    assert result.exit_code == ConfigError.exit_code
    assert f"pictures are PNG files; give {tmp_path / 'curves.png'}" in result.output
    assert not list(tmp_path.glob("curves*"))


def test_a_folder_is_replaced_by_the_runs_below_it(run_of: Steps, tmp_path: Path) -> None:
    (tmp_path / "runs" / "arrow").mkdir(parents=True)
    runs = [run_of(f"runs/arrow/{name}", 20) for name in ("backward", "forward")]
    (run_of("runs/arrow/queued", 0) / METRICS_NAME).unlink()
    pages = []
    for words in (runs, [tmp_path / "runs"]):
        result = plot(*words, "--out", tmp_path / "curves", "--overwrite")
        assert result.exit_code == 0, result.output
        pages.append((tmp_path / "curves.html").read_bytes())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (None, 40, "has no metrics"),
        ("", 40, "no step is done yet"),
        ('{"step": 1, "learning_rate": 1}\n', 41, "not of this version"),
        ('["step"]\n', 41, "not of this version"),
        ('{"step": 1, "lo', 40, "no step is done yet"),
    ],
)
def test_a_run_with_nothing_to_draw_is_refused(
    text: str | None, code: int, message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if text is not None:
        (run / METRICS_NAME).write_text(text)
    result = plot(run, "--out", tmp_path / "curves")
    assert (result.exit_code, message in result.output) == (code, True), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
