"""The committed results of the demo's benchmark: the docs quote them, and the demo behaves like the real thing."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from varlora.demo.base import BUNDLED

ROOT = Path(__file__).resolve().parents[1]
CHANCE = {"four_choices": 0.25, "two_choices": 0.5, "true_or_false": 0.5}


@functools.cache
def results() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))


@functools.cache
def rows() -> dict[tuple[str, str], dict]:
    return {(row["task"], row["method"]): row for row in results()["rows"]}


def number(found, factor: int, decimals: int) -> str:
    error = "" if found.get("stderr") is None else f" ± {factor * found['stderr']:.{decimals}f}"
    return f"{factor * found['mean']:.{decimals}f}{error}"


def mean(task: str, method: str, metric: str) -> float:
    return rows()[task, method]["metrics"][metric]["mean"]


def test_the_docs_quote_every_number():
    text = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    for (task, method), row in rows().items():
        cells = [task, method, *(number(row["metrics"][name], 100, 1) for name in ("accuracy", "ece"))]
        cells.append(number(row["metrics"]["nll"], 1, 2))
        never = row.get("slices", {}).get("never told")
        cells += [number(never[name], 100, 1) for name in ("confidence", "accuracy")] if never else ["", ""]
        line = "| " + " | ".join(cells)
        assert line.replace("  ", " ").rstrip() in text.replace("  ", " "), line


def test_the_runs_are_of_the_committed_base():
    base = json.loads((BUNDLED / "base" / "pretraining.json").read_text(encoding="utf-8"))
    assert results()["base"] == base["scores"]


def test_every_run_is_there():
    assert results()["settings"]["seeds"] == [0, 1, 2]
    methods = ("zero-shot", "adamw", "adamw at 3e-4", "ivon@mean", "ivon x10")
    assert set(rows()) == {(task, method) for task in CHANCE for method in methods}


@pytest.mark.parametrize("task", CHANCE)
def test_the_base_is_near_chance_before_and_well_above_after(task):
    assert mean(task, "zero-shot", "accuracy") == pytest.approx(CHANCE[task], abs=0.1)
    for method in ("adamw", "ivon@mean", "ivon x10"):
        assert mean(task, method, "accuracy") > CHANCE[task] + 0.15
    if task == "four_choices":
        assert all(0.6 <= mean(task, method, "accuracy") <= 0.95 for method in ("adamw", "ivon@mean", "ivon x10"))


@pytest.mark.parametrize("task", CHANCE)
def test_adamw_trained_long_is_overconfident_and_ivons_draws_less_so(task):
    never = rows()[task, "adamw"]["slices"]["never told"]
    assert never["confidence"]["mean"] > never["accuracy"]["mean"] + 0.25
    assert mean(task, "adamw", "ece") > 1.5 * mean(task, "ivon x10", "ece")
    assert mean(task, "adamw", "nll") > mean(task, "ivon x10", "nll")
