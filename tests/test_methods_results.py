"""The README's table of what each method costs holds the numbers of benchmarks/results/methods.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from varlora.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "methods.json").read_text(encoding="utf-8"))
ADAPTER = RESULTS["methods"]["adamw"]["posterior"]["bytes"]


def median(ratio: Any) -> float:
    return ratio["median_of_rounds"] if isinstance(ratio, dict) else ratio  # K for K members, by construction


UNTIMED = {"pruned"}
"""Costs what the method below it costs, and a sort."""


@pytest.mark.parametrize("name", sorted(METHODS.keys() - UNTIMED))
def test_readme_has_the_measured_costs(name):
    of = RESULTS["methods"][name]
    training, conclusion = of["training"], of["conclusion"]
    cells = [
        f"{median(training['ratio_to_adamw']):.2f}",
        f"{training['state_bytes_beyond_adamw'] / ADAPTER:.1f}",
        f"{median(conclusion['training_epochs']):.1f}",
        f"{of['posterior']['bytes'] / ADAPTER:.1f}",
        f"{median(of['prediction']['ratio_to_adamw_at_the_mean']):.1f}",
    ]
    row = f"| `{name}` | {' | '.join(cells)} |"
    assert row in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_has_the_bytes_of_kfac():
    kfac = RESULTS["llama2_7b"]["curvature"]["kronecker"]
    megabytes = [f"{kfac[key] / 1e6:.0f} MB" for key in ("collector_bytes", "bytes_beyond_mean")]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{megabytes[0]} of sketches in the pass and {megabytes[1]} of factors after it" in text
    assert max(kfac["collector_bytes"], kfac["bytes_beyond_mean"]) < 200e6


def test_readme_has_the_peers_ratio():
    ratio = median(RESULTS["peers"]["bayesian_lora"]["ours_to_it"]["ours, ggn"])
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Its pass takes {ratio:.2f} times that of `bayesian_lora` 0.0.6" in text
