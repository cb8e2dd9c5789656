"""A headless Chromium for tests of pages: what it logged, what it asked for, what it shows; skips where there is none.

`DEME_CHROMIUM` and `DEME_CHROMEDRIVER` name others than those on the PATH. The fixture `browser` is in `conftest.py`.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

CHROMIUM, DRIVER = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@dataclass
class Browser:
    """One tab; `driver` is selenium's. Logs are told once: each call gives what came since the last."""

    driver: Any

    def open(self, page: Path | str) -> None:
        """Load a file or an address, and wait until it has loaded."""
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns (`return ...`)."""
        return self.driver.execute_script(script, *arguments)

    def command(self, name: str, **values: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(name, values)

    def resize(self, width: int, height: int = 800) -> None:
        """The viewport in CSS pixels; as narrow as a telephone, which a window cannot be."""
        size = {"width": width, "height": height}
        self.command("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    def media(self, kind: str = "", scheme: str = "light") -> None:
        """Emulate `print` ('' is the screen), and the reader's light or dark colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.command("Emulation.setEmulatedMedia", media=kind, features=features)

    def scripts(self, on: bool) -> None:
        """Whether pages may run JavaScript (`run` works either way)."""
        self.command("Emulation.setScriptExecutionDisabled", value=not on)

    def errors(self) -> list[str]:
        """What the console was told of errors and warnings."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, itself first."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]

    def picture(self, path: Path) -> Path:
        """The whole page as a PNG, also below the fold."""
        size = self.command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self.command("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))
        return path


def program(named: str, names: tuple[str, ...]) -> str:
    """A program by its environment variable or on the PATH; the test is skipped where there is none."""
    found = os.environ.get(named) or next((path for name in names if (path := shutil.which(name))), None)
    return found or pytest.skip(f"no {names[0]} (or set {named})")


def start(folder: Path, options: tuple[str, ...] = (), environment: Mapping[str, str] | None = None) -> Any:
    """A selenium driver of a Chromium whose profile is in this folder; skips where a part is missing."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chosen = webdriver.ChromeOptions()
    chosen.binary_location = program("DEME_CHROMIUM", CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={folder}", *options):
        chosen.add_argument(option)
    chosen.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = Service(program("DEME_CHROMEDRIVER", DRIVER), env={**os.environ, **(environment or {})})
    return webdriver.Chrome(options=chosen, service=service)


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests: starting it takes a second."""
    driver = start(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any) -> Browser:
    """An empty tab, 1280 pixels wide, light, with scripts and without old logs."""
    made = Browser(chromium)
    made.scripts(True)
    made.media()
    made.resize(1280)
    made.open("about:blank")
    made.errors()
    made.requests()
    return made
