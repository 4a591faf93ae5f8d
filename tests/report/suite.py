"""Reports in a real browser: light and dark, wide and narrow, by keyboard, and without a network.

`make test-report` installs Debian's Chromium and its driver and runs this. With REPORT_SCREENSHOTS=folder
the pages that were looked at are kept there as pictures.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from dask_influence import DirectInfluence
from dask_influence.report import report
from tests.report.stores import Stores

WIDE, NARROW = 1440, 360
THEMES = ("light", "dark")

CONTRAST = """
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = (color) => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
};
const over = (top, ground) => top.slice(0, 3).map((c, i) => c * top[3] + ground[i] * (1 - top[3]));
const light = (rgb) => { const [r, g, b] = rgb.map(c => { c /= 255;
  return c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; }); return .2126 * r + .7152 * g + .0722 * b; };
const ground = (element) => { const layers = [];
  for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]); };
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || element.closest('.visually-hidden, style')) continue;
  if (!element.getClientRects().length) continue;
  const style = getComputedStyle(element), below = ground(element);
  const ink = over(rgba(element.closest('svg') ? style.fill : style.color), below);
  const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
  found.push([(a + .05) / (b + .05), walker.currentNode.textContent.trim().slice(0, 40)]);
}
return found.sort((x, y) => x[0] - y[0]);
"""

SIDEWAYS = """
const wide = [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest('.scroll, nav ul, .visually-hidden, .skip'));
return [document.documentElement.scrollWidth - innerWidth, wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120))];
"""

FOCUSABLE = (
    "return [...document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')]"
    ".filter(e => e.checkVisibility())"
)

FOCUSED = """
const e = document.activeElement, style = getComputedStyle(e), box = e.getBoundingClientRect();
return [e, style.outlineStyle, parseFloat(style.outlineWidth),
        box.bottom > 0 && box.top < innerHeight && box.right > 0 && box.left < innerWidth];
"""


@dataclass(frozen=True)
class Browser:
    """Chromium, and what it had to say."""

    driver: Any

    def open(self, page: Path, width: int = WIDE, theme: str = "light") -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.logs()
        self.driver.get(page.as_uri())

    def press(self, *keys: str) -> None:
        """Keys by their names, one after the other."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        ActionChains(self.driver).send_keys(*(getattr(Keys, key) for key in keys)).perform()

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def logs(self) -> tuple[list[str], list[str]]:
        """What the console said, and what was asked for, since the last call."""
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [
            one["params"]["request"]["url"]
            for one in messages
            if one["method"] == "Network.requestWillBeSent"
        ]
        return console, asked

    def picture(self, name: str) -> None:
        """The whole page, where pictures are wanted."""
        folder = os.environ.get("REPORT_SCREENSHOTS")
        if folder is None:
            return
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip, "format": "png"}
        )
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from selenium import webdriver  # in the extra [browser]; doctests of the whole tree import this module

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "headless",
        "no-sandbox",
        "hide-scrollbars",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-dev-shm-usage",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def pages(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of several kinds, by name."""
    folder = tmp_path_factory.mktemp("pages")
    data: dict[str, Any] = {"test": stores.test, "train": stores.train}
    pictures = data | {"image_shape": (8, 8), "class_names": [f"digit {c}" for c in range(10)]}
    others = {"perturbation": stores / "pixels.zarr", "self_influence": stores / "own.zarr"}
    names = [f"pixel_{at // 8}_{at % 8}" for at in range(64)]
    return {
        "images": report(
            stores / "scores.zarr", folder / "images.html", tests=["t2", "t3", "t0"], **pictures, **others
        ),
        "rows": report(
            stores / "pixels.zarr",
            folder / "rows.html",
            kind="tabular",
            feature_names=names,
            train=stores.train,
        ),
        "text": sentences(folder),
        "lists": report(stores / "top.zarr", folder / "lists.html"),
        "sketch": report(stores / "sketch.zarr", folder / "sketch.html", train=stores.train),
        "own": report(stores / "own.zarr", folder / "own.html"),
    }


