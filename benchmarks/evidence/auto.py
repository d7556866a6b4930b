"""IVON that sets its own scale, against the best of a full grid, the paper's values, AdamW and SWAG; and ablations.

A setting is a model, its tasks and a number of steps; a group is a way to choose the method's settings. The grid is
searched on held-out rows, AdamW and SWAG over learning rates, `auto` and `paper` not at all. Every reported run is
calibrated on its held-out rows as well. Hours on two cores; stopped at any point, the same command goes on, and
`scale.py` writes what came out into docs/scale.md.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _common import ROOT, count, machine, parser, shared_folder

from varlora.evaluated import read_runs
from varlora.files import read_json, write_json
from varlora.grid import Processes
from varlora.methods.ivon import PAPER
from varlora.plan import candidates_of, plan_from
from varlora.reproduce import reproduce
from varlora.results import Row, rows_of_runs
from varlora.run import origin

HERE = "benchmarks/evidence"
DEMO = [f"src/varlora/demo/bundled/tasks/{name}.yaml" for name in ("four_choices", "two_choices", "true_or_false")]
HELD_OUT = {"sst2_500": 0.2, "sst2_2000": 0.06, "sst2_8000": 0.05}
"""Shares that are held out: 100, 120 and 400 rows, as little as a choice can be made on, for it costs training rows."""
DEMO_SHORT, SST2_SHORT, TENFOLD = 400, 800, 10

SETTINGS: dict[str, dict[str, Any]] = {
    "demo-400": {"steps": DEMO_SHORT},
    "demo-1600": {"steps": 4 * DEMO_SHORT},
    "demo-4000": {"steps": TENFOLD * DEMO_SHORT},
    "reviews-1000": {"steps": 1000, "tasks": [f"{HERE}/reviews/reviews.yaml"]},
    **{
        f"{name}-{model}-{steps}": {"steps": steps, "model": model, "task": name}
        for model, name, steps in itertools.product(
            ("tinyllama-3m", "stories-260k"), HELD_OUT, (SST2_SHORT, 4 * SST2_SHORT)
        )
    },
}
GRID = {"ess": [1e5, 1e6, 3e6, 1e7], "hess_init": [2e-4, 1e-3], "lr": [0.3, 1.0, 3.0]}
FALLING = {"lr_decay": 1.0}
GROUPS: dict[str, dict[str, Any]] = {
    "auto": {"methods": {"ivon": {}}},
    "grid": {"methods": {"ivon": {}}, "search": {"ivon": GRID}},
    "paper": {"methods": {"ivon": PAPER}},
    "peers": {"methods": {"adamw": {}, "swag": {}}, "search": {"adamw": {"lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}}},
    "longer": {"methods": {"ivon": {}}, "longer": 1.5},
    "falling": {"methods": {"ivon": FALLING}},
    "recheck": {"methods": {"ivon": {**FALLING, "recheck": 0.25}}},
    "one-sigma": {"methods": {"ivon": {**FALLING, "sigma_by_layer": {}}}},
    "no-warmup": {"methods": {"ivon": {**FALLING, "noise_warmup": 0.0, "cooling": True}}},
    "no-cooling": {"methods": {"ivon": {**FALLING, "cooling": False}}},
    "prior": {"methods": {"ivon": {**FALLING, "weight_decay": "auto"}}},
    "learned": {"methods": {"ivon": {**FALLING, "hess_approx": "gradsq", "hess_average": "run"}}},
    "root": {"methods": {"ivon": {**FALLING, "ess_per_root_row": 5000.0, "noise_warmup": 0.25, "cooling": True}}},
}
"""`longer` is `auto` with as many steps as SWAG takes, AdamW's before it included; the rest are the ablations:
`falling` changes one thing of `auto`, and each of the others one thing of `falling`."""
METRICS = ("accuracy", "nll", "ece", "ece_if_calibrated")


def plan_of(setting: str, group: str, work: Path, seeds: int) -> Any:
    """Return the plan of a group in a setting."""
    own = dict(SETTINGS[setting])
    own["steps"] = round(own["steps"] * GROUPS[group].get("longer", 1))
    values: dict[str, Any] = {
        "seeds": list(range(seeds)),
        "batch_size": 4,
        "checkpoint_every": 2000,
        "calibrate": True,
        "calibration_fraction": 0.2,
        "token_budget": 2048,
        "search_seeds": 1,
        "methods": list(GROUPS[group]["methods"]),
        "search": GROUPS[group].get("search", {}),
    }
    if task := own.pop("task", None):
        values |= {"model": str(shared_folder() / "models" / own.pop("model")), "token_budget": 1024}
        values |= {"tasks": [f"{HERE}/{task}.yaml"], "data_dir": str(shared_folder() / "data"), "max_length": 256}
        values["calibration_fraction"] = HELD_OUT[task]
    else:
        values |= {"model": "src/varlora/demo/bundled/base", "tasks": DEMO}
    given = [
        f"methods.{method}.{name}={json.dumps(value)}"
        for method, settings in GROUPS[group]["methods"].items()
        for name, value in settings.items()
    ]
    return plan_from(None, work / setting / group, values | own, given)


def results_of(plan: Any, workers: int) -> dict[str, Any]:
    """Run what is missing of a group, and return its numbers."""
    ended = reproduce(plan, partial(Processes, workers, 1), partial(print, flush=True))
    runs, skipped = read_runs(ended.runs)
    rows = rows_of_runs(runs)[0]
    tried = {name: len(candidates_of(plan, next(iter(plan.tasks)), name)) for name in plan.methods}
    found = [tuned(run.run) for run in runs]
    return {
        "seeds": list(plan.seeds),
        "candidates": tried,
        "chosen": ended.chosen,
        "failed": [skip.reason for skip in (*ended.failed, *skipped)],
        "rows": [_plain(row) for row in rows],
        "found": [one for one in found if one],
        "commits": sorted({str(run.config.get("commit")) for run in runs}),
    }


def tuned(run: Path) -> Mapping[str, Any] | None:
    """Return what a run's method found by itself, and where."""
    path = run / "tuned.json"
    if not path.is_file():
        return None
    stored = read_json(path)
    return {"run": f"{run.parents[1].name}/{run.name}", "sigma": stored["found"]["sigma"], "steps": stored["steps"]} | {
        name: stored["settings"][name] for name in ("lr", "ess", "hess_init", "sigma_by_layer")
    }


