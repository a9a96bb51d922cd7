"The live lab in a real browser: tree, branch by hand, replay, compare, links, exports, alerts, and what a page may not do."
import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, urlsplit

import psutil
import pytest
from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import websocket_connect

from sdalab.journal.reader import Run
from sdalab.journal.tree import history, main_lines
from sdalab.views.following import sample_run

sys.path.insert(0, str(Path(__file__).parent))
from test_live import (MARKUP, MODELS, PATIENCE, POLLING, ROOT, browser, card, press, processes, profile, see_refused, serve, shows, sources, spot, train, until, visit, wait_until)  # noqa: E402, F401

SMALL = "model.width=16", "model.inner_width=16", "model.hidden_width=32", "rows=1", "checkpoints.every=20", "evaluate_every=20", "evaluate_batches=1"
LONG = 240  # seconds for what starts a process that trains, on a busy machine


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Three runs that only look like training: one that branched, and two to compare it with."
    folder = tmp_path_factory.mktemp("lab")
    sample_run(folder)
    sample_run(folder, lanes=2, forked=False, name="wide")
    sample_run(folder, steps=90, forked=False, name=MARKUP)
    return folder


@pytest.fixture(scope="module")
def address(serve, runs): return serve(runs)


def command(processes, *words):
    "Starts a command of the lab."
    return processes("-m", "sdalab.cli", *words)


def small(name, runs, steps):
    "The words that train a very small run."
    sets = [word for change in SMALL for word in ("--set", change)]
    return "train", "edge-95k", "--runs", runs, "--name", name, "--steps", steps, "--set", 'monitor.preset="off"', *sets


def fill(page, label, value):
    "Types a value into a field, as a person does."
    field = page.get_by_label(label, exact=True).first
    field.click()
    field.press("Control+a")
    page.keyboard.type(str(value))
    field.press("Tab")


def point(page, title, x, y, words, act="move"):
    "Points at a place of a figure, or clicks it, until words appear: a figure that still takes its place may not be there yet."
    def seen():
        across, down = spot(page, title, x, y)
        page.mouse.move(across, down - 2)
        getattr(page.mouse, act)(across, down)
        page.wait_for_timeout(1000)
        return page.get_by_text(words).count()
    wait_until(seen, words)


def open_panel(page):
    "Opens the panel for branching by hand."
    page.get_by_role("button", name="Branch by hand").click()
    page.get_by_role("button", name="Go", exact=True).wait_for()


def choose(page, label, text):
    "Chooses an entry of a list."
    page.get_by_role("combobox", name=label).click()
    page.locator(".MuiMenuItem-root").filter(has_text=text).first.click()


def in_link(page, *parts):
    "Waits until the address holds something."
    page.wait_for_function("(parts) => parts.every((part) => decodeURIComponent(location.href).includes(part))", arg=list(parts), polling=POLLING)


def test_the_tree_tells_why_and_compares(address, runs, browser):
    visit(browser, f"{address}?run=sample")
    shows(browser, "status", "finished")
    point(browser, "Time goes", 24, 3, "Node 3", "click")  # the tree stands over the charts too: a node leads to what is known of it
    in_link(browser, "view=tree", "node=3")
    visit(browser, f"{address}?run=sample")  # what the run went back over is drawn too
    browser.get_by_text("Pale dots: steps that the run went back over.").wait_for()
    left = sources(browser, "validated_at")[0]
    assert left["at"] == [list(range(20, 40))] and left["validated_at"] == [[29, 39]]
    point(browser, "Training loss", 35, left["loss"][0][15], "steps 20 to 39, which the run went back over")
    visit(browser, f"{address}?run=sample&view=tree")
    until(browser, "models.some((m) => m.data?.outcome === undefined && m.data?.decision?.length === 5)")
    drawn = next(data for data in sources(browser, "decision") if len(data["node"]) == 5)
    assert drawn["node"] == [1, 4, 1, 2, 3] and drawn["words"][0] == "on the path that survived" and drawn["words"][2] == "the main line, until it was left"
    browser.get_by_text("came from").wait_for()
    in_link(browser, "node=4")
    choose(browser, "compared with", "1: as configured")
    browser.get_by_text("Since step 20: node 4 less node 1 is").wait_for()
    browser.locator(".bk-Figure").nth(2).wait_for()
    in_link(browser, "other=1")
    browser.reload()
    browser.get_by_text("Since step 20: node 4 less node 1 is").wait_for()  # the link shows what its sender saw
    point(browser, "Time goes", 24, 3, "Node 3", "click")  # the last branch
    in_link(browser, "node=3")