def sentences(folder: Path) -> Path:
    """The report of a toy classifier of embedded sentences."""
    words = [
        "the",
        "film",
        "was",
        "a",
        "long",
        "slow",
        "and",
        "quite",
        "wonderful",
        "look",
        "at",
        "people",
        "who",
        "never",
        "say",
        "what",
        "they",
        "mean",
    ]
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(len(words), (30, 12), generator=generator)
    x = torch.randn(len(words), 4, generator=generator)[places]
    y = (x[..., 0].sum(1) > 0).long()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2))
    infl = DirectInfluence(model, cross_entropy, 0.1).fit((x, y))
    few = (x[:3], y[:3])
    infl.influences_to_zarr(folder / "words.zarr", few, (x, y), mode="perturbation")
    infl.influences_to_zarr(folder / "sentences.zarr", few, (x, y))
    texts = [[words[at] for at in row] for row in places.tolist()]
    return report(
        folder / "sentences.zarr",
        folder / "text.html",
        perturbation=folder / "words.zarr",
        test=few,
        train=(x, y),
        test_tokens=texts[:3],
        train_tokens=texts,
        class_names=["dull", "good"],
        title="Which sentences made it say so?",
    )


KINDS = ("images", "rows", "text", "lists", "sketch", "own")


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [WIDE, 768, NARROW])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_in_every_light_and_width(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, theme: str
) -> None:
    browser.open(pages[kind], width, theme)
    browser.picture(f"{kind}-{width}-{theme}")
    worst = browser.run(CONTRAST)
    assert worst[0][0] >= 4.5, worst[:5]
    assert len(worst) > 50
    sideways, elements = browser.run(SIDEWAYS)
    assert sideways <= 0, elements
    assert not elements
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (theme == "dark")
    console, asked = browser.logs()
    assert console == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[kind].as_uri()]


@pytest.mark.parametrize("kind", KINDS)
def test_tab_reaches_everything_and_shows_where_it_is(
    browser: Browser, pages: dict[str, Path], kind: str
) -> None:
    browser.open(pages[kind])
    wanted = browser.run(FOCUSABLE)
    assert len(wanted) >= 6
    reached = []
    for _ in wanted:
        browser.press("TAB")
        element, style, width, visible = browser.run(FOCUSED)
        assert style == "solid", element.get_attribute("outerHTML")[:100]
        assert width >= 2
        assert visible, element.get_attribute("outerHTML")[:100]
        reached.append(element)
    assert reached == wanted  # each once, in the order of the page
    assert wanted[0].get_attribute("textContent") == "Skip to the report"


def test_keys_skip_ahead_and_open_what_is_folded(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["images"])
    browser.press("TAB", "ENTER")
    assert browser.run("return document.activeElement.id") == "main"
    browser.run("document.querySelector('summary').focus()")
    browser.press("ENTER")
    assert browser.run("return document.querySelector('details').open")


def test_pictures_are_decoded_and_named(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["images"])
    widths = browser.run("return [...document.images].map(image => image.naturalWidth)")
    assert len(widths) > 50
    assert set(widths) == {8}
    assert browser.run("return [...document.images].every(image => image.alt.length > 5)")
    drawn = "return [...document.querySelectorAll('.figure svg')].map(e => e.getBoundingClientRect().height)"
    assert min(browser.run(drawn)) > 90


def test_a_policy_forbids_what_a_page_might_be_given(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    text = pages["own"].read_text()
    outside = (
        '<img src="https://example.invalid/a.png" alt="a"><script>document.title = "run"</script></main>'
    )
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(text.replace("</main>", outside))
    browser.open(spoilt)
    console, _ = browser.logs()
    assert len([one for one in console if "Content Security Policy" in one]) == 2
    assert browser.run("return document.title") != "run"


def test_a_page_is_printed_without_its_navigation(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["images"])
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"
    assert len(browser.driver.execute_cdp_cmd("Page.printToPDF", {})["data"]) > 10_000
