"""The page in a real browser: it draws, reads no network, says no error, and shows the numbers that it was given."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from slime_spec.report.folder import read_runs
from slime_spec.report.page import Page as ReportPage
from slime_spec.report.page import write_page
from tests.support.report_runs import FROZEN, NONE_CONFIG, ONLINE, row, run_folder, sample

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"><!--"
# Lines of the picture's colours, as page.css has them for a light page: of runs 0, 1 and 2.
COLOURS = {"plain": (0x1B, 0x6C, 0xA8), "still": (0xC9, 0x36, 0x2C), "learning": (0x2E, 0x8B, 0x57)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("needs Chromium: apt-get install chromium (.ci/run does)")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of three runs: without a draft, with one that stays, and with one that learns and says hostile things."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [row(step) for step in range(4)]
    plain = [{name: value for name, value in each.items() if not name.startswith("spec/")} for each in rows]
    samples = [sample(0, 1, prompt=HOSTILE, reply=HOSTILE), sample(3, 2, reply="the last reply")]
    # A value that was not finite, metrics that one step lacks, and a run of another length.
    learning = [*rows, row(4, train__grad_norm=None), row(9, **{"spec__accept_rate_cum_pos_2": 0.125})]
    run_folder(folder / "plain", plain, NONE_CONFIG)
    run_folder(folder / "still", rows, FROZEN)
    run_folder(folder / "learning", learning, ONLINE, samples)
    runs = read_runs([folder / name for name in ("plain", "still", "learning")])
    write_page(folder / "report.html", ReportPage(runs, reload_s=3600.0))
    return folder / "report.html"


class Opened:
    """A page that is open, with everything that went wrong in it."""

    def __init__(
        self, browser: Browser, file: Path, scheme: str = "light", width: int = 1280, draws_all: bool = True
    ) -> None:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})  # type: ignore[arg-type]
        context.set_offline(True)
        self.page: Page = context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("requestfailed", lambda request: self.wrong.append(f"failed: {request.url}"))
        self.page.goto(file.as_uri())
        if draws_all:
            self.draw_all()

    def draw_all(self) -> None:
        """Open what is folded and scroll along the page, as charts are drawn when they come near."""
        self.page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        for chart in self.page.locator(".plot").all():
            chart.scroll_into_view_if_needed()
        expect(self.page.locator(".plot canvas")).to_have_count(self.page.locator(".plot").count())

    def picture(self, title: str) -> Image.Image:
        figure = self.page.locator("figure", has=self.page.get_by_text(title, exact=True))
        return Image.open(io.BytesIO(figure.locator("canvas").screenshot())).convert("RGB")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 400)])
def test_every_chart_is_drawn_without_an_error_and_nothing_is_wider_than_the_screen(
    browser: Browser, written: Path, scheme: str, width: int
) -> None:
    opened = Opened(browser, written, scheme, width)
    assert opened.wrong == []
    assert opened.page.title() == "plain, still, learning – slime_spec", "no script of a reply ran"
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    for chart in opened.page.locator(".plot canvas").all():
        colours = Image.open(io.BytesIO(chart.screenshot())).convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert len(colours) > 10, "axes, grid and lines"


def test_a_long_name_without_a_space_makes_no_page_wider(browser: Browser, tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / ("long_name_" * 12 + kind), [row(0), row(1)], FROZEN) for kind in "ab"]
    file = tmp_path / "report.html"
    write_page(file, ReportPage(read_runs(folders)))
    opened = Opened(browser, file, width=400)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 400
    assert opened.wrong == []


def test_the_lines_of_all_runs_are_in_the_picture_and_leave_it_with_their_run(browser: Browser, written: Path) -> None:
    opened = Opened(browser, written)
    title = "Accepted length: no draft, frozen draft, online draft"
    shown = {name: _has(opened.picture(title), colour) for name, colour in COLOURS.items()}
    assert shown == {"plain": True, "still": True, "learning": True}
    opened.page.locator("#runs input").nth(2).uncheck()
    shown = {name: _has(opened.picture(title), colour) for name, colour in COLOURS.items()}
    assert shown == {"plain": True, "still": True, "learning": False}
    opened.page.reload()
    assert not opened.page.locator("#runs input").nth(2).is_checked(), (
        "the choice outlives a page that reads itself again"
    )
    assert opened.wrong == []


def test_a_line_lies_where_its_values_are(browser: Browser, written: Path) -> None:
    """The reward of run "still" rises from 0.25 to 0.625: its colour rises with it, from left to right."""
    opened = Opened(browser, written)
    opened.page.locator("#runs input").nth(0).uncheck()
    opened.page.locator("#runs input").nth(2).uncheck()
    picture = opened.picture("Reward")
    near = [
        (x, y)
        for x in range(picture.width)
        for y in range(picture.height)
        if _is(picture.getpixel((x, y)), COLOURS["still"])
    ]
    left, right = min(near), max(near)
    assert right[0] > left[0] + 50
    assert right[1] < left[1] - 20
    assert opened.wrong == []


def test_the_cursor_shows_the_values_of_metrics_jsonl(browser: Browser, written: Path) -> None:
    opened = Opened(browser, written)
    figure = opened.page.locator("figure", has=opened.page.get_by_text("Response length", exact=True))
    figure.scroll_into_view_if_needed()
    box = figure.locator(".u-over").bounding_box()
    assert box is not None
    opened.page.mouse.move(box["x"] + 1, box["y"] + box["height"] / 2)
    names, values = (
        figure.locator(f".u-legend .u-series {part}").all_inner_texts() for part in (".u-label", ".u-value")
    )
    assert dict(zip(names, values, strict=True)) == {
        "step": "0",
        "plain": "30",
        "plain: response_len_max": "40",
        "still": "30",
        "still: response_len_max": "40",
        "learning": "30",
        "learning: response_len_max": "40",
    }


def test_smoothing_shows_the_mean_of_the_last_values_and_outlives_a_reload(browser: Browser, written: Path) -> None:
    opened = Opened(browser, written)
    opened.page.locator("#smooth").select_option("5")
    opened.page.reload()
    figure = opened.page.locator("figure", has=opened.page.get_by_text("Reward", exact=True))
    figure.scroll_into_view_if_needed()
    box = figure.locator(".u-over").bounding_box()
    assert box is not None
    opened.page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    values = figure.locator(".u-legend .u-value").all_inner_texts()
    # Rewards of the run "learning" are 1/4 + step/8 at the steps 0, 1, 2, 3, 4 and 9: its last five.
    assert (values[0], values[3]) == ("9", "0.725")
    assert opened.wrong == []


def test_samples_are_read_as_they_were_said(browser: Browser, written: Path) -> None:
    opened = Opened(browser, written)
    assert opened.page.locator("#samples pre.reply").all_inner_texts() == [HOSTILE, "the last reply"]
    assert opened.page.locator("#samples h4").all_inner_texts() == ["step 0", "step 3"]
    assert "2.33 tokens a round" in opened.page.locator("#samples .facts").first.inner_text()


def test_a_page_that_is_live_reads_what_is_new(browser: Browser, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine", [row(0)], FROZEN)
    file = tmp_path / "report.html"
    write_page(file, ReportPage(read_runs([folder]), reload_s=0.2))
    opened = Opened(browser, file, draws_all=False)
    run_folder(tmp_path / "later" / "mine", [row(0), row(1)], FROZEN)
    write_page(file, ReportPage(read_runs([tmp_path / "later" / "mine"])))
    expect(opened.page.locator("#runs")).to_contain_text("2 of 4 steps")
    assert opened.page.locator("#live").count() == 0, "the run is over"


def _has(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    colours = picture.getcolors(1 << 20)
    assert colours is not None
    return any(_is(found, colour) for _, found in colours)


def _is(found: object, colour: tuple[int, int, int]) -> bool:
    assert isinstance(found, tuple)
    return all(abs(each - wanted) <= 12 for each, wanted in zip(found, colour, strict=True))