def _plain(row: Row) -> dict[str, Any]:
    return {"task": row.task, "label": row.label} | {
        name: [None if math.isnan(value) else round(value, 5) for value in row.stats[name].values] for name in METRICS
    }


def main() -> None:
    made = parser(__doc__, "auto")
    made.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=list(SETTINGS), help="default: all")
    made.add_argument("--groups", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), help="default: all")
    made.add_argument("--seeds", type=count, default=5, help="runs of each (default: %(default)s)")
    made.add_argument("--work", type=Path, default=ROOT / "runs" / "auto", help="folder of the runs")
    made.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="default: the cores")
    args = made.parse_args()
    os.chdir(ROOT)
    for setting, group in itertools.product(args.settings, args.groups):
        found = results_of(plan_of(setting, group, args.work, args.seeds), args.workers)
        where = origin()
        where["machine"] |= machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        before = read_json(args.out)["settings"] if args.out.is_file() else {}
        mine = {**before.get(setting, {}), group: {**found, "origin": where}}
        both = {**before, setting: {name: mine[name] for name in GROUPS if name in mine}}
        ordered = {name: both[name] for name in SETTINGS if name in both}
        write_json(args.out, {"benchmark": "auto", "settings": ordered})
        print(f"wrote {setting} {group} to {args.out}", flush=True)


if __name__ == "__main__":
    main()
