"""The evidence: its documents are made from its results, and its plans are what they say."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from varlora.files import read_json
from varlora.methods import METHODS
from varlora.typeset import from_json

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "evidence")]

import document  # noqa: E402
import run  # noqa: E402


@pytest.fixture(scope="module")
def evidence() -> dict:
    return read_json(ROOT / "benchmarks" / "results" / "evidence.json")


COMPARED = METHODS.keys() - {"pruned"}
"""Pruning is no method of its own to compare with: shares of weights are chosen by `varlora calibrate`."""


@pytest.mark.parametrize("path", document.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_are_made_from_the_results(path, evidence):
    text = path.read_text(encoding="utf-8")
    assert "<!-- evidence:" in text
    assert document.documented(text, evidence) == text


def test_every_method_has_five_seeds_and_nothing_failed(evidence):
    for name, part in evidence["parts"].items():
        assert part["failed"] == []
        if name in ("sst2-why", "reasoning"):  # these are not about every method
            continue
        assert part["seeds"] == [0, 1, 2, 3, 4]
        table = from_json(part["tables"]["table1"])
        cells = [cell for block in table.blocks for line in block.lines for cell in line.cells.values()]
        assert {cell.seeds for cell in cells} == {5}
        tasks = len(table.columns) - 1
        assert part["runs"] == 5 * tasks * len(COMPARED)


@pytest.mark.parametrize("part", ["demo-long", "demo-tuned"])
def test_the_plans_give_every_method_that_trains_its_candidates(part, tmp_path, monkeypatch):
    """IVON has half as many as the others: it finds its learning rate itself."""
    monkeypatch.chdir(ROOT)
    (plan,) = run.plans_of(part, tmp_path)
    assert set(plan.methods) == COMPARED
    assert plan.methods["ivon"] == {}
    budgets = {name: math.prod(len(values) for values in space.values()) for name, space in plan.search.items()}
    assert budgets == (
        {"adamw": 1, "blob": 1, "ivon": 1} if part == "demo-long" else {"adamw": 4, "blob": 4, "ivon": 2}
    )


def test_why_has_a_plan_for_every_combination(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "shared_folder", lambda: tmp_path)
    monkeypatch.chdir(ROOT)
    tried = [plan.search for plan in run.plans_of("sst2-why", tmp_path)]
    assert tried == [
        *({"adamw": {"steps": [steps]}} for steps in (800, 3200)),
        *({"ivon": {"steps": [steps], "hess_init": [h]}} for steps in (800, 3200) for h in (1e-3, 3e-4)),
    ]


def test_no_path_of_a_machine_is_in_the_results(evidence):
    assert not [text for text in _texts(evidence) if text.startswith("/") or str(ROOT) in text]


def _texts(value) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.items() for one in item for text in _texts(one)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
