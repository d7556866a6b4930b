"""What README says of speed is what the committed results say, and these keep the bounds that we set."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def words(path: str) -> str:
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


WORDS = words("README.md")


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


def ways(name: str, draws: int, rows: int) -> list[dict[str, Any]]:
    """What was measured of one number of draws and rows, on the demo's base and on tinyllama."""
    bases = result(name)["speed"]
    assert list(bases) == ["base", "tinyllama-3m"]
    cells = [cell for of in bases.values() for cell in (of if name == "beginnings" else of["cells"])]
    return [cell["ways"] for cell in cells if (cell["draws"], cell["batch"]) == (draws, rows)]


def passes(draws: int, rows: int, way: str) -> list[float]:
    return [of[way]["to_one_pass"]["median_of_rounds"] for of in ways("inference", draws, rows)]


def arithmetic(draws: int, rows: int, way: str) -> list[float]:
    """The operations, in those of one pass."""
    return [of[way]["operations"] / of["one pass"]["operations"] for of in ways("inference", draws, rows)]


def both(values: list[float]) -> str:
    return " and ".join(f"{value:.1f}" for value in values)


def span(values: list[float], digits: int = 1) -> str:
    ends = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return " to ".join(dict.fromkeys(ends))


def test_readme_says_what_ten_draws_cost() -> None:
    stack, loop, alike = (
        {rows: span(passes(10, rows, way)) for rows in (1, 8, 64)} for way in ("stack", "loop", "alike")
    )
    assert (
        f"ten draws of one question take {stack[1]} times one pass (a loop: {loop[1]}), "
        f"of eight questions {stack[8]} times (a loop: {loop[8]}), "
        f"of 64 questions {stack[64]} times (a loop: {loop[64]})"
    ) in WORDS
    assert f"two fifths of them, {alike[8]} times for eight, and {alike[64]} for 64" in WORDS
    quarter = [value for rows in (1, 8, 64) for value in passes(10, rows, "quarter")]
    assert f"`--last-layers` (the last quarter: {span(quarter)} times)" in WORDS
    examples = [of["stack"]["loop_to_it"]["median_of_rounds"] for rows in (1, 8) for of in ways("beginnings", 10, rows)]
    assert f"after a prompt of examples ten draws are {span(examples, 0)} times as fast as a loop" in WORDS


def test_the_bounds_of_draws_are_said_to_be_met_where_they_are() -> None:
    docs, benchmarks = words("docs/inference.md"), words("benchmarks/README.md")
    eight, _ = ways("inference", 10, 8)
    stack, alike = (eight[way]["loop_to_it"]["median_of_rounds"] for way in ("stack", "alike"))
    assert stack < 3 <= alike
    assert f"| {stack:.2f} times, {alike:.2f} where rows begin alike | missed, and met where rows begin alike |" in docs
    rates = {way: eight[way]["limit_seconds"] / eight[way]["seconds"]["median"] for way in ("stack", "loop")}
    fewer, fewer_alike = (eight["loop"]["operations"] / eight[way]["operations"] for way in ("stack", "alike"))
    assert f"does {fewer:.2f} times the operations of the stack, {fewer_alike:.2f} times where rows begin alike" in docs
    reached = (
        f"{3 * rates['loop'] / fewer:.0%} of the rate of one large matrix product, "
        f"where the stack reaches {rates['stack']:.0%} and the loop {rates['loop']:.0%}"
    ).replace("%", " %")
    assert f"3 times its speed is {reached}" in docs
    assert f"missed ({stack:.2f}, alike {alike:.2f}; 3 times would be {reached})" in benchmarks

    most = max(value for draws in (1, 4, 10) for rows in (1, 8, 64) for value in passes(draws, rows, "quarter"))
    one, eight_rows, many = (passes(32, rows, "quarter") for rows in (1, 8, 64))
    assert max(most, *one) <= 3 < min(*eight_rows, *many)
    assert f"| {most:.1f} at the most | met |" in docs
    assert f"| one question {both(one)}, eight {both(eight_rows)}, 64 {both(many)} | met for one question" in docs
    of_eight, of_many = (both(arithmetic(32, rows, "quarter")) for rows in (8, 64))
    assert f"64 questions are {of_many} passes by their arithmetic alone; of eight they are {of_eight}," in docs
    assert f"met up to ten draws ({most:.1f} at the most), and with 32 draws of one row ({both(one)})" in benchmarks
    assert f"8 rows ({both(eight_rows)}, of which arithmetic is {of_eight})" in benchmarks
    assert f"64 ({both(many)}, of which {of_many})" in benchmarks
