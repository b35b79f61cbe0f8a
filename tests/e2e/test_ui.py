"""The page at /ui in a real browser against the real command: what people see, and that it asks
nobody but its own server, breaks none of its own rules, and can be used by everybody.

Needs Chromium (Debian: `apt-get install chromium`); skipped without one.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright

from loading import load

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
TEXTS = "w1 w2 w3\nw4 w5\n\nw6 w7 w8 w9"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]

Serve = Callable[..., str]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Start servers of the tiny checkpoint, and of others; returns their page's address."""
    support = load("tests/unit/service/support.py")
    folder = tmp_path_factory.mktemp("ui")
    several = support.write_tiny_checkpoint(
        folder / "several", labels=("rude", "spam"), problem_type="multi_label_classification"
    )
    tiny = support.write_tiny_checkpoint(folder / "tiny")
    processes: list[subprocess.Popen[str]] = []

    def start(*flags: str, port: int = 0) -> str:
        command = [sys.executable, "-m", "offramp_service", "--model-id", str(tiny)]
        process = subprocess.Popen(
            [
                *(*command, "--model", f"several={several}", "--port", str(port)),
                *("--threads", "1", "--drain-seconds", "0", *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PORT"},
        )
        processes.append(process)
        assert process.stdout is not None
        found = re.search(r"or open (http://127\.0\.0\.1:\d+/ui)", process.stdout.readline())
        assert found is not None
        return found[1]

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture(scope="module")
def address(serve: Serve) -> str:
    return serve()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Open]:
    """Pages of their own; nothing may go wrong on them but what a test announces."""
    pages: list[tuple[Page, list[str], str]] = []

    def open_one(
        url: str = address,
        *,
        wrong: str = "nothing",
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
    ) -> Page:
        page = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
        ).new_page()
        page.set_default_timeout(15_000)
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                complaints.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        host = urlsplit(url).netloc
        page.on(
            "request",
            lambda request: (
                None
                if urlsplit(request.url).netloc == host
                else complaints.append(f"it asked {request.url}")
            ),
        )
        page.goto(url)
        pages.append((page, complaints, wrong))
        return page

    yield open_one
    for page, complaints, wrong in pages:
        page.context.close()
        assert [one for one in complaints if wrong not in one] == []


def answers(page: Page) -> list[str]:
    return page.locator("#answers .how strong").all_inner_texts()


def loaded(page: Page) -> None:
    expect(page.locator("#facts")).to_contain_text("4 layers")


def slide(page: Page, speedup: float) -> None:
    page.get_by_label("Speed-up asked for").fill(str(speedup))


