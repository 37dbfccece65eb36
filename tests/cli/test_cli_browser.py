"""The page of `xbraid-py serve` in a browser of the system: a run grows, is stopped, resumed and compared."""

import os
import re
import shutil
from pathlib import Path

import pytest
from served import DRIVER, room_for, server, until

from xbraid_py.cli import control
from xbraid_py.cli.queue import Queue

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
NARROW, WIDE = 390, 1440


# Texts whose letters stand out less than 4.5 to 1 from what is behind them (WCAG, AA).
CONTRAST = r"""(() => {
  const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  const light = (text) => {
    const [r, g, b] = text.match(/[\d.]+/g).slice(0, 3).map((value) => linear(Number(value) / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (each) => {
    for (let at = each; at; at = at.parentElement) {
      const found = getComputedStyle(at).backgroundColor;
      if (!/, 0\)$/.test(found)) return found;
    }
    return "rgb(255, 255, 255)";
  };
  const hasText = (each) => [...each.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  const isSeen = (each) => !each.closest("noscript, :disabled, .skip") && each.getClientRects().length;
  const ratio = (each) => {
    const style = getComputedStyle(each), ink = each.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(ink), light(ground(each))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  return [...document.querySelectorAll("body *")].filter((each) => hasText(each) && isSeen(each) && ratio(each) < 4.5)
    .map((each) => `${each.tagName} ${each.textContent.trim().slice(0, 30)} ${ratio(each)}`);
})()"""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright here: the page is not tried in a browser")
    if BROWSER is None:
        pytest.skip("no Chromium on the PATH: the page is not tried in a browser; apt install chromium")
    with api.sync_playwright() as started:
        # As root, as in a container, it refuses its sandbox.
        found = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield found
        found.close()


@pytest.fixture
def room(tmp_path):
    with room_for(DRIVER, tmp_path) as folder:
        yield folder


def start(room: Path, *words: str) -> int:
    program = [str(room.parent / "driver.py"), *words]
    return control.start(Queue(room), {"program": program, "ranks": 1}, at_once=2).number


def open_page(browser, address: str, width: int, scheme: str):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda said: page.problems.append(said.text) if said.type == "error" else None)
    page.on("dialog", lambda dialog: (page.problems.append("a dialog"), dialog.dismiss()))
    page.goto(address)
    return page


def points(page) -> int:
    """Points of the first curve."""
    path = page.locator("figure path").first.get_attribute("d")
    return len(re.findall("[ML]", path))


def tab_to(page, name: str) -> None:
    """Go on by the key until what has the focus bears this name."""
    focused = "document.activeElement.ariaLabel || document.activeElement.textContent"
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate(focused).strip() == name:
            return
    raise AssertionError(f"the tabulator does not come to {name}")


@pytest.mark.parametrize(("width", "scheme"), [(NARROW, "dark"), (WIDE, "light")])
def test_a_run_grows_is_stopped_resumed_and_compared_by_keyboard(browser, room, width, scheme):
    first, _ = start(room, "--total=800", "--rate=0.5"), start(room, "--total=5", "--rate=0.25")
    with server(room) as address:
        page = open_page(browser, address, width, scheme)
        page.get_by_role("button", name="driver-1").wait_for()
        tab_to(page, "driver-1")
        page.keyboard.press("Enter")
        page.locator("#state", has_text="running").wait_for()
        page.locator("figure", has_text="Loss").wait_for()
        before = points(page)
        until(lambda: points(page) > before)
        assert page.get_by_text("16 layers").first.is_visible(), "the refinement is marked"
        tab_to(page, "Stop")
        page.keyboard.press("Enter")
        page.locator("#state", has_text="stopped").wait_for()
        until(lambda: Queue(room).job(first).state == "stopped")
        stopped_at = points(page)
        page.locator("#resume").wait_for()
        assert page.locator("#detail .note").first.text_content() == "stopped <b>here</b>", "as text"
        tab_to(page, "Resume")
        page.keyboard.press("Enter")
        page.locator("#state", has_text="running").wait_for()
        until(lambda: points(page) > stopped_at)
        (room / "fast").touch()
        page.locator("#state", has_text="finished").wait_for()
        # Compare: mark the other one as well.
        tab_to(page, "Compare driver-2")
        page.keyboard.press("Space")
        page.get_by_role("heading", name="Comparison of 2 runs").wait_for()
        differing = page.locator("section tr.differs td:first-child")
        differing.first.wait_for()
        assert sorted(differing.all_text_contents()) == ["rate", "total"]
        outcomes = page.locator("#outcomes")
        outcomes.get_by_text("80 s").wait_for()
        outcomes.get_by_text("160.00 ×").wait_for()  # the speed-up, when the rows of both are there
        page.get_by_label("seconds").check()
        page.locator("figure text", has_text="seconds").first.wait_for()
        page.get_by_role("img", name=re.compile("^Accuracy, % over seconds. driver-1: validation")).wait_for()
        # A chart can be read by the arrow keys.
        page.locator("figure svg[tabindex]").first.focus()
        page.keyboard.press("Home")
        assert "at 0.1 seconds" in page.locator("figcaption").first.text_content()
        assert page.problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut off or scrolled sideways"
        dark = page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((each) => each < 60)"
        )
        assert dark == (scheme == "dark")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_letters_stand_out_and_all_that_can_be_used_has_a_name(browser, room, scheme):
    start(room, "--total=30")
    (room / "fast").touch()
    with server(room) as address:
        page = open_page(browser, f"{address}#run=driver-1", WIDE, scheme)
        page.locator("#state", has_text="finished").wait_for()
        page.locator("figure").first.wait_for()
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, input, a, summary, svg[role=img], progress, img, [tabindex='0']")]
            .filter((each) => !(each.getAttribute("aria-label") || each.textContent.trim() || each.alt ||
                                each.labels?.[0]?.textContent.trim())).map((each) => each.outerHTML)"""
        )
        assert unnamed == []
        # WCAG AA: 4.5 to 1 for letters of this size.
        low = page.evaluate(CONTRAST)
        assert low == []
        page.get_by_role("button", name="Theme: system").click()
        page.get_by_role("button", name="Theme: light").wait_for()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
        assert page.problems == []
        page.close()
