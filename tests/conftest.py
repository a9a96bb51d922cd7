"What the browser tests share: a real Chromium, and a page of it."
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

sys.path.append(str(Path(__file__).parent))
from pages import PATIENCE, ROOT, wait_until  # noqa: E402

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


@pytest.fixture(scope="module")
def processes():
    "Starts processes, and ends those that still run."
    started = []

    def start(*command, **options):
        started.append(subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, **options))
        return started[-1]
    yield start
    for process in started:
        if process.poll() is None: process.send_signal(signal.SIGTERM)
    for process in started: process.wait(20)


@pytest.fixture(scope="module")
def serve(processes, tmp_path_factory):
    "Serves a page for its folders, as its documentation says, and returns its address."
    def start(*folders, page="live", address="127.0.0.1"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = tmp_path_factory.mktemp("serve") / "log"
        processes("-m", "panel", "serve", f"dashboards/{page}.py", "--address", address, "--port", port, "--args", *folders, stderr=log.open("w"))
        wait_until(lambda: "app running" in log.read_text(), "the server", 60)
        return f"http://localhost:{port}/{page}" if address == "0.0.0.0" else f"http://127.0.0.1:{port}/{page}"
    return start


@pytest.fixture(scope="module")
def profile(chromium):
    "One browser profile for this file: the page's scripts are fetched and compiled once."
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    yield context
    context.close()


@pytest.fixture
def browser(profile):
    "A page that lists in `troubles` every error and every request that leaves this machine."
    page = profile.new_page()
    page.troubles, page.frames_seen = [], []
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("console", lambda message: page.troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if re.match(r"(https?://(127\.0\.0\.1|localhost)[:/]|data:|blob:)", request.url)
            else page.troubles.append(request.url))
    page.on("websocket", lambda ws: ws.on("framereceived", lambda frame: page.frames_seen.append(frame)))
    page.set_default_timeout(PATIENCE * 1000)
    yield page
    page.close()
    assert page.troubles == []
