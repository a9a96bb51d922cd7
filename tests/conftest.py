"What the browser tests share: a real Chromium, and a page of it."
import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
QUIET = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
MISSING = ("The browser tests need Chromium: install it (Debian and Ubuntu: apt-get install chromium; macOS: "
           "brew install --cask chromium) or name one already there with CHROMIUM=/path/to/it.")


def find_chromium():
    "The browser's program: the one named in $CHROMIUM, else the first known name on the path, else None."
    named = os.environ.get("CHROMIUM")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


# Not one browser for the session: while Playwright runs, no test could start an asyncio loop of its own.
@pytest.fixture(scope="module")
def chromium():
    "A headless Chromium for one test file."
    program = find_chromium()
    if program is None: pytest.fail(MISSING, pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    "An empty page in a fresh profile."
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    yield context.new_page()
    context.close()
