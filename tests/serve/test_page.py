"""The page to ask on: what it is made of, and what it does in headless Chromium."""

from __future__ import annotations

import contextlib
import fcntl
import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

import pytest
from page_helpers import Elements
from serve_helpers import live, loaded, task_rows, trained, until

from varlora.calibration import Calibration

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

EVIL = '<img src=x onerror="document.title=1"> & "<b>'


@pytest.fixture(scope="module")
def service():
    with live() as found:
        yield found


def test_nothing_is_inline_and_nothing_comes_from_elsewhere(service):
    text = service.get("/").body.decode()
    elements = Elements(text)
    assert [attrs.get("src") for attrs in elements.of("script")] == ["page.js"]
    assert {attrs["href"] for attrs in elements.of("link")} == {"data:,", "page.css"}
    assert not elements.of("style", "img", "iframe")
    assert not [name for _, attrs in elements.found for name in attrs if name == "style" or name.startswith("on")]
    for path in ("/", "/page.js", "/page.css"):
        assert not re.search(rb"https?://|//\w+\.\w+/|@import|url\(", service.get(path).body)
    assert service.get("/page.js").headers["content-type"].startswith("text/javascript")
    assert service.get("/page.css").headers["content-type"].startswith("text/css")


def test_every_field_has_a_label_and_every_reference_its_target(service):
    elements = Elements(service.get("/").body.decode())
    ids = {attrs["id"] for _, attrs in elements.found if "id" in attrs}
    assert len(ids) == len([1 for _, attrs in elements.found if "id" in attrs])
    labelled = {attrs["for"] for attrs in elements.of("label") if "for" in attrs}
    assert {attrs["id"] for attrs in elements.of("textarea", "input")} == labelled
    for name in ("aria-describedby", "aria-labelledby", "list", "for"):
        assert {attrs[name] for _, attrs in elements.found if name in attrs} <= ids
    assert [attrs.get("lang") for attrs in elements.of("html")] == ["en"]


def test_the_form_of_a_task_of_shared_answers_begins_with_its_prompt():
    with live(trained("true_or_false"), loaded("true_or_false")) as service:
        text = html.unescape(service.get("/").body.decode())
    assert "Answer the question with only True or False: {question} Context: {context}</textarea>" in text
    assert "False\nTrue</textarea>" in text


def test_names_of_strangers_are_escaped():
    run = loaded()
    with live(run=replace(run, settings=replace(run.settings, model=EVIL))) as service:
        assert "<img" not in service.get("/").body.decode()


# --- in a browser


