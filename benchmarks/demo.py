"""The demo's comparison over seeds: zero-shot, AdamW and IVON on the tasks of the bundled base.

Each method runs with the demo's settings, and AdamW also stopped early, since long training is what it suffers from.
Nothing is chosen here: the settings are those of `varlora demo`. Runs lie in the work folder and are never repeated:
start again to go on. Beside the results, the report's picture of told and never told facts is written.

    python benchmarks/demo.py
    python benchmarks/demo.py --tasks four_choices --seeds 0
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, count, parser, print_table, set_up, write_result

from varlora.config import settings_from
from varlora.demo import TASKS
from varlora.demo.base import BUNDLED
from varlora.demo.run import DRAWS, METHOD_SETTINGS, SETTINGS, zero_shot
from varlora.report import Report, Row, Stat, build_report
from varlora.run import read_json
from varlora.tasks import get_task, load_rows
from varlora.workflow import evaluate, train

EARLY = 1 / 8
"""Share of the steps after which AdamW is stopped early."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and report."""
    p = parser(__doc__, "demo")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    p.add_argument("--steps", type=count, default=SETTINGS["steps"], help="default: the demo's, %(default)s")
    p.add_argument("--work", type=Path, default=ROOT / "runs" / "demo-benchmark", help="default: %(default)s")
    args = p.parse_args(argv)
    set_up(args)
    variants: dict[str, dict[str, Any]] = {
        "adamw": {"method": {"name": "adamw", **METHOD_SETTINGS["adamw"]}, "steps": args.steps},
        "adamw early": {
            "method": {"name": "adamw", **METHOD_SETTINGS["adamw"]},
            "steps": max(1, round(EARLY * args.steps)),
        },
        "ivon": {"method": {"name": "ivon", **METHOD_SETTINGS["ivon"]}, "steps": args.steps},
    }
    cells = [(task, seed, name) for seed in args.seeds for task in args.tasks for name in variants]
    runs: dict[tuple[str, str], list[Path]] = {}
    for number, (task, seed, name) in enumerate(cells, 1):
        started = time.perf_counter()
        run_dir = run(args.work, task, seed, name, variants[name])
        runs.setdefault((task, name), []).append(run_dir)
        print(f"{number} of {len(cells)}: {run_dir.name}, {time.perf_counter() - started:.0f} s", flush=True)
    base = {task: zero_shot(load_rows(get_task(task_file(task)), "dev").examples) for task in args.tasks}
    found = {
        (task, name): build_report(folders, args.work / "report" / f"{task} {name}")
        for (task, name), folders in runs.items()
    }
    write(args, variants, base, found)
    picture(args, runs)


def task_file(task: str) -> Path:
    """Return where the description of a task lies."""
    return BUNDLED / "tasks" / f"{task}.yaml"


def run(work: Path, task: str, seed: int, name: str, variant: Mapping[str, Any]) -> Path:
    """Train and evaluate, unless that is done."""
    run_dir = work / f"{task}-{name.replace(' ', '-')}-seed{seed}"
    common = {"task": str(task_file(task)), "model": str(BUNDLED / "base"), "seed": seed, "run_dir": str(run_dir)}
    settings = settings_from({**SETTINGS, **common, **variant})
    train(settings, resume=run_dir.exists(), say=lambda text: None)
    if not (run_dir / "metrics.json").is_file():
        evaluate(run_dir, samples=DRAWS, seed=seed, token_budget=16384, say=lambda text: None)
    return run_dir


def write(
    args: argparse.Namespace,
    variants: Mapping[str, Any],
    base: Mapping[str, Mapping[str, float]],
    found: Mapping[tuple[str, str], Report],
) -> None:
    """Write and print all numbers."""
    rows: list[dict[str, Any]] = []
    for task in args.tasks:
        rows.append(
            {"task": task, "method": "zero-shot", "metrics": {k: numbers(Stat((v,))) for k, v in base[task].items()}}
        )
        for name in variants:
            rows += [described(task, name, row) for row in found[task, name].rows]
    columns = ("task", "method", "ACC %", "ECE x100", "NLL", "never told: sure %", "right %")
    print_table("The demo's tasks", columns, [line(row) for row in rows])
    pretraining = read_json(BUNDLED / "base" / "pretraining.json")
    write_result(args.out, "demo", args, torch.device("cpu"), variants=variants, base=pretraining["scores"], rows=rows)


def described(task: str, name: str, row: Row) -> dict[str, Any]:
    """Return a row of a report as plain values."""
    return {
        "task": task,
        "method": row.label.replace("adamw", name),
        "metrics": {key: numbers(stat) for key, stat in row.stats.items()},
        "slices": {part.name: {key: numbers(stat) for key, stat in part.stats.items()} for part in row.slices},
    }


def numbers(stat: Stat) -> dict[str, Any]:
    """Return mean and standard error over seeds, and the values."""
    return {"mean": stat.mean, "stderr": stat.stderr if len(stat.values) > 1 else None, "values": stat.values}


def line(row: Mapping[str, Any]) -> list[str]:
    """Return a row as the texts of a table."""

    def text(found: Mapping[str, Any], factor: float, decimals: int) -> str:
        error = "" if found["stderr"] is None else f" ± {factor * found['stderr']:.{decimals}f}"
        return f"{factor * found['mean']:.{decimals}f}{error}"

    shown = [
        text(row["metrics"][name], *form) for name, form in (("accuracy", (100, 1)), ("ece", (100, 1)), ("nll", (1, 2)))
    ]
    never = row.get("slices", {}).get("never told")
    beliefs = [text(never[name], 100, 1) for name in ("confidence", "accuracy")] if never else ["", ""]
    return [row["task"], row["method"], *shown, *beliefs]


def picture(args: argparse.Namespace, runs: Mapping[tuple[str, str], Sequence[Path]]) -> None:
    """Draw what AdamW and IVON believe of the first task's facts, all seeds together."""
    task = args.tasks[0]
    report = build_report([*runs[task, "adamw"], *runs[task, "ivon"]], args.work / "report" / task)
    shutil.copy(report.files["slices.png"], args.out.with_name("demo-slices.png"))


if __name__ == "__main__":
    main()