def test_a_run_is_branched_by_its_trainer_and_by_a_worker(address, runs, browser, processes):
    process = command(processes, *small("real", runs, 100_000))
    wait_until(lambda: (runs / "real/journal.db").exists(), "the run", LONG)
    wait_until(lambda: Run(runs / "real").progress().get("step", 0) > 60, "its first steps", LONG)
    browser.set_default_timeout(1000 * LONG)
    visit(browser, f"{address}?run=real&view=tree&node=1")
    open_panel(browser)
    fill(browser, "branch after step", 40)
    fill(browser, "steps to take", 30)
    fill(browser, "learning rate scale", 0.5)
    press(browser, "Go")
    wait_until(lambda: "branch" in set(Run(runs / "real").events().kind), "the trainer branches", LONG)
    run = Run(runs / "real")
    forked = run.nodes().query("fork == 1")
    assert forked.first_step.tolist() == [40, 40] and [d["learning_rate_scale"] for d in forked.decision] == [1.0, 0.5] and forked.last_step.tolist() == [69, 69]
    until(browser, "models.some((m) => m.data?.decision?.length === 3 && m.data.node.includes(3))")  # and the page shows it
    assert run.status() == "running" and run.commands().kind.tolist() == ["branch"]
    press(browser, "Stop")
    press(browser, "Stop the run")
    assert process.wait(LONG) == 130

    fill(browser, "steps to take", 10)
    fill(browser, "weight decay scale", 0.25)
    press(browser, "Go")
    browser.get_by_text("a worker is at it").wait_for()
    wait_until(lambda: 2 in set(run.nodes().fork) and run.nodes().query("fork == 2").last_step.notna().all(), "the worker", LONG)
    browser.get_by_text("branch: done").wait_for()
    visit(browser, f"{address}?run=real&view=tree&node=3")
    open_panel(browser)
    press(browser, "Verify by running again")
    browser.get_by_text("identical to the bit").wait_for()
    press(browser, "Accept into the main line")
    wait_until(lambda: "collapse" in set(run.events().kind), "the future is accepted", LONG)
    line = history(run, next(iter(main_lines(run).values())), ["loss"])
    assert [int(node) for node in dict.fromkeys(line.node.values)] == [1, 3] and int(line.step[-1]) == 69


def test_a_form_takes_valid_decisions_only(address, browser):
    visit(browser, f"{address}?run=sample&view=tree&node=4")
    open_panel(browser)
    assert browser.get_by_role("button", name="Accept into the main line").is_disabled()
    browser.get_by_role("button", name="further fields").click()
    unset = browser.get_by_label("clip norm", exact=True)
    assert unset.input_value() == "" and browser.get_by_label("learning rate scale", exact=True).input_value() == "1"
    fill(browser, "clip norm", "0.00002")
    wait_until(lambda: unset.input_value() == "0.00002", "what was typed")
    press(browser, "Add this future")
    browser.get_by_text("clip_norm=2e-05").wait_for()
    fill(browser, "learning rate scale", "")  # emptied: as it is
    wait_until(lambda: unset.input_value() == "", "nothing")
    fill(browser, "reset warmup", 20)
    browser.get_by_text("belongs to a reset").wait_for()  # as soon as it is typed
    wait_until(browser.get_by_role("button", name="Go", exact=True).is_disabled, "nothing to go for")
    choose(browser, "momentum reset", "first")
    press(browser, "Add this future")
    browser.get_by_text("momentum_reset=first, reset_warmup=20").wait_for()
    fill(browser, "learning rate scale", -3)
    browser.get_by_text("learning_rate_scale = -3.0: should be greater than or equal to 0").wait_for()
    wait_until(browser.get_by_role("button", name="Add this future").is_disabled, "nothing to add")
    fill(browser, "learning rate scale", 1)
    fill(browser, "branch after step", 12345)
    browser.get_by_text("branch after step = 12,345: node 4 has come to step 60").wait_for()