def visit(service, tmp_path: Path, width: int = 1280, **query) -> str:
    """Open the page with a query and return what it has become."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", f"--window-size={width},1000", "--virtual-time-budget=10000", "--dump-dom"]
    address = f"http://127.0.0.1:{service.port}/?{urlencode(query)}"
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=120, check=True)
    problems = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert problems == []
    return done.stdout


def shown(dom: str, id: str) -> str:
    """Return the text of an element; nothing if it is hidden."""
    found = re.search(rf'<(\w+)[^>]*\bid="{id}"([^>]*)>(.*?)</\1>', dom, re.DOTALL)
    assert found, id
    return "" if "hidden" in found[2] else html.unescape(re.sub("<[^>]+>", " ", found[3])).strip()


def bars(dom: str) -> dict[str, dict]:
    """Return of each answer the numbers and the places of its marks."""
    found = {}
    for row in re.findall(r"<tr[^>]*><th scope=\"row\">(.*?)</tr>", dom, re.DOTALL):
        marks = re.findall(r'<i class="(\w+)" style="([^"]*)"', row)
        places = [(kind, *map(float, re.findall(r"([\d.]+)%", style))) for kind, style in marks]
        numbers = re.findall(r'<td class="n">(.*?)</td>', row)
        found[html.unescape(row.partition("</th>")[0])] = {"marks": places, "numbers": numbers}
    return found


@in_chromium
def test_a_question_is_answered_with_bars_and_draws(service, tmp_path):
    row = task_rows()[0]
    dom = visit(service, tmp_path, question=row["question"], answers="\n".join(row["choices"]), risk=0.99, run=1)
    (one,) = service.ask(question=row["question"], answers=row["choices"], draws=True).json["results"]
    found = bars(dom)
    assert list(found) == row["choices"]
    for answer, bar in found.items():
        p, spread = one["probabilities"][answer], one["spread"][answer]
        assert bar["numbers"][0] == f"{100 * p:.1f} %"
        assert bar["numbers"][1] == f"{100 * spread['low']:.1f}–{100 * spread['high']:.1f} %"
        marks = {kind: places for kind, *places in bar["marks"]}
        assert marks["fill"] == pytest.approx([0, 100 * p], abs=0.01)
        assert marks["mean"] == pytest.approx([100 * p], abs=0.01)
        assert marks["range"] == pytest.approx([100 * spread["low"], 100 * (spread["high"] - spread["low"])], abs=0.01)
        dots = [place for kind, place, *_ in bar["marks"] if kind == "dot"]
        assert dots == pytest.approx([100 * q for q in one["draws"][answer]], abs=0.01)
    assert shown(dom, "answer") == f"{one['answer']}: {100 * one['probabilities'][one['answer']]:.1f} %"
    assert shown(dom, "advice").startswith("Sure enough: a risk of 99.0 % needs 1.0 %")
    assert shown(dom, "epistemic") == f"{one['uncertainty']['epistemic']:.3f} nats"
    assert shown(dom, "problem") == ""


@in_chromium
def test_the_slider_changes_the_spread_and_risk_the_advice(service, tmp_path):
    row = task_rows()[1]
    asked = {"question": row["question"], "answers": "\n".join(row["choices"]), "run": 1}
    mean = visit(service, tmp_path, **asked, tau=0, risk=0)
    (own,) = service.ask(question=row["question"], answers=row["choices"], tau=0).json["results"]
    assert shown(mean, "tau-shown") == "0.00"
    for answer, bar in bars(mean).items():
        assert bar["numbers"][0] == f"{100 * own['probabilities'][answer]:.1f} %"
    assert shown(mean, "advice").startswith("Better abstain: a risk of 0.0 % needs 100.0 %")
    wide = visit(service, tmp_path, **asked, tau=4)
    (own,) = service.ask(question=row["question"], answers=row["choices"], tau=4).json["results"]
    for answer, bar in bars(wide).items():
        assert bar["numbers"][0] == f"{100 * own['probabilities'][answer]:.1f} %"
    assert shown(wide, "advice") == ""


@in_chromium
def test_what_is_wrong_is_said_and_texts_are_shown_as_they_are(service, tmp_path):
    dom = visit(service, tmp_path, question="What?", answers="one", run=1)
    assert shown(dom, "problem") == "Expected 2 to 64 answers, but got 1."
    assert shown(dom, "answer") == ""
    dom = visit(service, tmp_path, question=EVIL, answers=f"{EVIL}\nother", run=1)
    assert "<img" not in dom
    assert EVIL in bars(dom)


@in_chromium
def test_a_calibrated_run_is_asked_as_calibrated_until_the_slider_is_taken(tmp_path):
    row = task_rows()[0]
    asked = {"question": row["question"], "answers": "\n".join(row["choices"]), "run": 1}
    with live(run=replace(loaded(), calibration=Calibration(0.5, 0.0, 3.0, 2.0, 4))) as service:
        dom = visit(service, tmp_path, **asked)
        assert shown(dom, "tau-shown") == "as calibrated"
        assert "the average of 4 draws" in shown(dom, "caption")
        dom = visit(service, tmp_path, **asked, tau=1)
        assert shown(dom, "tau-shown") == "1.00"
        assert "the average of 10 draws" in shown(dom, "caption")


class Browser:
    """A tab of headless Chromium, spoken to by its DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path) -> None:
        ends = [*os.pipe(), *os.pipe()]
        theirs = [fcntl.fcntl(ends[i], fcntl.F_DUPFD, 10) for i in (0, 3)]  # it wants them as 3 and 4
        moved = "".join(f"os.dup2({end}, {number}); " for end, number in zip(theirs, (3, 4)))
        start = f"import os, sys; {moved}os.execv(sys.argv[1], sys.argv[1:])"
        command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", start, *command], pass_fds=theirs, **quiet)
        for end in (ends[0], ends[3], *theirs):
            os.close(end)
        self.reader, self.writer = os.fdopen(ends[2], "rb"), os.fdopen(ends[1], "wb")
        self.number, self.session = 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def call(self, method: str, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params, **self.session}
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:  # events come between
            text = bytearray()
            while (byte := self.reader.read(1)) != b"\0":
                assert byte, "Chromium has ended"
                text += byte
            found = json.loads(text)
            if found.get("id") == self.number:
                if "error" in found:
                    raise LookupError(found["error"])
                return found["result"]

    def value(self, expression: str):
        try:
            return self.call("Runtime.evaluate", expression=expression)["result"].get("value")
        except LookupError:  # between two pages there is none
            return None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.close()
        self.writer.close()


