"""The page in a real browser: nothing fails or is fetched, everything is seen at any width, and without scripts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from browser import Browser
from deme_diffusion.report.page import write_page
from pages import EVIL, content

WIDTHS = (360, 768, 1440)
CONTRAST = 4.5
CONTRASTS = """
const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
const light = rgb => rgb.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const ground = el => { const own = parse(getComputedStyle(el).backgroundColor);
  return own[3] === 1 ? own.slice(0, 3) : over(own, el.parentElement ? ground(el.parentElement) : [255, 255, 255]); };
const found = [];
for (const el of document.querySelectorAll('body *')) {
  if (![...el.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  const under = ground(el), ink = over(parse(getComputedStyle(el).color), under);
  const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
  found.push([(a + .05) / (b + .05), el.tagName + '.' + el.className + ': ' + el.textContent.trim().slice(0, 40)]);
}
return found.sort((x, y) => x[0] - y[0]);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of all sections whose every text is hostile."""
    folder = tmp_path_factory.mktemp("run")
    return write_page(folder, content(folder))


def test_nothing_fails_nothing_is_fetched_and_every_image_decodes(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.errors() == []
    asked = browser.requests()
    assert asked[0] == page.as_uri() and all(address.startswith("data:") for address in asked[1:])
    widths = browser.run("return [...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert len(widths) > 12 and all(widths)


def test_hostile_texts_stay_texts(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return document.scripts.length") == 0  # an alert would have failed the line before
    assert browser.run("return document.querySelector('h1').textContent").strip().startswith(EVIL)
    shown = browser.run("return document.querySelector('[id=ablations-0] h2').textContent")
    assert shown == f"Ablations: {EVIL}"
    assert browser.run("return document.title") == f"{EVIL} · deme"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_never_scrolls_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.resize(width)
    browser.open(page)
    assert browser.run("return [innerWidth, document.scrollingElement.scrollWidth]") == [width, width]
    cut = browser.run(
        "return [...document.querySelectorAll('h1, h2, h3, p, li, td, th, dd, figcaption, summary, .verdict')]"
        ".filter(el => !el.closest('.scroll') && el.getBoundingClientRect().right > innerWidth + 1)"
        ".map(el => el.textContent.slice(0, 40))"
    )
    assert cut == []


def test_on_a_telephone_every_model_of_the_table_is_in_sight(browser: Browser, page: Path) -> None:
    browser.resize(360)
    browser.open(page)
    hidden = "td => td.textContent && td.getBoundingClientRect().right > innerWidth"
    assert browser.run(f"return [...document.querySelectorAll('#table td')].filter({hidden}).length") == 0
    label = "return getComputedStyle(document.querySelector('#table td'), '::before').content"
    assert browser.run(label) == '"base"'
    browser.resize(1440)
    assert browser.run(label) == "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(browser: Browser, page: Path, scheme: str) -> None:
    browser.media(scheme=scheme)
    browser.open(page)
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}[scheme]
    contrasts = browser.run(CONTRASTS)
    assert len(contrasts) > 200 and [one for one in contrasts if one[0] < CONTRAST] == []


FOLDED = """
return [...document.querySelectorAll('details > :not(summary)')]
  .map(el => el.checkVisibility({contentVisibilityAuto: true}) && el.clientHeight > 0)
"""
STILL_SCROLLS = """
return [...document.querySelectorAll('.scroll, pre')].filter(el => getComputedStyle(el).overflowY !== 'visible'
  && (el.scrollHeight > el.clientHeight + 2 || el.scrollWidth > el.clientWidth + 2)).length
"""


def test_print_shows_what_is_folded_and_cuts_nothing(browser: Browser, page: Path) -> None:
    browser.resize(718)
    browser.open(page)
    assert not any(browser.run(FOLDED))
    browser.media("print", "dark")
    browser.open(page)
    assert all(shown := browser.run(FOLDED)) and len(shown) > 2
    assert browser.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("return document.scrollingElement.scrollWidth") <= 718
    assert browser.run(STILL_SCROLLS) == 0
    wide = "return [...document.images].filter(image => image.getBoundingClientRect().right > innerWidth).length"
    assert browser.run(wide) == 0


ANCHORS = "return [...document.querySelectorAll('nav a')].map(link => !!document.querySelector(link.hash))"


def test_it_reads_without_javascript_and_by_keyboard(browser: Browser, page: Path) -> None:
    browser.scripts(False)
    browser.open(page)
    assert browser.run("return document.querySelectorAll('main > section').length") > 8
    assert all(anchors := browser.run(ANCHORS)) and len(anchors) > 8
    lost = "box => box.tabIndex !== 0 || box.getAttribute('role') !== 'region' || !box.getAttribute('aria-label')"
    assert browser.run(f"return [...document.querySelectorAll('.scroll')].filter({lost}).length") == 0


def test_its_structure_can_be_heard(browser: Browser, page: Path) -> None:
    browser.open(page)
    levels = browser.run("return [...document.querySelectorAll('h1, h2, h3, h4')].map(head => +head.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert browser.run("return [...document.querySelectorAll('th')].every(th => th.scope)")
    assert browser.run("return [...document.images].every(image => image.alt.length > 10)")
    assert browser.run("return document.documentElement.lang") == "en"
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(el => el.id)")
    assert len(set(ids)) == len(ids)


def test_a_page_that_waits_loads_itself_again(browser: Browser, tmp_path: Path) -> None:
    page = write_page(tmp_path, {**content(tmp_path, ()), "recipe": "first"}, refresh=1)
    browser.open(page)
    assert browser.run("return document.querySelector('#progress p').textContent").startswith("3 of 5 stages are there")
    write_page(tmp_path, {**content(tmp_path, ()), "recipe": "second"}, refresh=1)
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser.driver, 10).until(lambda driver: driver.title == "second · deme")
    assert browser.errors() == []
