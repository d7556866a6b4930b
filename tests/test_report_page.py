"""The report's page, read as text and driven in headless Chromium: links, sorting, filters, and narrow screens."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from page_helpers import Elements
from PIL import Image
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import roc_auc_score
from test_report import write_run

from varlora.curves import out_of_distribution, over_draws, risk_by_coverage, series_of, training
from varlora.disagreement import disagreement
from varlora.evaluated import read_runs
from varlora.metrics import risk_coverage
from varlora.page import html_page
from varlora.predictions import load_predictions, save_predictions
from varlora.report import build_report
from varlora.results import rows_of_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")

SETTINGS = {"arc_easy": {"n": 60, "c": 4}, "boolq": {"n": 40, "c": 2}}
METHODS = ("adamw", "ivon", "swag")


def with_texts(run: Path) -> Path:
    """Give each row a question and answers that only pass where they are escaped."""
    path = run / "predictions.safetensors"
    found = load_predictions(path)
    counts = found.logits_mean.isfinite().sum(1).tolist()
    prompts = tuple(f"Is {i} < {i + 1} & <b>so on</b>?" for i in range(len(counts)))
    answers = tuple(tuple(f"answer {'ABCD'[k]}" for k in range(count)) for count in counts)
    save_predictions(replace(found, prompts=prompts, answers=answers), path)
    return run


def log(run: Path, losses: list[float], sigma: float | None = None) -> None:
    lines = [
        {"loss": loss, "step": 10 * (i + 1)}
        | ({"sigma": sigma, "sigma/layer_00": sigma / 2, "sigma/layer_01": 2 * sigma} if sigma else {})
        for i, loss in enumerate(losses)
    ]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"train_loss": 9.0, "step": 50}])
    (run / "training.jsonl").write_text(text + '{"loss": 0.1, "st')  # it was interrupted


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    found = []
    for task, sizes in SETTINGS.items():
        for method in METHODS:
            for seed in (1, 2):
                run = with_texts(write_run(root / f"{task}-{method}-{seed}", task, method, seed, **sizes))
                log(run, [1.0, 0.5 * seed], sigma=0.1 * seed if method == "ivon" else None)
                found.append(run)
    for run in found[:4]:  # adamw and ivon, on rows of another task
        other = load_predictions(found[6] / "predictions.safetensors")
        save_predictions(other, run / "predictions-ood-boolq.safetensors")
    return found


@pytest.fixture(scope="module")
def rows(runs):
    return rows_of_runs(read_runs(runs)[0])[0]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    return build_report(runs, tmp_path_factory.mktemp("out")).files["report.html"]


# --- what is in it


def test_nothing_is_loaded(page):
    text = page.read_text()
    elements = Elements(text)
    assert not {"link", "img", "iframe", "object"} & {
        tag for tag, attrs in elements.found if "data:," not in attrs.values()
    }
    assert elements.values("src") == []
    assert all(link.startswith("#") or link == "data:," for link in elements.values("href"))
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#)|@import|https?://", text)


def test_every_link_has_its_target_and_ids_are_unique(page):
    elements = Elements(page.read_text())
    ids = elements.values("id")
    assert len(ids) == len(set(ids))
    links = [link[1:] for link in elements.values("href") if link.startswith("#")]
    assert set(links) <= set(ids)
    assert {"tables", "reliability", "trade-off", "coverage", "draws", "training", "outside", "rows", "origin"} <= set(
        links
    )
    used = re.findall(r"url\(#(\w+)\)", page.read_text())
    assert used
    assert set(used) <= set(ids)


def test_sections_without_content_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", method="adamw")
    ids = Elements(build_report([run], tmp_path / "out").files["report.html"].read_text()).values("id")
    assert not {"draws", "training", "outside", "slices", "notes", "skipped"} & set(ids)
    assert {"tables", "reliability", "rows"} <= set(ids)


def test_texts_are_shown_as_they_are(page):
    text = page.read_text()
    assert "Is 1 &lt; 2 &amp; &lt;b&gt;so on&lt;/b&gt;?" in text
    assert "<b>so on" not in text


def test_charts_name_what_they_show(page):
    labels = [attrs.get("aria-label") for tag, attrs in Elements(page.read_text()).found if attrs.get("role") == "img"]
    assert "Reliability diagram of ivon x10 on boolq" in labels
    assert "Accuracy by ECE on arc_easy" in labels
    assert all(labels)


def test_rows_that_are_left_out_are_counted(rows):
    text = html_page(rows, [], [], 10, "right", limit=7)
    assert "The 7 rows of most disagreement; 53 others are left out." in text
    assert text.count("so on&lt;/b&gt;?") == 7 * 2


def test_predictions_of_older_versions_are_listed_by_id(tmp_path):
    run = write_run(tmp_path / "run")
    text = build_report([run], tmp_path / "out").files["report.html"].read_text()
    assert "did not store what is asked" in text
    assert '<span class="q">row-0</span>' in text


def test_a_report_of_many_methods_stays_small(tmp_path):
    runs = [
        with_texts(write_run(tmp_path / f"{method}", "arc_easy", f"method_{method}", n=300)) for method in range(12)
    ]
    path = build_report(runs, tmp_path / "out").files["report.html"]
    assert path.stat().st_size < 1.2e6  # of one task; three of them are below 3 MB


# --- the numbers behind it


def test_disagreement_is_the_jensen_shannon_divergence(rows):
    for task, series in series_of(rows).items():
        found = disagreement(series, limit=1000)
        assert found.total == SETTINGS[task]["n"] == len(found.rows)
        scores = [row.score for row in found.rows]
        assert scores == sorted(scores, reverse=True)
        for row in found.rows[:10]:
            i = int(row.id.removeprefix("row-"))
            probs = []
            for one in series:
                drawn = one.drawn is not None
                probs.append(np.mean([run.probs(drawn)[i].numpy() for run in one.shown.runs], axis=0))
                assert row.probs[len(probs) - 1] == pytest.approx(probs[-1][: len(row.answers)])
            mean = np.mean(probs, axis=0)
            expected = scipy.stats.entropy(mean) - np.mean([scipy.stats.entropy(p) for p in probs])
            assert row.score == pytest.approx(expected)
            assert row.label == series[0].shown.runs[0].predictions.labels[i]
            assert row.prompt == f"Is {i} < {i + 1} & <b>so on</b>?"
        two = disagreement(series[:2], limit=1).rows[0]
        assert two.score == pytest.approx(jensenshannon(*two.probs) ** 2)


def test_of_one_method_the_unsure_rows_come_first(rows):
    series = series_of(rows)["boolq"][:1]
    first = disagreement(series, limit=1).rows[0]
    probs = np.mean([run.probs(False).numpy() for run in series[0].mean.runs], axis=0)
    assert first.score == pytest.approx(scipy.stats.entropy(probs, axis=1).max())


def test_over_draws_ends_at_the_table_and_starts_at_one_draw(rows):
    for row in rows:
        if row.draws:
            curves = over_draws(row)
            for name, curve in curves.items():
                assert curve.x == tuple(range(1, 11))
                assert curve.y[-1] == pytest.approx(row.stats[name].mean)
            run_values = [
                (run.predictions.logits[0].softmax(1).argmax(1) == run.predictions.labels).double().mean().item()
                for run in row.runs
            ]
            assert curves["accuracy"].y[0] == pytest.approx(np.mean(run_values))


def test_risk_at_full_coverage_is_the_error_rate(rows):
    for row in rows:
        curve = risk_by_coverage(row)
        assert curve.x[-1] == 1
        assert curve.y[-1] == pytest.approx(1 - row.stats["accuracy"].mean)
        halves = [risk_coverage(*answers).risk[len(answers[1]) // 2 - 1].item() for answers in row.answers]
        assert curve.y[49] == pytest.approx(np.mean(halves))


def test_training_curves_are_means_over_seeds(rows):
    by_method = {row.method: training([run.run for run in row.runs]) for row in rows if row.task == "arc_easy"}
    assert by_method["adamw"].loss.x == (10, 20)
    assert by_method["adamw"].loss.y == pytest.approx((1.0, 0.75))
    assert by_method["adamw"].sigma is None
    assert by_method["ivon"].sigma.y == pytest.approx((0.15, 0.15))
    assert (by_method["ivon"].layers.x, by_method["ivon"].layers.y) == ((0, 1), pytest.approx((0.075, 0.3)))


def test_the_scale_is_shown_and_a_sign_that_it_does_not_suit(tmp_path):
    run = write_run(tmp_path / "run", "boolq", "ivon", 1)
    lines = [
        {"loss": 1.0, "step": step, "sigma": 0.1, "sigma/layer_00": 0.1, "sigma/q_proj.lora_A": 0.1 * step}
        | {"signal_above_noise": 0.2, "hessian_over_first": 1 + step / 10, "held_back": 10 / step}
        | {"loss_at_mean": 0.4, "loss_under_noise": 0.4 + step / 100, "loss_of_chance": 0.7}
        for step in (10, 20)
    ]
    (run / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = training([run])
    assert found.rise.y == pytest.approx((0.1, 0.2))
    assert found.hessian.y == pytest.approx((2, 3))
    assert found.held.y == pytest.approx((1, 0.5))
    assert found.signal.y == pytest.approx((0.2, 0.2))
    assert found.matrices["q_proj.lora_A"].y == pytest.approx((1, 2))
    report = build_report([run], tmp_path / "report")
    for name in ("report.html", "report.md", "report.json"):
        assert "moved to 3 times its first value" in report.files[name].read_text()
    assert {(task, method) for task, method, _ in report.signs} == {("boolq", "ivon")}
    text = report.files["report.html"].read_text()
    assert "Signs that a scale does not suit" in text
    assert "Noise takes back more than half" in text
    assert "How far noise is held back" in text
    assert "σ by kind of matrix" in text
    assert "q_proj.lora_A" in text


def test_long_logs_are_averaged_to_what_a_screen_shows(tmp_path):
    run = write_run(tmp_path / "run")
    log(run, [float(i) for i in range(1000)])
    curve = training([run]).loss
    assert len(curve.x) == 100
    assert curve.y[0] == pytest.approx(4.5)
    assert curve.x[0] == pytest.approx(55)


def test_rows_of_another_task_are_told_by_their_uncertainty(rows):
    for row in rows:
        found, notes = out_of_distribution(row)
        assert notes == []
        if row.task != "arc_easy" or row.method == "swag":
            assert found == []
            continue
        (outside,) = found
        assert (outside.task, outside.rows) == ("boolq", 40)
        for i, run in enumerate(row.runs):
            extra = run.extra("ood")["boolq"]
            own, other = (
                torch.softmax((p.logits if row.draws else p.logits_mean[None]).double(), -1).numpy()
                for p in (run.predictions, extra)
            )
            total = [scipy.stats.entropy(p.mean(0), axis=1) for p in (own, other)]
            within = [scipy.stats.entropy(p, axis=2).mean(0) for p in (own, other)]
            most = [np.log(np.isfinite(p.logits_mean.numpy()).sum(1)) for p in (run.predictions, extra)]
            total, within = ([x / ln_c for x, ln_c in zip(of, most)] for of in (total, within))
            truth = [0] * 60 + [1] * 40
            assert outside.total.values[i] == pytest.approx(roc_auc_score(truth, np.concatenate(total)))
            if row.draws:
                epistemic = np.concatenate([t - w for t, w in zip(total, within)])
                assert outside.epistemic.values[i] == pytest.approx(roc_auc_score(truth, epistemic))
            else:
                assert math.isnan(outside.epistemic.values[i])


def test_rows_of_another_task_by_other_draws_are_left_out_and_noted(tmp_path):
    run = with_texts(write_run(tmp_path / "run"))
    own = load_predictions(run / "predictions.safetensors")
    for differs in ({}, {"tau": "9.0"}, {"noise": "latin"}):
        meta = {**own.meta, **differs}
        save_predictions(replace(own, meta=meta), run / "predictions-ood-boolq.safetensors")
        found = [out_of_distribution(row)[0] for row in rows_of_runs(read_runs([run])[0])[0]]
        assert {len(outside) for outside in found} == {0 if differs else 1}
        text = build_report([run], tmp_path / "out").files["report.html"].read_text()
        assert all(text.count(f"the run&#39;s own were shown them ({name})") == 1 for name in differs)
        assert ("rows of boolq are left out" in text) == bool(differs)


def test_a_damaged_file_of_other_rows_is_named_and_does_not_stop_the_report(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "predictions-ood-boolq.safetensors").write_bytes(b"")
    text = build_report([run], tmp_path / "out").files["report.html"].read_text()
    assert "no numbers out of distribution" in text
    assert str(run / "predictions-ood-boolq.safetensors") in text
    assert 'id="outside"' not in text


# --- in a browser

WATCH = """<script>
const problems = [];
for (const kind of ["error", "securitypolicyviolation"])
  addEventListener(kind, (event) => problems.push(event.message || event.violatedDirective));