def test_a_replay_never_shows_what_was_not_yet_known(address, browser):
    visit(browser, f"{address}?run=sample&view=replay&at=0.5")
    browser.get_by_text("50 steps taken in 3 nodes").wait_for()
    drawn = next(data for data in sources(browser, "decision") if len(data["node"]))
    assert 4 not in drawn["node"] and "the main line, until it was left" not in drawn["words"]
    losses = next(data for data in sources(browser, "smooth") if "loss" in data)
    assert losses["step"][-1] == 39 and browser.get_by_text("Node 4").count() == 0
    choose(browser, "Speed", "a run in 5 s")
    press(browser, "Play")
    browser.get_by_text("100 steps taken in 4 nodes").wait_for()  # the whole run
    until(browser, "models.some((m) => m.data?.smooth && m.data.loss && m.data.step.at(-1) === 59)")
    browser.wait_for_function("() => !location.href.includes('at=')", polling=POLLING)  # the end is where a replay begins
    browser.get_by_label("History").focus()
    browser.keyboard.press("Home")
    browser.get_by_text("1 steps taken in 1 nodes").wait_for()
    rail = browser.locator(".MuiSlider-root").first.bounding_box()
    browser.mouse.click(rail["x"] + 0.35 * rail["width"], rail["y"] + rail["height"] / 2)  # a leap from one step, which the axes follow
    browser.get_by_text(re.compile("3[4-6] steps taken in 1 nodes")).wait_for()
    until(browser, "models.filter((m) => m.type === 'Figure').every((m) => m.x_range.end > 32)")


def test_runs_are_compared(address, browser):
    visit(browser, f"{address}?run=sample&view=compare&runs={quote(json.dumps(['wide', 'sample', MARKUP]))}")
    until(browser, "models.filter((m) => m.type === 'Legend').some((m) => m.items.length === 4)")
    rows = browser.locator(".tabulator-row")
    rows.nth(3).wait_for()
    assert MARKUP in browser.locator(".tabulator-table").inner_text() and browser.locator("img[src=x]").count() == 0 and browser.title() == "sdalab live"
    heads = browser.locator(".tabulator-col-title").all_inner_texts()
    assert "steps" in heads and "lowest validation loss" in heads and "rows" not in heads  # what is the same for all is left out
    browser.locator(".tabulator-col-title", has_text="steps taken").click()
    wait_until(lambda: "90" in rows.last.inner_text(), "the longest run comes last")
    browser.evaluate(f"() => {{ for (const one of {MODELS}.find((m) => m.type === 'Legend').items[1].renderers) one.visible = false }}")  # as a click on its name does
    in_link(browser, 'hidden=["', 'sort=[["steps+taken",+"asc"]]')
    browser.reload()
    until(browser, "models.filter((m) => m.type === 'GlyphRenderer' && !m.visible).length === 2")
    wait_until(lambda: "90" in rows.last.inner_text(), "the order is in the link")
    choose(browser, "grouped by", "optimizer.learning_rate")
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text.includes('mean and 95 % interval'))")
    in_link(browser, "by=optimizer.learning_rate")


def test_links_hold_every_control(address, browser):
    visit(browser, f"{address}?run=wide")
    shows(browser, "status", "finished")
    choose(browser, "Charts go by", "minutes")
    browser.get_by_label("Log loss").click()
    browser.get_by_role("switch", name=re.compile("Ignore outliers")).click()
    choose(browser, re.compile("^Signals"), "gradients")
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text.startsWith('gradient norm, nats/token: last'))")
    in_link(browser, "axis=minutes", "log_y=true", "calm=true", "group=gradients")
    browser.reload()
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text === 'Training loss, nats per token (log)')")
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text.startsWith('gradient norm, nats/token: last'))")
    assert browser.get_by_role("switch", name=re.compile("Ignore outliers")).is_checked()
    press(browser, "Tree")
    in_link(browser, "view=tree")
    browser.go_back()  # as far as the links of the tree go
    while "view=tree" in browser.url: browser.go_back()
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text === 'Training loss, nats per token (log)')")
    visit(browser, f"{address}?run=wide&view=replay&at=0.5&log_y=true&smoothing=0.5")  # those of the charts in a replay too
    until(browser, "models.some((m) => m.type === 'Figure' && m.title.text === 'Training loss, nats per token (log)')")
    browser.get_by_role("switch", name=re.compile("Ignore outliers")).click()
    in_link(browser, "view=replay", "at=0.5", "log_y=true", "smoothing=0.5", "calm=true")
    visit(browser, f"{address}?run=wide&axis=%2Fetc%2Fpasswd&smoothing=9&zoom=%5B5,20%5D")
    browser.get_by_text("as zoomed").wait_for()
    assert all(data["step"][-1] < 22 for data in sources(browser, "smooth") if "loss" in data)


