"What the tests of pages share: waiting for conditions, outside the browser and inside."
import re
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
POLLING = 150  # ms; looking at every frame would keep the page from its work
PATIENCE = 30.0  # seconds for what takes a second on an idle machine
MARKUP = "<img src=x onerror=document.title='taken'>&amp;"


def wait_until(true, what, seconds=PATIENCE):
    "Waits for a condition outside the browser."
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.05)
    return found


def card(page, what):
    "The text of a headline number."
    return page.locator(f".card:has(.what:text-is('{what}'))")


def shows(page, what, pattern):
    "Waits until a headline number matches."
    page.wait_for_function("""([what, pattern]) => {
        const all = (root) => [...root.querySelectorAll('*')].flatMap((e) => [e, ...(e.shadowRoot ? all(e.shadowRoot) : [])])
        const found = all(document).find((e) => e.classList?.contains('card') && e.querySelector('.what')?.textContent === what)
        return found && new RegExp(pattern).test(found.textContent.slice(what.length))
    }""", arg=[what, pattern], polling=POLLING)


def until(page, condition, argument=None):
    "Waits in the browser for a condition on `models`, all of Bokeh's."
    page.wait_for_function(f"(argument) => {{ const models = [...Bokeh.documents[0]._all_models.values()]; return {condition} }}", arg=argument, polling=POLLING)


def press(page, name): page.get_by_role("button", name=name, exact=True).click()


def brightness(colour):
    "0 to 255; 128 for an element that was just replaced."
    return np.mean([float(part) for part in re.findall(r"[\d.]+", colour)[:3]] or [128])