console.error = (...words) => problems.push(words.join(" "));
</script>"""
FRAME = """<!doctype html><body style="margin:0"><iframe src="page.html" style="width:{width}px;height:900px;border:0">
</iframe><pre id="found"></pre><script>
addEventListener("message", (event) => {{ document.getElementById("found").textContent = event.data; }});
</script>"""


def browse(arguments: list[str], address: Path, profile: Path) -> str:
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *arguments]
    done = subprocess.run([*command, address.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def visit(page: Path, folder: Path, script: str, width: int = 1280) -> dict:
    """Open a copy of the page in a frame of some width, run `script` in it, and return what it puts into `found`."""
    tell = (
        f"<script>const found = {{}};{script};found.problems = problems;parent.postMessage(JSON.stringify(found), '*')"
    )
    text = page.read_text().replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{tell}</script></body>")
    (folder / "page.html").write_text(text)
    (folder / "frame.html").write_text(FRAME.format(width=width))
    dom = browse(["--dump-dom", "--virtual-time-budget=10000"], folder / "frame.html", folder / "profile")
    told = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert told
    assert told[1], "the page's scripts did not come to their end"
    return json.loads(html.unescape(told[1]))


@in_chromium
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_the_screen(page, tmp_path, width):
    script = "const all = document.scrollingElement; found.wide = all.scrollWidth; found.room = all.clientWidth"
    found = visit(page, tmp_path, script, width)
    assert width - 20 <= found["room"] <= width  # less the bar to scroll down with
    assert found["wide"] == found["room"]
    assert found["problems"] == []


SORT = """
const table = document.querySelector("#tables table:not(.results)");
const headers = [...table.tHead.rows[0].cells];
const header = headers.find((cell) => cell.textContent.trim() === "NLL");
const read = () => [...table.tBodies[0].rows].map((row) => row.cells[header.cellIndex].dataset.v);
found.before = read();
found.state = [header.ariaSort];
header.querySelector("button").focus();
document.activeElement.click();
found.down = read(); found.state.push(header.ariaSort);
header.querySelector("button").click();
found.up = read(); found.state.push(header.ariaSort);
const method = headers.find((cell) => cell.textContent.trim() === "method");
method.querySelector("button").click();
found.names = [...table.tBodies[0].rows].map((row) => row.cells[method.cellIndex].textContent);
found.sorted = headers.filter((cell) => ["ascending", "descending"].includes(cell.ariaSort)).length;
"""


@in_chromium
def test_headings_sort_numbers_and_names(page, rows, tmp_path):
    found = visit(page, tmp_path, SORT)
    values = [row.stats["nll"].mean for row in rows]
    assert [float(value) for value in found["before"]] == pytest.approx(values)
    assert [float(value) for value in found["down"]] == pytest.approx(sorted(values, reverse=True))
    assert [float(value) for value in found["up"]] == pytest.approx(sorted(values))
    assert found["state"] == ["none", "descending", "ascending"]
    assert found["names"] == sorted(row.label for row in rows)
    assert found["sorted"] == 1
    assert found["problems"] == []


@in_chromium
def test_what_has_no_value_is_sorted_last_either_way(page, tmp_path):
    script = """