def test_one_figure_goes_into_other_pages_and_the_buttons_do_not(address, runs, browser, tmp_path):
    visit(browser, f"{address}?run=sample&smoothing=0.5")
    press(browser, "Embed")
    choose(browser, "Figure", "validation loss")
    browser.get_by_text("figure=validation_loss").wait_for()
    lines = browser.locator("pre.code").inner_text()
    assert "run=sample" in lines and "smoothing=0.5" in lines and str(runs) not in lines
    (tmp_path / "page.html").write_text(lines + f'<iframe src="{address}?run=sample"></iframe><iframe src="{address}?run=sample&figure=%3Cimg%20src%3Dx%3E"></iframe>')
    browser.goto((tmp_path / "page.html").as_uri())  # a page of another origin
    frame, page, wrong = (browser.frame_locator(f"iframe >> nth={i}") for i in range(3))
    frame.get_by_text("sample · finished · step 60 of 60").wait_for()
    assert frame.locator(".bk-Figure:visible").count() == 1 and frame.get_by_role("button", name="lane 0").count() == frame.get_by_role("button").count() == 1
    page.get_by_text("A page of another site may show single figures only.").wait_for()
    assert page.get_by_role("button").count() == 0 and page.get_by_role("link").get_attribute("href") == f"{address}?run=sample"
    wrong.get_by_text("There is no figure named <img src=x>.").wait_for()
    visit(browser, f"{address}?run=sample&figure=tree")
    browser.evaluate("(src) => document.body.append(Object.assign(document.createElement('iframe'), {src, id: 'own'}))", f"{address}?run=sample")
    browser.frame_locator("#own").get_by_role("button", name="Hold view").wait_for()  # a page of this server may