def test_an_answer_within_a_second_of_typing(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    taken = []
    for attempt in range(3):  # test machines are shared
        page.locator("#texts").fill("")
        expect(page.locator("#answers > li")).to_have_count(0)
        page.keyboard.type(f"w{attempt} w2")
        began = time.monotonic()
        expect(page.locator("#answers > li")).to_have_count(1)
        taken.append(time.monotonic() - began)
    assert min(taken) < 1


def test_what_is_said_of_each_text(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    page.locator("#texts").fill(TEXTS)
    expect(page.locator("#answers > li")).to_have_count(3)
    assert page.locator("#answers .text").all_inner_texts() == [
        *TEXTS.replace("\n\n", "\n").split("\n")
    ]
    assert answers(page) == ["Ran all 4 layers"] * 3
    expect(page.locator("#status")).to_contain_text("12 of 12 layers run")
    expect(page.locator("#legend")).to_contain_text("never leaves early")
    expect(page.locator(".limit").first).to_be_hidden()

    slide(page, 2)
    expect(page.locator("#legend")).to_contain_text("leaves above 0.")
    limit = float(page.locator("#legend-limit").inner_text().split()[-1])
    for card in page.locator("#answers > li").all():
        said = re.search(r"layer (\d)|all (4)", card.locator(".how").inner_text())
        assert said is not None
        left = int(said[1] or said[2])
        steps = card.locator(".ladder li")
        signals = [
            float(one)
            for one in steps.locator(".dot").evaluate_all(
                "dots => dots.map(dot => dot.dataset.value)"
            )
        ]
        assert len(signals) == left
        assert all(signal <= limit + 0.001 for signal in signals[:-1])
        assert left == 4 or signals[-1] >= limit - 0.001
        kinds = [step.get_attribute("class") for step in steps.all()]
        assert kinds == ["ran"] * (left - 1) + ["left"] + ["spared"] * (4 - left)
        assert "left here" in steps.nth(left - 1).inner_text()
        best, *others = card.locator(".labels li").all_inner_texts()
        assert len(others) == 2
        assert best.split()[0] in ("negative", "positive", "neutral")


def test_the_keyboard_is_enough(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    focused = page.locator(":focus")
    expect(focused).to_have_attribute("id", "texts")
    page.keyboard.type("w1 w2\nw3")
    expect(page.locator("#answers > li")).to_have_count(2)
    assert answers(page) == ["Ran all 4 layers"] * 2
    page.keyboard.press("Tab")
    expect(focused).to_have_attribute("id", "pairs")
    page.keyboard.press("Tab")
    expect(focused).to_have_attribute("id", "speed")
    page.keyboard.press("End")
    expect(page.locator("#speed-value")).to_have_text("4.00×")
    expect(page.locator("#answers .how strong").first).to_have_text("Left after layer 1 of 4")
    expect(focused).to_have_attribute("aria-valuetext", re.compile("25 % of the layers"))
    assert focused.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    page.keyboard.press("Home")
    expect(page.locator("#answers .how strong").first).to_have_text("Ran all 4 layers")
    page.keyboard.press("Tab")
    expect(focused).to_have_attribute("value", "start")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#exits-note")).to_contain_text("in the last minute")


def test_figures_follow_what_happens(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    page.locator("label", has_text="last minute").click()
    page.locator("#texts").fill(TEXTS)
    expect(page.locator("#answers > li")).to_have_count(3)
    note = page.locator("#exits-note")
    expect(note).to_have_text("3 texts in the last minute, a speed-up of 1.00×.")
    assert page.locator("#exits .share").all_inner_texts() == ["0 %", "0 %", "0 %", "100 %"]
    slide(page, 4)
    expect(note).to_have_text("6 texts in the last minute, a speed-up of 1.60×.")

    place = "circle => [circle.getAttribute('cx'), circle.getAttribute('cy')].map(Number)"
    fast = page.locator("#curve .point").evaluate(place)
    slide(page, 1.5)
    slow = page.locator("#curve .point").evaluate(place)
    assert slow[0] < fast[0]
    said = re.search(r"(\d+\.\d %) right at (.*)×", page.locator("#curve-note").inner_text())
    assert said is not None
    assert 1.5 <= float(said[2]) < 1.7  # the next that was measured
    assert said[1] in page.locator("#speed-note").inner_text()


def test_a_page_that_nobody_sees_does_not_ask(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#exits-note")).to_contain_text("since the server started")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    hide = """hidden => {
        Object.defineProperty(document, "hidden", { get: () => hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    page.wait_for_timeout(200)  # what was under way
    asked.clear()
    page.wait_for_timeout(1500)
    assert asked == []
    page.evaluate(hide, False)
    page.wait_for_timeout(1500)
    assert len(asked) >= 2


def test_nothing_moves_for_those_who_do_not_like_it(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    page.locator("#texts").fill("w1")
    dot = page.locator(".dot").first
    moves = "element => getComputedStyle(element).transitionDuration"
    assert dot.evaluate(moves) == "0s"
    page.emulate_media(reduced_motion="no-preference")
    assert dot.evaluate(moves) != "0s"


def test_answers_that_come_too_late_are_dropped(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    held: list[Route] = []

    def hold_the_first(route: Route) -> None:
        held.append(route) if not held else route.continue_()

    page.route("**/classify", hold_the_first)
    page.locator("#texts").fill("w1")
    while not held:
        page.wait_for_timeout(10)
    page.locator("#texts").fill("w2 w3\nw4")
    expect(page.locator("#answers > li")).to_have_count(2)
    held[0].fulfill(json={"data": []})
    page.wait_for_timeout(100)
    assert page.locator("#answers .text").all_inner_texts() == ["w2 w3", "w4"]
    expect(page.locator("#problem")).to_be_hidden()


def test_the_model_that_was_chosen_last_stays(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    held: list[Route] = []
    page.route("**/info?model=several", lambda route: held.append(route))
    choice = page.get_by_role("combobox", name="Model")
    choice.select_option("several")
    while not held:
        page.wait_for_timeout(10)
    choice.select_option("tiny")
    page.locator("#texts").fill("w1")
    expect(page.locator("#answers > li")).to_have_count(1)
    held[0].continue_()
    page.wait_for_timeout(200)
    expect(choice).to_have_value("tiny")
    expect(page.locator("#facts")).to_contain_text("3 labels")


def test_one_of_several_models_and_pairs(open_page: Open) -> None:
    page = open_page(wrong="422")
    loaded(page)
    page.get_by_role("combobox", name="Model").select_option("several")
    expect(page.locator("#facts")).to_contain_text("2 labels")
    page.locator("#texts").fill("w1\nw2")
    expect(page.locator("#answers > li")).to_have_count(2)
    held = page.locator("#answers > li").first.locator(".labels .holds").all_inner_texts()
    assert held
    page.get_by_label("Each text comes with a second one").check()
    expect(page.locator("#status")).to_have_text("Each text needs a second one: there are 2 and 0.")
    page.get_by_label("Second texts").fill("w3 w4\nw5")
    expect(page.locator("#answers .text").first).to_have_text("w1 ⏐ w3 w4")
    page.get_by_label("Each text comes with a second one").uncheck()

    page.locator("#texts").fill("w1\n\n" + "w2 " * 40)
    expect(page.get_by_role("alert")).to_have_text("Line 3 has 42 tokens, at most 32 are allowed.")
    page.locator("#texts").fill("\n".join(f"w{number}" for number in range(40)))
    expect(page.locator("#answers > li")).to_have_count(32)
    expect(page.locator("#status")).to_contain_text("takes 32 texts at once")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_markup_in_texts_is_text(open_page: Open) -> None:
    page = open_page()
    loaded(page)
    text = "<img src=x onerror=alert(1)> <b>w1</b>"
    page.locator("#texts").fill(text)
    expect(page.locator("#answers .text")).to_have_text(text)
    assert page.locator("#answers img, #answers b").count() == 0


def test_a_key_is_asked_for_and_not_kept(open_page: Open, serve: Serve) -> None:
    page = open_page(serve("--api-key", "sesame"), wrong="401")
    alert, focused = page.get_by_role("alert"), page.locator(":focus")
    expect(alert).to_have_text("This server asks for an API key.")
    expect(focused).to_have_attribute("id", "key")
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(alert).to_have_text("The server does not accept this API key.")
    page.get_by_label("Key of this server").fill("sesame")
    page.keyboard.press("Enter")
    loaded(page)
    expect(alert).to_be_hidden()
    page.locator("#texts").fill("w1")
    expect(page.locator("#answers > li")).to_have_count(1)
    expect(page.locator("#exits-note")).to_contain_text("1 text since")
    kept = page.evaluate(
        "[localStorage.length, sessionStorage.length, document.cookie, location.hash]"
    )
    assert kept == [0, 0, "", ""]
    assert page.context.cookies() == []
    page.reload()
    expect(alert).to_have_text("This server asks for an API key.")


def test_behind_a_path_of_a_proxy(open_page: Open, serve: Serve) -> None:
    own = serve("--root-path", "/models/tiny")
    page = open_page(own.replace("/ui", "/models/tiny/ui/"))
    loaded(page)
    assert urlsplit(page.url).path == "/models/tiny/ui"
    page.locator("#texts").fill("w1")
    expect(page.locator("#answers > li")).to_have_count(1)
    expect(page.locator("#exits-note")).to_contain_text("1 text since")


def test_it_says_when_nobody_answers_and_goes_on_by_itself(open_page: Open) -> None:
    page = open_page(wrong="ERR_")
    loaded(page)
    page.context.set_offline(True)
    page.locator("#texts").fill("w1")
    expect(page.get_by_role("alert")).to_have_text(
        "The service cannot be reached. Trying again in 3 seconds."
    )
    page.context.set_offline(False)
    expect(page.locator("#answers > li")).to_have_count(1)
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 360, 768, 960])
def test_it_fits_a_phone(open_page: Open, width: int) -> None:
    page = open_page(width=width, height=740)
    loaded(page)
    page.locator("#texts").fill(TEXTS + "\n" + "averylongword" * 30)
    slide(page, 1.5)
    expect(page.locator("#answers > li")).to_have_count(4)
    expect(page.locator("#exits > li")).to_have_count(4)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # Nothing sticks out of its card either.
    outside = page.locator(".card").evaluate_all(
        "cards => cards.filter(card => card.scrollWidth > card.clientWidth).length"
    )
    assert outside == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_keeps_anybody_out(open_page: Open, width: int, dark: bool) -> None:
    page = open_page(width=width, dark=dark)
    loaded(page)
    page.locator("#texts").fill(TEXTS)
    slide(page, 2)
    expect(page.locator("#answers > li")).to_have_count(3)
    expect(page.locator("#exits > li")).to_have_count(4)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(244, 246, 248)") is not dark
    found = Axe().run(page)
    assert found.response["passes"], "it has looked at something"
    assert [(one["id"], one["impact"]) for one in found.response["violations"]] == []