const headers = [...document.querySelector("#outside thead tr").cells];
const header = headers.find((cell) => cell.textContent.includes("epistemic"));
const rows = () => [...document.querySelector("#outside tbody").rows];
const read = () => rows().map((row) => row.cells[header.cellIndex].textContent);
found.orders = [1, 2].map(() => { header.querySelector("button").click(); return read(); });
"""
    for order in visit(page, tmp_path, script)["orders"]:
        assert order[-2:] == ["–", "–"]  # adamw, and ivon at the mean
        assert "–" not in order[:-2]


@in_chromium
def test_rows_are_sorted_and_filtered(page, rows, tmp_path):
    script = """
const table = document.querySelector("#rows-1"), form = document.querySelector("[data-table=rows-1]");
const [right, wrong] = form.querySelectorAll("select");
right.value = "3"; wrong.value = "2";
right.dispatchEvent(new Event("change", { bubbles: true }));
found.shown = [...table.tBodies[0].rows].filter((row) => row.getClientRects().length).length;
found.says = form.querySelector("output").value;
right.value = wrong.value = "";
right.dispatchEvent(new Event("change", { bubbles: true }));
const read = (column) => [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.v));
found.first = read(1);
table.tHead.rows[0].cells[2].querySelector("button").click();
found.then = read(2);
"""
    found = visit(page, tmp_path, script, 390)
    answered = disagreement(series_of(rows)["arc_easy"], limit=1000).rows
    right = [[int(np.argmax(p)) == row.label for p in row.probs] for row in answered]
    expected = sum(ivon and not adamw for adamw, ivon, _ in right)
    assert 0 < expected < 60
    assert found["shown"] == expected
    assert found["says"] == f"{expected} of 60 rows"
    assert found["first"] == pytest.approx([row.score for row in answered])
    assert found["then"] == sorted(found["then"], reverse=True)
    assert found["problems"] == []


@in_chromium
def test_contents_lead_to_their_sections(page, tmp_path):
    script = """
found.places = [...document.querySelectorAll("nav a")].map((link) => {
  link.click();
  const top = document.querySelector(link.hash).getBoundingClientRect().top;
  const last = scrollY + innerHeight >= document.scrollingElement.scrollHeight - 1;
  return last || Math.abs(top) < 100;
});
found.links = document.querySelectorAll("nav a").length;
"""
    found = visit(page, tmp_path, "document.documentElement.style.scrollBehavior = 'auto';" + script)
    assert found["links"] == 9
    assert all(found["places"])


@in_chromium
def test_it_looks_like_a_page(page, tmp_path):
    browse(["--window-size=1280,2000", f"--screenshot={tmp_path / 'page.png'}"], page, tmp_path / "profile")
    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert 0.5 < (pixels == 255).all(1).mean() < 0.99  # white, with something on it


@in_chromium
def test_it_prints(page, tmp_path):
    browse(["--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}"], page, tmp_path / "profile")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 20
