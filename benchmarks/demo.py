"""The demo's comparison over seeds: zero-shot, AdamW and IVON on the tasks of the bundled base.

Each method runs with the demo's settings, and AdamW also at a smaller learning rate, since long training is what it
suffers from. Runs lie in the work folder and are never repeated: start again to
go on. Beside the results, the report's picture of told and never told facts is written.

    python benchmarks/demo.py
    python benchmarks/demo.py --tasks four_choices --seeds 0
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, count, parser, print_table, set_up, write_result
from rich.console import Console

from varlora.config import settings_from
from varlora.demo import TASKS, load
from varlora.demo.base import BUNDLED
from varlora.demo.run import METHOD_SETTINGS, SETTINGS, train_and_evaluate, zero_shot
from varlora.files import read_json
from varlora.model import base_fingerprint
from varlora.report import build_report
from varlora.tasks import load_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and report."""
    p = parser(__doc__, "demo")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the runs; default: 0 1 2")
    p.add_argument("--steps", type=count, default=SETTINGS["steps"], help="default: the demo's, %(default)s")
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "demo-benchmark", help="default: %(default)s")
    args = p.parse_args(argv)
    set_up(args)
    adamw, ivon = ({"method": {"name": name, **METHOD_SETTINGS[name]}, "steps": args.steps} for name in METHOD_SETTINGS)
    variants = {"adamw": adamw, "adamw at 3e-4": {**adamw, "method": {"name": "adamw", "lr": 3e-4}}, "ivon": ivon}
    demo = load()
    work = args.work / base_fingerprint(demo.model)[:12]  # runs of another base are none of ours
    cells = [(task, seed, name) for seed in args.seeds for task in args.tasks for name in variants]
    runs: dict[tuple[str, str], list[Path]] = {}
    for number, (task, seed, name) in enumerate(cells, 1):
        run_dir = work / f"{task}-{name.replace(' ', '-')}-seed{seed}"
        where = {
            "task": str(BUNDLED / "tasks" / f"{task}.yaml"),
            "model": str(demo.folder),
            "seed": seed,
            "run_dir": str(run_dir),
        }
        done = train_and_evaluate(settings_from({**SETTINGS, **where, **variants[name]}), Console(quiet=True))
        runs.setdefault((task, name), []).append(run_dir)
        print(f"{number} of {len(cells)}: {done}", flush=True)
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        before = zero_shot(load_rows(demo.tasks[task], "dev").examples)
        rows.append({"task": task, "method": "zero-shot", "metrics": {k: {"mean": v} for k, v in before.items()}})
        for name in variants:
            report = build_report(runs[task, name], work / "report" / f"{task}-{name}")
            for row in json.loads(report.files["report.json"].read_text(encoding="utf-8"))["rows"]:
                kept = {key: row[key] for key in ("seeds", "metrics", "slices")}
                rows.append({"task": task, "method": row["label"].replace("adamw", name), **kept})
    columns = ("task", "method", "ACC %", "ECE x100", "NLL", "never told: sure %", "right %")
    print_table("The demo's tasks", columns, [cells_of(row) for row in rows])
    base = read_json(demo.folder / "pretraining.json")["scores"]
    write_result(args.out, "demo", args, torch.device("cpu"), variants=variants, base=base, rows=rows)
    task = args.tasks[0]
    report = build_report([*runs[task, "adamw"], *runs[task, "ivon"]], work / "report" / task)
    shutil.copy(report.files["slices.png"], args.out.with_name("demo-slices.png"))


def cells_of(row: Mapping[str, Any]) -> list[str]:
    """Return a row as the texts of a table."""

    def text(found: Mapping[str, Any], factor: float, decimals: int) -> str:
        error = "" if found.get("stderr") is None else f" ± {factor * found['stderr']:.{decimals}f}"
        return f"{factor * found['mean']:.{decimals}f}{error}"

    forms = {"accuracy": (100, 1), "ece": (100, 1), "nll": (1, 2)}
    shown = [text(row["metrics"][name], *form) for name, form in forms.items()]
    never = row.get("slices", {}).get("never told", {})
    return [row["task"], row["method"], *shown, *(text(never[n], 100, 1) for n in ("confidence", "accuracy") if never)]


if __name__ == "__main__":
    main()
