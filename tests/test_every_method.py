"""Every method from the command line, on SST-2 with a real model: train, evaluate, report, predict."""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest

from varlora.cli import main
from varlora.demo.run import one_thread
from varlora.methods import METHODS
from varlora.report import build_report

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "local" / "sst2.yaml"
QUICK = {
    "swa": ["method.every=1"],
    "swag": ["method.every=1"],
    "tfb": ["method.anchor_rows=8", "method.samples=2"],
    "ensemble": ["method.size=2"],
}
"""Settings for six steps on a few rows."""
LABELS = {
    "adamw": ["adamw"],
    "swa": ["swa"],
    "temperature": ["temperature"],
    "laplace_diag": ["laplace_diag@mean", "laplace_diag x256"],
    "laplace_kfac": ["laplace_kfac@mean", "laplace_kfac x256"],
    "ensemble": ["ensemble x4"],
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with one_thread():
        yield


@pytest.fixture(scope="module")
def data(shared, tmp_path_factory) -> Path:
    return helpers.first_rows(shared, tmp_path_factory.mktemp("data"), 100)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("task") / "sst2.yaml"
    path.write_text(RECIPE.read_text().replace("\nfiles:", "\nlimit: {train: 40, dev: 16}\nfiles:"))
    return path


@pytest.mark.parametrize("method", METHODS)
def test_train_evaluate_report_predict(method, task, data, shared, tmp_path, capsys):
    run, options = tmp_path / "run", ["--task", task, "--data-dir", data]
    options += ["--model", shared / "models" / "tinyllama-3m", "--steps", 6, "--calibration-fraction", 0.3]
    changes = ["--set", *QUICK[method]] if method in QUICK else []
    for command in (
        ["train", *options, "--method", method, "--run-dir", run, *changes],
        ["evaluate", run, "--samples", 4],
    ):
        assert main([str(part) for part in command]) == 0, capsys.readouterr().err
    expected = LABELS.get(method, [f"{method}@mean", f"{method} x4"])
    if method != "temperature":  # all others are shown with a temperature, too
        expected = [label for one in expected for label in (one, f"{one} +T")]
    assert [row.label for row in build_report([run], tmp_path / "report").rows] == expected
    capsys.readouterr()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"sentence": "a fine film"}) + "\n")
    assert main(["predict", str(run), "--input", str(rows), "--samples", "4"]) == 0
    (answer,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
