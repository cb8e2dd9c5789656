"""The playground in a real browser: sliders by keyboard, samplers, saving, a narrow screen; nobody else is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from conftest import make_pico_values
from deme_diffusion.playground.saving import PLAYED
from deme_diffusion.playground.session import Session
from deme_diffusion.playground.worker import Worker
from test_playground import Busy, finished, running

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
SRC = "return [...document.querySelectorAll(arguments[0])].map(image => image.src)"
INPUT = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'))"


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory, pico_pipeline: Path) -> Iterator[tuple[Session, Worker, int]]:
    values = make_pico_values(pico_pipeline)
    values["decouple"]["learning_rate"] = 1e-2
    session, worker = Session(finished(tmp_path_factory.mktemp("browser"), values)), Worker()
    with running(session, worker) as client:
        yield session, worker, client.port
    worker.close()
    session.close()


@pytest.fixture
def page(browser: Browser, playground: tuple[Session, Worker, int]) -> Browser:
    browser.open(f"http://127.0.0.1:{playground[2]}/")
    until(lambda: len(shown(browser, "merged")) == 4)
    return browser


def until(true: Callable[[], Any], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the page did not come to it"
        time.sleep(0.02)


def shown(page: Browser, which: str) -> list[str]:
    return list(page.run(SRC, f"#{which} img"))


def text(page: Browser, name: str) -> str:
    return str(page.run("return document.getElementById(arguments[0]).textContent", name))


def settled(page: Browser, act: Callable[[], Any]) -> None:
    """Act, and wait for the samples that follow."""
    before = shown(page, "merged")
    act()
    until(lambda: shown(page, "merged") != before)
    until(lambda: not page.run("return document.getElementById('merged').hasAttribute('aria-busy')"))


def keys(page: Browser, name: str, *pressed: str) -> None:
    page.driver.find_element("id", name).send_keys(*pressed)


def choose(page: Browser, sampler: str) -> None:
    script = (
        "const e = document.getElementById('sampler'); e.value = arguments[0]; e.dispatchEvent(new Event('change'))"
    )
    page.run(script, sampler)


def test_a_slider_changes_the_merged_images_and_not_the_bases(page: Browser) -> None:
    from selenium.webdriver.common.keys import Keys

    settled(page, lambda: page.run(INPUT, "w0n", "1.25"))
    settled(page, lambda: page.run("document.querySelector('#presets button').click()"))  # the base
    assert shown(page, "merged") == shown(page, "base")
    base = shown(page, "base")
    settled(page, lambda: keys(page, "w0", *[Keys.END, Keys.ARROW_LEFT]))
    assert page.run("return document.getElementById('w0n').value") == "1.49"
    assert shown(page, "base") == base != shown(page, "merged")
    assert "w = (1.49, 0)" in text(page, "merged-name")
    settled(page, lambda: page.run(INPUT, "w1n", "-3.5"))  # a number beyond the slider
    assert "w = (1.49, -3.5)" in text(page, "merged-name")
    assert page.run("return document.getElementById('w1').value") == "-0.5"
    assert text(page, "status") == "4 images by DDIM-2, seeds 0 to 3." and page.errors() == []


def test_another_sampler_and_other_seeds_change_both(page: Browser) -> None:
    before = shown(page, "base")
    settled(page, lambda: choose(page, "DDPM-3"))
    assert "DDPM-3" in text(page, "status") and shown(page, "base") != before
    settled(page, lambda: page.run("document.getElementById('next').click()"))
    assert "seeds 4 to 7" in text(page, "status")
    asked = page.requests()
    page.run(INPUT, "steps", "2000")
    until(lambda: text(page, "status").startswith("steps: "))
    assert asked and not any("api/samples" in one for one in page.requests())  # the page knows the bounds itself
    assert page.errors() == []


def test_quick_moves_end_with_the_last_one(page: Browser, playground: tuple[Session, Worker, int]) -> None:
    busy = Busy()
    playground[1].submit("someone", busy)
    assert busy.begun.wait(10)
    page.requests()
    for i in range(30):
        page.run(INPUT, "w0", str(0.01 * i))
    until(lambda: page.run("return document.getElementById('merged').hasAttribute('aria-busy')"))
    busy.go.set()
    until(lambda: "w = (0.29, " in text(page, "merged-name"))
    assert sum("api/samples" in one for one in page.requests()) < 10


def test_an_answer_is_captioned_by_the_weights_that_made_it(
    page: Browser, playground: tuple[Session, Worker, int]
) -> None:
    busy = Busy()
    playground[1].submit("someone", busy)
    assert busy.begun.wait(10)
    page.run(INPUT, "w0n", "0.4")
    until(lambda: page.run("return document.getElementById('merged').hasAttribute('aria-busy')"))
    page.run("state.weights[0] = 1.4")  # moved, and not asked for yet
    busy.go.set()
    until(lambda: not page.run("return document.getElementById('merged').hasAttribute('aria-busy')"))
    assert "w = (0.4, " in text(page, "merged-name")


def told_of_expert_0(page: Browser, where: str) -> bool:
    return text(page, where) == "weight of expert 0: a number from -100 to 100"


def test_a_field_that_holds_no_weight_is_named_and_nothing_is_asked(page: Browser) -> None:
    page.requests()
    for wrong in ("", "500"):
        page.run(INPUT, "w0n", wrong)
        for button, told in (("measure", "measured"), ("save", "saved")):
            page.run("document.getElementById(arguments[0]).click()", button)
            until(partial(told_of_expert_0, page, told))
        until(partial(told_of_expert_0, page, "status"))
    assert not any("api/" in one for one in page.requests())
    settled(page, lambda: page.run(INPUT, "w0n", "0.75"))
    assert text(page, "measured") == text(page, "saved") == "" and page.errors() == []


def test_stop_ends_what_runs_and_says_so(page: Browser, playground: tuple[Session, Worker, int]) -> None:
    busy = Busy()
    playground[1].submit("someone", busy)
    assert busy.begun.wait(10)
    page.run(INPUT, "w0n", "0.3")
    page.run("document.getElementById('save-name').value = 'stopped'; document.getElementById('save').click()")
    until(lambda: text(page, "doing") == "waiting: busy, 1 of 2")
    page.run("document.getElementById('stop').click()")
    until(lambda: text(page, "status") == "Stopped." and text(page, "saved") == "Stopped: nothing was saved.")
    assert page.run("return document.getElementById('busy').hidden")
    busy.go.set()


def test_a_page_of_another_server_offers_to_load_again(page: Browser) -> None:
    page.run("state.facts.server = 'another'")
    page.run(INPUT, "w0n", "0.2")
    until(lambda: "another run is served here now" in text(page, "status"))
    page.errors()  # a browser tells of a request that was refused
    page.run("document.getElementById('reload').click()")
    until(lambda: text(page, "status").startswith("4 images"))


def test_losses_are_shown_by_range(page: Browser) -> None:
    page.run("document.getElementById('measure').click()")
    until(lambda: page.run("return document.querySelectorAll('#loss-rows tr').length") == 3)
    rows = page.run("return [...document.querySelectorAll('#loss-rows th')].map(cell => cell.textContent)")
    assert rows == ["[0,10)", "[10,20)", "all"] and page.errors() == []


def test_a_saved_model_is_the_one_on_the_page(page: Browser, playground: tuple[Session, Worker, int]) -> None:
    from diffusers import DDPMPipeline

    settled(page, lambda: page.run(INPUT, "w0n", "0.625"))
    page.run("document.getElementById('save-name').value = 'from page'; document.getElementById('save').click()")
    until(lambda: "did you mean 'from-page'" in text(page, "saved"))
    page.errors()  # a browser tells of a request that was refused
    page.run("document.getElementById('save-name').value = 'from-page'; document.getElementById('save').click()")
    until(lambda: text(page, "saved").startswith("Saved: "))
    folder = playground[0].run.folder / PLAYED / "from-page"
    assert str(folder) in text(page, "loading") and page.errors() == []
    w1 = float(page.run("return state.weights[1]"))
    expected = playground[0].merger.state(playground[0].weights([0.625, w1]))
    found = DDPMPipeline.from_pretrained(folder).unet.state_dict()
    assert expected.keys() == found.keys() and all(expected[key].equal(found[key]) for key in found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_asks_nobody_else(page: Browser, width: int, scheme: str) -> None:
    page.resize(width)
    page.media(scheme=scheme)
    assert page.run("return document.documentElement.scrollWidth") == width
    asked = [one for one in page.requests() if not one.startswith("data:")]
    assert asked and all(one.startswith("http://127.0.0.1:") for one in asked) and page.errors() == []
    unnamed = (
        "return [...document.querySelectorAll('input,select')].filter(e => !e.labels?.length && !e.ariaLabel).length"
    )
    assert page.run(unnamed) == 0
    size = page.run("const e = document.querySelector('#merged img'); return [e.naturalWidth, e.clientWidth]")
    assert size[0] == 8 < size[1] and page.run("return document.getElementById('merged').className") == "grid pixels"