@pytest.fixture
def browser(tmp_path):
    with contextlib.closing(Browser(tmp_path / "profile")) as found:
        yield found


def opened(browser: Browser, address: str) -> None:
    browser.call("Page.navigate", url=address)
    until(lambda: browser.value("document.readyState === 'complete' && location.href !== 'about:blank'"))


def address_of(service, **query) -> str:
    row = task_rows()[0]
    asked = {"question": row["question"], "answers": "\n".join(row["choices"]), "run": 1}
    return f"http://127.0.0.1:{service.port}/?{urlencode({**asked, **query})}"


@in_chromium
def test_the_slider_asks_when_it_is_moved_and_a_later_question_ends_the_earlier(browser):
    row = task_rows()[0]
    with live(tau=0.02) as service:
        asked, draw = [], service.service.engine.draw
        service.service.engine.draw = lambda rows, use: (asked.append(use.tau), draw(rows, use))[1]
        opened(browser, address_of(service))
        until(lambda: browser.value("!document.getElementById('result').hidden"))
        assert asked == [0.02]  # as the service was told, whatever the slider can be set to
        assert browser.value("document.getElementById('tau-shown').textContent") == "0.02"
        (own,) = service.ask(question=row["question"], answers=row["choices"], tau=2.5).json["results"]
        browser.value("""{
            const slider = document.getElementById("tau");
            window.aborted = 0;
            const own = AbortController.prototype.abort;
            AbortController.prototype.abort = function () { window.aborted += 1; own.call(this); };
            slider.value = 2.5;
            slider.dispatchEvent(new Event("input", { bubbles: true }));
        }""")
        best = f"{own['answer']}: {100 * own['probabilities'][own['answer']]:.1f} %"
        until(lambda: browser.value("document.getElementById('answer').textContent") == best)
        assert browser.value("document.getElementById('tau-shown').textContent") == "2.50"
        assert browser.value("window.aborted") == 1
        assert asked == [0.02, 2.5, 2.5]


@in_chromium
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_link_elsewhere_fills_the_form_in_and_does_not_ask(browser, service, elsewhere):
    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"<script>location = {json.dumps(address_of(service))}</script>".encode())

        def log_message(self, *texts):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        before = service.service.counters.answered()
        opened(browser, f"http://127.0.0.1:{other.server_port}/" if elsewhere else address_of(service))
        until(lambda: browser.value(f"location.port === '{service.port}' && document.readyState === 'complete'"))
        other.shutdown()
    assert browser.value("document.getElementById('question').value") == task_rows()[0]["question"]
    if elsewhere:
        assert browser.value("document.referrer") == f"http://127.0.0.1:{other.server_port}/"
        assert browser.value("document.getElementById('status').textContent") == ""  # where an answer is waited for
        assert browser.value("document.getElementById('result').hidden")
        browser.value("document.querySelector('button').click()")
    until(lambda: browser.value("!document.getElementById('result').hidden"))
    assert service.service.counters.answered() == before + 1