def test_what_is_seen_can_be_kept(address, runs, browser, tmp_path):
    import pandas as pd
    visit(browser, f"{address}?run=sample&zoom=%5B5,20%5D")
    browser.get_by_text("as zoomed").wait_for()
    kept = {}
    for name, kind in (("CSV", "csv"), ("Parquet", "parquet"), ("Report", "html")):
        with browser.expect_download() as download: browser.get_by_text(name, exact=True).click()
        kept[kind] = tmp_path / download.value.suggested_filename
        download.value.save_as(kept[kind])
    assert pd.read_csv(kept["csv"]).step.tolist() == pd.read_parquet(kept["parquet"]).step.tolist() == list(range(5, 21))
    asked = []
    browser.on("request", lambda request: asked.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    browser.goto(kept["html"].as_uri())
    until(browser, "models.filter((m) => m.type === 'Figure').length === 7")
    browser.get_by_text("The tree").wait_for()
    assert browser.locator("canvas").count() >= 7 and asked == []


def test_rules_mark_and_notify(address, runs, browser, train):
    (runs / "alerts.yaml").write_text(json.dumps([dict(name="low <b>loss</b>", signal="loss", below=3.0, steps=3, runs="watched", level="error",
                                                       command=[sys.executable, "-c", "import os; open('told', 'w').write(os.environ['SDALAB_ALERT_TEXT'])"])]))
    visit(browser, f"{address}?run=sample")
    shows(browser, "status", "finished")
    process = train(runs / "watched", steps=100_000, rate=100, lanes=2, at_once=100)[0]
    wait_until(lambda: (runs / "told").is_file() and (runs / "told").read_text(), "the command", LONG)
    alerts = [json.loads(line) for line in (runs / "alerts.jsonl").read_text().splitlines()]
    assert alerts[0]["run"] == "watched" and alerts[0]["rule"] == "low <b>loss</b>" and "loss = " in (runs / "told").read_text()
    visit(browser, f"{address}?run=watched")
    browser.locator(".notice.error").first.wait_for()
    assert "low <b>loss</b>" in browser.locator(".notice.error").first.inner_text()
    until(browser, "models.some((m) => m.data?.kind?.includes('alert'))")
    process.terminate()


def locked(run_dir):
    "Holds the journal as a backup or a repair would; returns what lets it go."
    db = sqlite3.connect(run_dir / "journal.db", isolation_level=None)
    db.execute("PRAGMA locking_mode = EXCLUSIVE")
    db.execute("BEGIN EXCLUSIVE")
    db.execute("UPDATE meta SET value = value")
    return lambda: (db.execute("ROLLBACK"), db.close())


def damaged(run_dir, damage):
    "Puts a damaged copy in the place of the journal; returns what puts the good one back."
    good, path = (run_dir / "journal.db").read_bytes(), run_dir / "journal.db"
    path.with_name("damaged").write_bytes(good)
    damage(path.with_name("damaged"))
    path.with_name("damaged").replace(path)

    def mend():
        path.with_name("whole").write_bytes(good)
        path.with_name("whole").replace(path)
    return mend


def cut(path): os.truncate(path, path.stat().st_size // 2 + 100)


def emptied(path):
    with closing(sqlite3.connect(path)) as db: db.executescript("PRAGMA journal_mode = DELETE; DROP TABLE events; DROP TABLE steps")


def gone(run_dir):
    run_dir.rename(run_dir.parent.parent / "for a while")
    return lambda: (run_dir.parent.parent / "for a while").rename(run_dir)


FAULTS = dict(locked=(locked, "another process has locked"), cut=(lambda run: damaged(run, cut), "malformed"), emptied=(lambda run: damaged(run, emptied), "no such table"), gone=(gone, "holds no journal.db"))


def test_a_faulty_journal_is_told_of_and_read_when_it_is_good_again(address, runs, browser):
    sample_run(runs, name="faulty")
    visit(browser, f"{address}?run=faulty")
    shows(browser, "step", "60")
    other = browser.context.new_page()  # who looks at another run is not held up
    other.goto(f"{address}?run=wide")
    shows(other, "status", "finished")
    for fault, words in FAULTS.values():
        mend = fault(runs / "faulty")
        try:
            told = browser.get_by_role("alert").filter(has_text="cannot be read just now").filter(has_text=words)
            told.wait_for()
            assert told.inner_text().count(". ") == 1 and told.inner_text().endswith("This page tries again by itself.")
            assert browser.get_by_role("button", name="Report").is_disabled() and browser.locator(".bk-Figure").count() >= 6  # what was known stays
            shows(other, "CPU, memory", "GiB")
        finally: mend()
        told.wait_for(state="hidden")
        shows(browser, "step", "60")
        assert [len(data["step"]) for data in sources(browser, "smooth") if "loss" in data] == [60]
    other.close()


def test_views_opened_on_a_faulty_journal_wait_for_it(address, runs, browser):
    if not (runs / "faulty").exists(): sample_run(runs, name="faulty")
    for view, words in dict(now="", tree="came from", replay="100 steps taken in 4 nodes", compare="faulty").items():
        mend = damaged(runs / "faulty", cut)
        try:
            visit(browser, f"{address}?run=faulty&view={view}")
            browser.get_by_text("cannot be read just now").first.wait_for()
        finally: mend()
        if view == "now": shows(browser, "step", "60")
        else: browser.get_by_text(words).first.wait_for()
        browser.get_by_text("cannot be read just now").first.wait_for(state="hidden")


def test_a_run_that_another_one_replaces(address, runs, browser):
    if not (runs / "faulty").exists(): sample_run(runs, name="faulty")
    visit(browser, f"{address}?run=faulty")
    shows(browser, "step", "60")
    (runs / "faulty/journal.db").unlink()
    shutil.rmtree(runs / "faulty")
    sample_run(runs, steps=90, forked=False, name="faulty")
    shows(browser, "step", "90")
    browser.get_by_text("Another run took the place of faulty").wait_for()
    assert [len(data["step"]) for data in sources(browser, "smooth") if "loss" in data] == [90]
    visit(browser, f"{address}?run=faulty&view=replay")
    browser.get_by_text("90 steps taken in 1 nodes").wait_for()


def test_what_a_viewer_without_a_password_asks_is_not_done(serve, runs, browser, train):
    run = train(runs / "open", rate=20, steps=100_000)[1]
    browser.goto(serve(runs, "0.0.0.0") + "?run=open&view=tree")
    browser.get_by_text("asks for no password").first.wait_for()
    open_panel(browser)
    for name in ("Go", "Pin", "What is expected", "Accept into the main line", "Verify by running again"): assert browser.get_by_role("button", name=name, exact=True).is_disabled()
    browser.evaluate(f"() => setInterval(() => {{ for (const model of {MODELS}) if (model.disabled === true) model.disabled = false }}, 20)")  # whatever its buttons look like, and whatever a tick makes of them
    press(browser, "Go")
    browser.locator(".notice.error").filter(has_text="asks for no password").wait_for()
    assert len(run.commands()) == 0 and run.nodes().fork.max() == 0


def test_with_a_password_commands_are_taken(serve, runs, browser, train):
    run = train(runs / "guarded", rate=20, steps=100_000)[1]
    address = serve(runs, "0.0.0.0", "--basic-auth", "a secret", "--cookie-secret", "another secret", "--basic-login-template", "dashboards/login.html")
    kept = lambda: browser.evaluate("document.cookie.match(/next_url=([^;]*)/)[1]")
    for elsewhere in ("///elsewhere.example/", "/.///elsewhere.example/"):  # the first passes Panel's own check
        browser.goto(address.removesuffix("live") + "login?next=" + quote(elsewhere))
        assert kept() == "/"
    browser.goto(address + "?run=guarded&smoothing=0.5&filter=%5Eloss%3B%7C%22%25")
    for password in ("a guess", "a secret"):
        browser.get_by_label("Name").fill("somebody")
        browser.get_by_label("Password").fill(password)
        press(browser, "Log in")
        if password == "a guess": browser.get_by_text("Invalid username or password!").wait_for()
    shows(browser, "status", "running")
    in_link(browser, "/live?run=guarded&", "smoothing=0.5", 'filter=^loss;|"%')  # the link that was opened first
    press(browser, "Pause")
    wait_until(lambda: run.status() == "paused", "the run obeys")
    press(browser, "Resume")
    press(browser, "Note")
    browser.get_by_label("What should be remembered of this moment").fill(MARKUP)
    press(browser, "Keep the note")
    wait_until(lambda: "note" in set(run.commands().kind), "the note is sent")
    assert run.commands().payload.iloc[-1] == {"text": MARKUP} and browser.locator("img[src=x]").count() == 0


def test_the_page_listens_on_this_machine_alone(address):
    port = urlsplit(address).port
    assert {one.laddr.ip for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN and one.laddr.port == port} == {"127.0.0.1"}
    told = [line for path in ("README.md", "dashboards/live.py", "sdalab/cli.py") for line in (ROOT / path).read_text(encoding="utf-8").splitlines() if "panel serve dashboards/" in line]
    assert len(told) >= 4 and [line for line in told if "--address" not in line] == []


def test_other_origins_are_refused(address):
    async def connect(origin):
        url = address.replace("http:", "ws:") + "/ws"
        return await websocket_connect(HTTPRequest(url, headers={"Origin": origin}), subprotocols=["bokeh"])
    with ThreadPoolExecutor(1) as thread:  # a loop of its own, beside that of the browser
        answer = thread.submit(asyncio.run, connect("http://elsewhere.example"))
        with pytest.raises(HTTPClientError) as refused: answer.result()
    assert refused.value.code == 403


def test_names_that_others_point_at_this_machine_are_refused(address, browser):
    see_refused(browser, address)


def test_names_in_the_address_are_no_paths(address, runs, browser):
    outside = runs.parent / "outside"
    sample_run(outside, forked=False, name="secret")
    for view, name in dict(now="../outside/secret", tree=outside / "secret", replay="..%2Foutside%2Fsecret").items():
        visit(browser, f"{address}?run={name}&view={view}")
        browser.get_by_text("There is no run named").wait_for()
    visit(browser, f"{address}?run=sample&view=compare&runs={json.dumps(['../outside/secret'])}")
    browser.get_by_text("Reading the runs").wait_for()
    assert browser.locator(".tabulator-row").count() == 0


@pytest.mark.skipif("SDALAB_SOAK" not in os.environ, reason="long: make soak")
def test_two_hundred_viewers_leave_no_memory_behind(runs, profile, tmp_path):
    command = [sys.executable, "-m", "panel", "serve", "dashboards/live.py", "--address", "127.0.0.1", "--port", "5907", "--unused-session-lifetime", "2000", "--check-unused-sessions", "1000", "--args", str(runs)]
    with (tmp_path / "log").open("w") as log: process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=log, stderr=log)
    try:
        wait_until(lambda: "app running" in (tmp_path / "log").read_text(), "the server", 120)
        memory = {}
        for viewer in range(1, 201):
            page = profile.new_page()
            page.goto(f"http://127.0.0.1:5907/live?run=sample&view={('now', 'tree', 'replay', 'compare')[viewer % 4]}")
            page.locator(".bk-Figure").first.wait_for(timeout=120_000)
            page.close()
            if viewer in (50, 200):
                time.sleep(10)  # sessions that nobody uses end
                memory[viewer] = psutil.Process(process.pid).memory_info().rss / 2**20
        assert memory[200] < 1.1 * memory[50] + 20, memory
    finally:
        process.terminate()
        process.wait(20)
