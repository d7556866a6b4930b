"""docs/scale.md is made from benchmarks/results/auto.json, and the plans behind it are what they say."""

from __future__ import annotations

import importlib
import json
import random
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch

from varlora import metrics
from varlora.methods import AdamW, Ivon, Method
from varlora.metrics import standard_error
from varlora.predict import predict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _path() -> Iterator[None]:
    folder = str(ROOT / "benchmarks" / "evidence")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def settings() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "auto.json").read_text(encoding="utf-8"))["settings"]


def test_the_document_is_made_from_the_results(settings: Any) -> None:
    scale = importlib.import_module("scale")
    text = scale.DOCUMENT.read_text(encoding="utf-8")
    assert "<!-- auto: " in text
    assert scale.documented(text, settings) == text
    assert scale.PICTURE.is_file()


def test_the_curves_along_the_way_are_in_the_document() -> None:
    along = importlib.import_module("along")
    found = json.loads((ROOT / "benchmarks" / "results" / "along.json").read_text(encoding="utf-8"))
    text = along.DOCUMENT.read_text(encoding="utf-8")
    assert along.documented(text, found) == text
    runs = {name: {task: [2.0, 1.0, 1.5], "other": [1.0, 1.0, 1.0]} for name, task in (("a", "x"), ("b", "y"))}
    _, _, (first, _) = along.table_of({"curves": runs, "steps": 30})
    assert first == ["a", "2", "1.500", "1.000", "1.250", "25.0 ± 25.0"]


@pytest.mark.parametrize(
    "method", [AdamW(lr=1e-2), Ivon(lr=0.1, ess=1e4, hess_init=1e-2)], ids=lambda method: method.name
)
def test_to_ask_along_the_way_changes_no_bit(method: Method, tmp_path: Path) -> None:
    along = importlib.import_module("along")
    rows = helpers.make_rows(8, seed=3)
    asked = along.Along(rows, 0, 2)
    posterior = helpers.run_fit(helpers.tiny_model(), method, tmp_path / "asked", callbacks=[asked])
    helpers.run_fit(helpers.tiny_model(), method, tmp_path / "left")
    one, other = (helpers.bits(helpers.reloaded(tmp_path / name)[0]) for name in ("asked", "left"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(asked.nlls) == 3
    model = helpers.reloaded(tmp_path / "asked")[0]
    found = predict(model, posterior, rows, pad_token_id=0)
    assert asked.nlls[-1] == pytest.approx(metrics.nll(found.probs, found.labels), rel=1e-5)


def test_differences_are_of_the_same_setting_and_seed() -> None:
    scale = importlib.import_module("scale")

    def group(seeds: list[int], label: str, *nlls: list[float]) -> dict[str, Any]:
        rows = [{"label": label} | {metric: nll for metric, *_ in scale.METRICS} for nll in nlls]
        return {"seeds": seeds, "rows": rows}

    mine = group([0, 1, 2], "ivon x10", [9.0, 1.0, 2.0], [9.0, 3.0, 4.0])  # two tasks, whose averages are 9, 2 and 3
    both = {"auto": mine, "peers": group([1, 2, 3], "adamw", [2.5, 4.5, 9.0])}
    (line,) = [one for one in scale.paired_table({"a": both, "b": {"auto": mine}}).splitlines() if "AdamW" in one]
    assert line.endswith("| x10 | 1 | 2 | -100.0 ± 50.0 | -100.0 ± 50.0 | -1.000 ± 0.500 |")


def test_what_changes_one_thing_of_falling_is_held_against_that(settings: Any) -> None:
    auto, scale = importlib.import_module("auto"), importlib.import_module("scale")
    for group in scale.OF_FALLING:
        own = auto.GROUPS[group]["methods"]["ivon"]
        assert auto.FALLING.items() < own.items()

    def group(nll: float) -> dict[str, Any]:
        metrics = {metric: [nll, nll + 1] for metric, *_ in scale.METRICS}
        return {"seeds": [0, 1], "rows": [{"label": "ivon x10", **metrics}]}

    both = {"auto": group(1.0), "falling": group(2.0), "prior": group(5.0)}
    text = scale.paired_table({"a": both})
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if " x10 " in line}
    assert lines["auto, learning rate that falls from the start"].endswith("| -1.000 ± 0.000 |")
    assert lines["falling, prior by evidence"].endswith("| -3.000 ± 0.000 |")


def test_the_seeds_of_a_setting_are_not_counted_as_if_each_were_a_setting() -> None:
    """As many numbers, all of them alike within their setting, say no more than one of each."""
    scale = importlib.import_module("scale")
    few, many = [[1.0], [2.0], [6.0]], [[1.0] * 5, [2.0] * 5, [6.0] * 5]
    assert scale.error_of(few) == pytest.approx(standard_error([1, 2, 6]))
    assert scale.error_of(many) == pytest.approx(scale.error_of(few))
    assert scale.error_of([[1.0, 2.0, 6.0]]) == pytest.approx(scale.error_of(few))
    source = random.Random(0)
    found, means = [], []
    for _ in range(2000):  # eight settings of unlike many seeds, an effect of the setting and one of the seed
        effects = [source.gauss(0, 2) for _ in range(8)]
        groups = [[effect + source.gauss(0, 1) for _ in range(2 + at % 4)] for at, effect in enumerate(effects)]
        found.append(scale.error_of(groups) ** 2)
        means.append(statistics.fmean(value for of in groups for value in of))
    assert statistics.fmean(found) == pytest.approx(statistics.variance(means), rel=0.15)


def test_nothing_failed_and_every_line_has_its_seeds(settings: Any) -> None:
    for groups in settings.values():
        for group in groups.values():
            assert group["failed"] == []
            for row in group["rows"]:
                assert len(row["nll"]) == len(group["seeds"])


def test_what_ivon_found_cost_what_it_may(settings: Any) -> None:
    auto = importlib.import_module("auto")
    for name, groups in settings.items():
        for found in groups.get("auto", {}).get("found", []):
            assert found["steps"] <= 0.05 * auto.SETTINGS[name]["steps"]


def test_each_group_keeps_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    auto = importlib.import_module("auto")
    for group, wanted in auto.GROUPS.items():
        plan = auto.plan_of("demo-400", group, tmp_path, 2)
        assert plan.methods == wanted["methods"]
        assert plan.search == wanted.get("search", {})
        assert (plan.seeds, plan.calibrate) == ((0, 1), True)
        assert plan.common["steps"] == (600 if group == "longer" else 400)


def test_the_reviews_are_what_their_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / "benchmarks" / "evidence" / "reviews"
    monkeypatch.syspath_prepend(str(folder))
    make = importlib.import_module("make")
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.main()
    rows = {name: (folder / f"{name}.csv").read_text() for name in ("train", "dev")}
    assert rows == {name: (tmp_path / f"{name}.csv").read_text() for name in rows}
    assert not set(rows["train"].splitlines()[1:]) & set(rows["dev"].splitlines()[1:])
