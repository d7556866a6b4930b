"""What README says of speed is what the committed results say, and these keep the bounds that we set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = " ".join(README.split())


def result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_a_draw_and_a_step_cost_less_than_a_step_of_adamw() -> None:
    found = result("optimizer")
    names = {"IVON without a C compiler": "IVON torch", "ivon-opt 0.1.3": "ivon-opt"}
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", README, re.MULTILINE)
    assert [row[0] for row in rows] == ["AdamW foreach", "AdamW fused", "IVON", *names]
    for label, milliseconds, times, megabytes in rows:
        name = names.get(label, label)
        total = found["seconds"][name]["total"]["median"]
        assert float(milliseconds) == round(1000 * total, 1)
        of_medians = total / found["seconds"]["AdamW foreach"]["total"]["median"]
        assert float(times) == round(of_medians, len(times.partition(".")[2]))
        assert int(megabytes) == round(found["allocated_bytes"][name]["total"] / 2**20)
    assert found["ratio_to"]["AdamW foreach"]["IVON"]["of_medians"] <= 1.0
    traffic = 1000 * sum(found["limits"]["traffic_seconds"]["IVON"].values())
    assert f"The memory traffic alone would take {traffic:.1f} ms." in WORDS


def test_the_whole_step_costs_as_much_as_with_adamw() -> None:
    found, bound = result("train_step"), 1 + result("train_step")["bound_per_cent"] / 100
    times = found["ivon_to_adamw"]["median_of_rounds"]
    assert times <= bound
    assert f"with IVON takes {times:.2f} times AdamW's" in WORDS
    on_trainer = result("training_profile")["ivon_to_adamw"]["4"]
    assert on_trainer["median_step"]["median_of_rounds"] <= bound
    whole, averaged = (on_trainer[name]["median_of_rounds"] for name in ("median_step", "mean_step"))
    assert f"{averaged:.2f} times: {whole:.2f} for the median step" in WORDS


def test_little_of_a_training_run_is_outside_of_what_it_is_for() -> None:
    found = result("training_profile")
    few, many = (found["batch_size"][size] for size in ("4", "16"))
    for of in (few, many):
        outside = sum(of["per_cent"][part] for part in ("freeing the graph", "data", "clipping", "the rest"))
        assert of["outside_per_cent"] == pytest.approx(outside)
        assert of["outside_per_cent"] < found["bound_per_cent"]
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert f"{few['outside_per_cent']:.2f} % with 4 rows a batch, {many['outside_per_cent']:.1f} % with 16" in page
    freeing = few["per_cent"]["freeing the graph"]
    assert f"{few['outside_per_cent'] - freeing:.1f} % of the time go into something else" in WORDS
    assert f"and {freeing:.1f} % into freeing the graph" in WORDS
