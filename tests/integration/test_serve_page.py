"""The page in a real browser: words appear to the left, by keyboard alone, on any screen."""

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Error, Page, expect, sync_playwright

from data_pipeline.text.codec import TextCodec
from tests.helpers.server import Running, serving, tiny_models

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
ENDING = "and said nothing about it."
HEBREW = "והם חיו באושר עד עצם היום הזה"
TOKEN = "a-token-of-more-than-16"
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]
) -> dict[str, object]:
    return tiny_models(tmp_path_factory.mktemp("serve"), codec)


@pytest.fixture(scope="module")
def running(models: dict[str, object]) -> Iterator[Running]:
    with serving(models) as running:
        yield running


@pytest.fixture
def open_page(browser: Browser, running: Running) -> Iterator[Open]:
    """`open_page(url, **options of a context)`: a page whose errors fail the test."""
    contexts, problems = [], []

    def opened(url: str = running.url, **options: object) -> Page:
        context = browser.new_context(viewport={"width": 900, "height": 700}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: message.type == "error" and problems.append(message.text),
        )
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    expected = ("401", "TrustedHTML")
    assert [one for one in problems if not any(word in one for word in expected)] == []


def write(page: Page, given: str, **settings: object) -> None:
    expect(page.locator("#go")).to_be_enabled()
    page.locator("summary").click()
    for name, value in {"max_tokens": 40, "seed": 3, **settings}.items():
        page.fill(f"#{name}", str(value))
    page.locator("summary").click()
    page.fill("#given", given)
    page.keyboard.press("Control+Enter")


def finished(page: Page) -> None:
    expect(page.locator("#stop")).to_be_disabled(timeout=30_000)


def text_of(page: Page) -> str:
    return str(page.locator(".sheet .text").first.text_content())


def test_words_appear_to_the_left_and_existing_text_does_not_move(
    open_page: Open, running: Running
) -> None:
    page = open_page()
    write(page, ENDING)
    expect(page.locator(".written").first).to_be_attached()
    finished(page)
    ends = page.evaluate(
        "() => { const spans = [...document.querySelectorAll('.line:last-child span')];"
        " return [spans.at(-1).getBoundingClientRect().right,"
        " document.querySelector('.sheet .text').getBoundingClientRect().right]; }"
    )
    assert ends[0] == pytest.approx(ends[1], abs=2)
    given = {"prompt": ENDING, "max_tokens": 40, "seed": 3, "temperature": 0.8, "top_k": 200}
    whole = running.post("/v1/completions", {**given, "echo": True}).json()["choices"][0]["text"]
    assert text_of(page) == whole
    widths = page.evaluate(
        "() => [...document.querySelectorAll('.line')].map(l => l.scrollWidth - l.clientWidth)"
    )
    assert max(widths) <= 1


def test_stop_undo_continue_and_edit_by_the_keyboard_alone(open_page: Open) -> None:
    page = open_page()
    write(page, ENDING, max_tokens=4000, temperature=0)
    expect(page.locator(".written").nth(5)).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("stopped")
    stopped = text_of(page)
    page.wait_for_timeout(300)
    assert text_of(page) == stopped
    page.locator("summary").click()
    page.fill("#max_tokens", "5")
    page.keyboard.press("Control+Enter")
    finished(page)
    assert text_of(page).endswith(stopped)
    assert len(text_of(page)) > len(stopped)
    page.keyboard.press("Alt+z")
    assert text_of(page) == stopped
    page.keyboard.press("Alt+e")
    expect(page.locator("#given")).to_be_focused()
    assert page.input_value("#given") == stopped
    page.keyboard.press("Alt+z")
    page.keyboard.press("Alt+z")
    expect(page.locator("#given")).to_have_value(ENDING)


def test_a_token_shows_its_probability_to_pointer_and_keyboard(open_page: Open) -> None:
    page = open_page()
    write(page, ENDING)
    finished(page)
    word = page.locator(".written:not(.hang)", has_text="e").first
    word.hover()
    expect(page.locator("#tip")).to_be_visible()
    assert "%" in str(page.locator("#tip").text_content())
    assert page.locator("#tip tr").count() >= 4
    page.locator(".sheet").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".current")).to_have_count(1)
    expect(page.locator("#status")).to_contain_text("%")


def test_both_directions_and_candidates_are_shown_side_by_side(
    open_page: Open,
) -> None:
    page = open_page()
    page.locator("[data-mode=both]").click()
    write(page, "the last map")
    finished(page)
    texts = page.locator(".sheet .text").all_text_contents()
    assert texts[0].endswith("the last map")
    assert texts[1].startswith("the last map")
    page.locator("[data-mode=write]").click()
    write(page, ENDING, n=3)
    finished(page)
    assert page.locator(".sheet").count() == 3
    page.locator(".sheet").nth(2).focus()
    chosen = page.locator(".sheet .text").nth(2).text_content()
    page.locator("#edit").click()
    assert page.input_value("#given") == chosen


def test_backchat_lists_instructions_by_rank(open_page: Open) -> None:
    page = open_page()
    page.locator("[data-mode=backchat]").click()
    write(page, "a map", n=6)
    expect(page.locator("#candidates li").first).to_be_visible()
    finished(page)
    assert page.locator("#candidates li").count() >= 2
    assert "nats" in str(page.locator("#candidates small").first.text_content())


def test_what_looks_like_markup_is_text(open_page: Open) -> None:
    page = open_page()
    given = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    write(page, given, max_tokens=3)
    finished(page)
    assert text_of(page).endswith(given)
    assert page.locator(".sheet img, .sheet script").count() == 0
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")


def test_right_to_left_scripts_are_aligned_right(open_page: Open) -> None:
    page = open_page()
    write(page, HEBREW, max_tokens=10)
    finished(page)
    assert page.locator(".sheet .text").first.get_attribute("dir") == "rtl"
    # The end of the text is at the left, and earlier text to its right.
    places = page.evaluate(
        "() => { const box = document.querySelector('.sheet .text');"
        " const last = box.querySelector('.line:last-child span:last-child');"
        " return [last.getBoundingClientRect().left, box.getBoundingClientRect().left]; }"
    )
    assert places[0] == pytest.approx(places[1], abs=2)
    assert text_of(page).endswith(HEBREW)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_fits_a_narrow_screen_in_light_and_dark(open_page: Open, scheme: str) -> None:
    page = open_page(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    write(page, ENDING * 4)
    finished(page)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    red = page.evaluate(
        "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0]"
    )
    assert (int(red) < 100) == (scheme == "dark")
    for _ in range(2):
        page.locator("#theme").click()
    assert page.locator("#theme").text_content() == "dark"
    red = page.evaluate(
        "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0]"
    )
    assert int(red) < 100


def test_a_server_with_a_token_accepts_a_page_that_sends_it(
    open_page: Open, models: dict[str, object]
) -> None:
    with serving(models, token=TOKEN) as closed:
        page = open_page(closed.url)
        page.fill("#token", TOKEN)
        page.keyboard.press("Enter")
        write(page, ENDING, max_tokens=5)
        finished(page)
        assert text_of(page).endswith(ENDING)


def test_the_page_makes_no_request_to_other_hosts(open_page: Open, running: Running) -> None:
    page = open_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    expect(page.locator("#go")).to_be_enabled()
    assert asked
    assert [url for url in asked if not url.startswith(running.url)] == []
