"""The evidence: every method on equal terms, on the demo's tasks, SST-2 and the paper's six tasks, with error bars.

Two tables: `tuned`, each method with the same number of candidates on held-out rows (learning rate and number of steps,
so that each may stop early; half as many where IVON finds its learning rate itself), and `long`, all at the end of one
long training as in the paper. A third, `why`, has all of a plan's values side by side: what the length of training and
the scale of the noise do. The plans are the YAML files beside this one. Hours on two cores; stopped at any point, the
same command goes on. `document.py` writes what came out into docs/evidence.md and the README.
"""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _common import ROOT, count, machine, parser, shared_folder

from varlora.evaluated import read_runs
from varlora.files import read_json, write_json
from varlora.grid import Processes
from varlora.plan import TAUS, Plan, plan_from
from varlora.report import paper_tables
from varlora.reproduce import reproduce
from varlora.results import rows_of_runs
from varlora.run import origin
from varlora.typeset import to_json

HERE = Path(__file__).resolve().parent
PARTS = ("demo-long", "demo-tuned", "sst2-long", "sst2-tuned", "sst2-why", "reasoning")


def plans_of(part: str, work: Path) -> list[Plan]:
    """Return the plans of a part.

    What is tuned searches, what is long takes the last value of each list, and why takes each combination of them.
    """
    name, _, table = part.partition("-")
    options = {}
    if name != "demo":
        data = shared_folder() / "data"
        options = {"model": str(shared_folder() / "models" / "tinyllama-3m"), "data_dir": str(data)}
        if name == "reasoning":
            options["data_dir"] = str(first_rows(data, work / "data"))
    plan = plan_from(HERE / f"{part.replace('-', '_') if table == 'why' else name}.yaml", work / name, options)
    if table == "why":
        return [
            replace(
                plan,
                methods={method: plan.methods[method]},
                search={method: {setting: [value] for setting, value in zip(space, values)}},
            )
            for method, space in plan.search.items()
            for values in itertools.product(*space.values())
        ]
    if table != "long":
        return [plan]
    last = {
        method: {setting: values[-1:] for setting, values in space.items()} for method, space in plan.search.items()
    }
    return [replace(plan, search=last, taus=TAUS if name == "demo" else ())]


def first_rows(data: Path, target: Path, rows: int = 100) -> Path:
    """Copy the reasoning tasks' files with the first rows of what is evaluated: a pass over all would take hours."""
    for source in sorted(data.glob("*/*.jsonl")):
        copy = target / source.relative_to(data)
        copy.parent.mkdir(parents=True, exist_ok=True)
        lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
        copy.write_text("".join(lines if "train" in source.name else lines[:rows]), encoding="utf-8")
    return target


def results_of(plans: list[Plan], workers: int) -> dict[str, Any]:
    """Run what is missing of some plans, and return their tables, what was chosen and what failed."""
    ended = [reproduce(plan, partial(Processes, workers, 1), partial(print, flush=True)) for plan in plans]
    runs, skipped = read_runs([run for each in ended for run in each.runs])
    failed = [*(skip for each in ended for skip in each.failed), *skipped]
    rows, _, notes = rows_of_runs(runs)
    return {
        "model": Path(plans[0].model).name,
        "seeds": plans[0].seeds,
        "runs": len(runs),
        "commits": sorted({str(run.config.get("commit")) for run in runs}),
        "chosen": {task: of_method for each in ended for task, of_method in each.chosen.items()},
        "failed": [skip.reason for skip in failed],
        "notes": notes,
        "tables": {table.name: to_json(table) for table in paper_tables(rows, failed)},
    }


def main() -> None:
    made = parser(__doc__, "evidence")
    made.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    made.add_argument("--work", type=Path, default=ROOT / "runs" / "evidence", help="folder of the runs")
    made.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="default: the cores")
    args = made.parse_args()
    os.chdir(ROOT)
    for part in args.parts:
        found = results_of(plans_of(part, args.work), args.workers)
        where = origin()
        where["machine"] |= machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        before = read_json(args.out)["parts"] if args.out.is_file() else {}
        parts = {**before, part: {**found, "origin": where}}
        write_json(args.out, {"benchmark": "evidence", "parts": {name: parts[name] for name in PARTS if name in parts}})
        print(f"wrote {part} to {args.out}", flush=True)


if __name__ == "__main__":
    main()
