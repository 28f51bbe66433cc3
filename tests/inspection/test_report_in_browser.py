"""The report as a reader has it: opened in headless Chromium, worked by keyboard and pointer."""

import base64
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from inspection.report import report_page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium. Without one the tests are skipped, loudly; in CI its lack is a failure."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        message = "NO BROWSER: chromium and chromedriver are not there; apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    yield started
    started.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Callable[[Path], Any]:
    """The browser with the report of a store."""

    def show(store: Path) -> Any:
        page = tmp_path / "report.html"
        page.write_text(report_page(store), encoding="utf-8")
        browser.get(page.as_uri())
        return browser

    return show


@pytest.fixture(params=["demo_store", "gsm8k_store"])
def store(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def first_row(store: Path) -> dict[str, Any]:
    """The best supported row, by polars."""
    rows = pl.read_parquet(sorted(store.glob("*.parquet")))
    best = pl.col("logprob").list.eval(pl.element().cast(pl.Float64)).list.mean()
    return rows.sort(best, "source_index", descending=[True, False]).row(0, named=True)


def test_the_slider_greys_out_what_the_threshold_drops(opened, store: Path):
    from selenium.webdriver.common.keys import Keys

    browser, row = opened(store), first_row(store)
    ranks = np.array([rank for rank in row["mass_rank"] if rank is not None], np.float32)
    slider = browser.find_element("id", "threshold")
    seen = set()
    for key, times in ((Keys.ARROW_RIGHT, 0), (Keys.ARROW_RIGHT, 40), (Keys.HOME, 1), (Keys.END, 1)):
        for _ in range(times):
            slider.send_keys(key)
        threshold = float(browser.find_element("id", "threshold-value").text)
        kept = ranks <= np.float32(1 - threshold)
        spans = browser.find_elements("css selector", "#example .t")
        assert ["dropped" not in span.get_attribute("class").split() for span in spans] == kept.tolist()
        told = browser.find_element("id", "kept").text
        assert told.startswith(f"Threshold {threshold:.2f} keeps {kept.sum()} of {len(ranks)} targets shown")
        of_store = pl.read_parquet(sorted(store.glob("*.parquet")))["mass_rank"].explode().drop_nulls().to_numpy()
        assert f"and {(of_store <= np.float32(1 - threshold)).sum()} of {len(of_store)} of the store" in told
        seen.add(int(kept.sum()))
    assert len(seen) >= 3


def test_a_token_tells_its_numbers(opened, store: Path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser, row = opened(store), first_row(store)
    positions = [place for place, score in enumerate(row["logprob"]) if score is not None]
    spans = browser.find_elements("css selector", "#example .t")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", spans[3])
    ActionChains(browser).move_to_element(spans[3]).perform()
    check_token(browser, row, positions[3])
    # The same by keyboard alone: from the search box on, targets are reached with Tab and the arrows.
    browser.execute_script("arguments[0].focus()", spans[0])
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    check_token(browser, row, positions[2])
    assert browser.switch_to.active_element == spans[2]


def check_token(browser: Any, row: dict[str, Any], position: int) -> None:
    told = browser.find_element("id", "token").text
    values = dict(re.findall(r"(\w+) (-?[\d.]+(?:e[-+]?\d+)?)(?= ·)", told))
    assert int(values["id"]) == row["input_ids"][position]
    assert int(values["position"]) == position
    assert float(values["p"]) == pytest.approx(np.exp(row["logprob"][position]), rel=1e-3)
    assert float(values["u"]) == pytest.approx(1 - row["mass_rank"][position], rel=1e-3, abs=1e-7)
    assert float(values["entropy"]) == pytest.approx(row["entropy"][position], rel=1e-3)
    assert told.endswith("kept" if row["mass_rank"][position] <= 0.5 else "dropped")


def test_a_row_is_found_by_its_id(opened, store: Path):
    browser = opened(store)
    rows = json.loads(browser.find_element("id", "data").get_attribute("textContent"))["rows"]
    wanted = rows[-1]
    box = browser.find_element("id", "search")
    box.send_keys(wanted["row_id"])
    assert browser.find_element("id", "example-title").text == f"Row {wanted['row_id']}"
    assert browser.find_element("id", "example").get_attribute("textContent") == "".join(wanted["texts"])
    box.clear()
    box.send_keys("nowhere")
    assert "prift-inspect show finds every row" in browser.find_element("id", "found").text


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light")])
def test_the_page_fits(opened, demo_store: Path, tmp_path: Path, width: int, scheme: str):
    browser = opened(demo_store)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert browser.execute_script("return document.querySelectorAll('svg[role=img][aria-label]').length") == 5
    picture = browser.execute_cdp_cmd("Page.captureScreenshot", {})
    (tmp_path / f"{scheme}-{width}.png").write_bytes(base64.b64decode(picture["data"]))
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_of_the_data_runs(opened, hostile_store: Path):
    browser = opened(hostile_store)
    texts = []
    for button in browser.find_elements("css selector", "[data-row]"):
        browser.execute_script("arguments[0].click()", button)
        assert browser.find_elements("css selector", "#example .t")
        texts.append(browser.find_element("id", "example").text)
    assert len(texts) == 3
    assert any("<script>window.hurt=1</script><img src=x onerror='window.hurt=1'></script>" in text for text in texts)
    titles = [row.text for row in browser.find_elements("css selector", "#row-table button")]
    assert "</script><script>window.hurt=1</script>" in titles
    assert browser.execute_script("return window.hurt === undefined")
    assert browser.execute_script("return document.querySelectorAll('img, #example script').length") == 0
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    # And markup that got in all the same would be stopped by the page's own policy.
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', \"<img src=x onerror='window.hurt=1'>\")")
    browser.execute_script("const s = document.createElement('script'); s.textContent = 'window.hurt = 2'; "
                           "document.body.append(s)")  # fmt: skip
    assert browser.execute_async_script("setTimeout(arguments[0], 200, window.hurt === undefined)") is True
