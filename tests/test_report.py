"""The report as a person meets it: in a browser, headless, clicked through. Needs Chromium and its driver."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from effk.perf.harness import page, pictures
from effk.perf.harness.machine import Limits, facts
from effk.perf.harness.problem import families
from effk.perf.harness.record import Entry, GoalEntry, ProblemEntry, Record, ScenarioEntry, compare
from effk.perf.harness.timing import Stats

from .kit.needs import need

selenium = pytest.importorskip("selenium.webdriver")

FAMILIES = tuple(families())
# A browser of root's needs no sandbox; none of its own errands shall reach for a network.
SWITCHES = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "hide-scrollbars",
)


def problem(family: str, tokens: int, share: float) -> ProblemEntry:
    """Where effk takes tokens * 1 ms and its peer four times as long."""
    mine, peers = (Stats(9, *(1e-3 * tokens * share * k * f for f in (0.9, 0.95, 1.0, 1.1))) for k in (1, 4))
    return ProblemEntry(
        name=f"{family}_op tokens={tokens} share={share}",
        family=family,
        op=f"{family}_op",
        size={"dtype": "bf16", "share": share, "a size whose name is rather long": share, "tokens": tokens},
        bytes=1000,
        flops=1e6 * tokens,
        dtype="bfloat16",
        roofline=5e-4 * tokens,
        limit="memory",
        main="cpu-avx2",
        entries=[
            Entry("cpu-avx2", "effk", mine, 0.5, 1.0),
            Entry("cpu-scalar", "effk", peers, 0.1, 4.0),
            Entry("the <peer>", "peer", peers, 0.1, 4.0),
        ],
        goals=[GoalEntry("the <peer>", 2.0, 4.0)],
        missing={"gone": "not <here>"},
        wrong={},
    )


def made_up(slower: float = 1.0) -> Record:
    """A record of every family, with curves over tokens at two shares. Not measured."""
    shares, tokens = (0.5 * slower, 1.0 * slower), (1, 2, 10, 100)
    problems = [problem(f, n, s) for f in FAMILIES for s in shares for n in tokens]
    for p in problems:  # names are those of the base
        p.size["share"] /= slower
        p.size["a size whose name is rather long"] = p.size["share"]
    limits = Limits(read=1e9, copy=2e9, matmul={"float32": 1e10, "bfloat16": 4e10, "int8": 1e11})
    served = [
        ScenarioEntry("lscd", "a service", {}, "token", scenario, name, kind, numbers)
        for name, kind, factor in (("cpu-avx2", "effk", 1.0), ("the <peer>", "peer", 4.0))
        for scenario, numbers in (
            ("single-stream", {"p50": 1e-3 * factor, "p90": 2e-3 * factor, "p99": 3e-3 * factor, "queries": 1000}),
            ("offline", {"batch": 64, "rate": 1e4 / factor, "queries": 1000}),
            ("server", {"bound": 5e-3, "rate": 1e3 / factor, "p50": 1e-3, "p99": 4e-3, "batch": 3.5, "queries": 1000}),
        )
    ]
    checks = {f: f"How {f} is checked.\nAnd more of it." for f in FAMILIES}
    notes = {"the <peer>": "what it is & how"}
    machine = facts(torch.device("cpu"), "cold")
    command = "python -m effk.perf --quick"
    return Record(machine, limits, 0, notes, problems, served, finished=True, checks=checks, command=command)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    record = made_up()
    page.write(record, folder, compare([record], record, 0.05))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    need(programs=("chromium", "chromedriver"), get="Debian: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = selenium.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for switch in (*SWITCHES, f"user-data-dir={profile}"):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        running = selenium.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield running
        finally:
            running.quit()


def opened(browser: Any, report: Path, width: int = 1200, dark: bool = False) -> Any:
    from selenium.webdriver.support.wait import WebDriverWait

    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")
    browser.get((report / "index.html").as_uri())
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return document.body.dataset.drawn"))
    return browser


def found(browser: Any, css: str) -> list[Any]:
    return browser.find_elements("css selector", css)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1200, 390])
def test_every_picture_is_drawn_without_a_word_on_the_console(
    browser: Any, report: Path, width: int, dark: bool
) -> None:
    opened(browser, report, width, dark)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0, "it fetched something"
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "wider than the screen"
    charts = found(browser, ".chart")
    assert len(charts) == len(pictures.pictures(made_up())) > 2 * len(FAMILIES)
    for chart in charts:
        (svg,) = chart.find_elements("css selector", "svg")
        assert svg.find_elements("css selector", "path")
        (plot,) = chart.find_elements("css selector", ".mark-group.role-frame.root > g > path.background")
        assert plot.rect["width"] > 0.4 * width, "labels take the picture's place"
    ink = browser.execute_script("return getComputedStyle(document.body).color")
    assert (ink == "rgb(255, 255, 255)") == dark
    labels = {svg.get_attribute("aria-label") for svg in found(browser, ".chart")}
    assert {picture.title for picture in pictures.pictures(made_up())} == labels


def test_every_family_is_shown(browser: Any, report: Path) -> None:
    opened(browser, report)
    links = {link.text: link.get_attribute("href").split("#")[1] for link in found(browser, "nav a")}
    assert set(FAMILIES) <= links.keys()
    for family in FAMILIES:
        text = browser.find_element("id", links[family]).text
        assert f"How {family} is checked." in text and "python -m effk.perf --quick" in text
        assert "4.00 ≥ 2" in text and "the <peer>" in text
    for figure in found(browser, "figure"):
        assert "Command: python -m effk.perf" in figure.text and "Checked: " in figure.text
    assert "not <here>" in browser.find_element("id", "peers").text
    served = browser.find_element("id", links["scenarios"]).text
    assert "single-stream" in served and "10 000 tokens/s" in served and "4.00" in served


def test_tables_are_sorted_by_a_click(browser: Any, report: Path) -> None:
    opened(browser, report)
    table = found(browser, f"#{FAMILIES[0]} table")[0]
    heads = table.find_elements("css selector", "th")
    column = [head.text for head in heads].index("time")

    def times() -> list[float]:
        cells = table.find_elements("css selector", f"tbody td:nth-child({column + 1})")
        return [float(cell.get_attribute("data-key")) for cell in cells]

    unsorted = times()
    button = heads[column].find_element("css selector", "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    assert times() == sorted(unsorted) != unsorted and heads[column].get_attribute("aria-sort") == "ascending"
    button.click()
    assert times() == sorted(unsorted, reverse=True) and heads[column].get_attribute("aria-sort") == "descending"


def test_a_curve_shows_the_choice_of_the_reader(browser: Any, report: Path) -> None:
    from selenium.webdriver.support.select import Select

    opened(browser, report)
    figure = next(f for f in found(browser, "figure") if "cost against tokens" in f.text)

    def marks() -> list[str]:
        return [p.get_attribute("aria-label") for p in figure.find_elements("css selector", ".mark-symbol path")]

    select = Select(figure.find_element("css selector", "select"))
    assert [o.text.split("  ")[0].split(" a ")[0] for o in select.options] == ["share 0.5", "share 1.0"]
    before = marks()
    assert len([m for m in before if m and "name: effk" in m]) == 4
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    select.select_by_index(1)
    assert len(marks()) == len(before) and marks() != before


def test_pictures_are_written_beside_it(report: Path) -> None:
    for picture in pictures.pictures(made_up()):
        assert (report / f"{picture.name}.png").read_bytes().startswith(b"\x89PNG")


def test_regressions_stand_out(browser: Any, tmp_path: Path) -> None:
    base, now = made_up(), made_up(slower=2.0)
    for p, q in zip(base.problems, now.problems, strict=True):
        p.entries[2] = q.entries[2]  # the machine is no slower
        object.__setattr__(q, "name", p.name)
    page.write(now, tmp_path, compare([base], now, 0.05))
    opened(browser, tmp_path)
    assert f"{2 * len(now.problems)} regressions" in browser.find_element("tag name", "body").text
    assert found(browser, "#changes ~ .wide td.bad")
