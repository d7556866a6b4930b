"""What cheaper draws cost: the NLL of finished runs with few draws of each kind, fewer drawn layers, an early stop.

Few draws are compared with the average of many, over several seeds. Where only the last quarter of the layers is drawn,
noise is missing; more of it in the layers that are left (tau) and a temperature, both chosen on held-out rows,
make up for it as far as they can, and full draws are given the same.

    python benchmarks/draws.py RUN ...
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _common import ROOT, Titled, count, in_document, parser, print_table, set_up, write_result

from varlora import metrics
from varlora.drawing import Drawing
from varlora.files import read_json, write_text
from varlora.loading import encode_rows, load, rows_of_split
from varlora.predict import predict
from varlora.predictions import Predictions
from varlora.tasks import get_task
from varlora.temperature import fit_temperature

DOCUMENT = ROOT / "docs" / "inference.md"
REFERENCE = 256
"""Draws whose average stands for the posterior's."""
KINDS = {
    "independent": Drawing(),
    "antithetic": Drawing(noise="antithetic"),
    "latin": Drawing(noise="latin"),
}
TOLERANCES = (0.005, 0.01, 0.02, 0.04)
LONG = 64
"""Draws at the most where they may stop early."""
TAUS = (0.5, 1.0, 2.0, 4.0, 8.0)


class Run:
    """A finished run with its rows."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.loaded = load(folder)
        task, settings = get_task(self.loaded.settings.task), self.loaded.settings
        held_out = rows_of_split(task, "calibration", settings, print)
        shown = rows_of_split(task, task.evaluation, settings, print)[:limit]
        self.held_out, self.shown = (
            encode_rows(self.loaded.model, self.loaded.tokenizer, examples, settings, print).rows
            for examples in (held_out, shown)
        )
        config: Any = self.loaded.model.config
        self.quarter = max(1, config.num_hidden_layers // 4)

    def predicted(self, samples: int, how: Drawing, seed: int = 0, tau: float = 1.0, held: bool = False) -> Predictions:
        """Predict the rows that are shown, or those held out."""
        rows, pad = self.held_out if held else self.shown, self.loaded.tokenizer.pad_token_id or 0
        settings: dict[str, Any] = {"samples": samples, "how": how, "seed": seed, "tau": tau}
        return predict(self.loaded.model, self.loaded.posterior, rows, pad_token_id=pad, **settings)

    def plain(self, samples: int, how: Drawing, seed: int = 0) -> dict[str, float]:
        """Return NLL and accuracy as the posterior is."""
        made = self.predicted(samples, how, seed)
        of = metrics.evaluate(made.probs, made.labels)
        passes = float(made.meta.get("passes_a_row", samples))
        return {"nll": of["nll"], "accuracy": of["accuracy"], "passes_a_row": passes}

    def calibrated(self, samples: int, how: Drawing) -> dict[str, float]:
        """Return NLL and accuracy at the tau and temperature that are best on the held-out rows."""
        tried = []
        for tau in TAUS:
            made = self.predicted(samples, how, tau=tau, held=True)
            temperature = fit_temperature(made.logits, made.labels)
            probs = metrics.average_probs(made.logits / temperature)
            tried.append((metrics.evaluate(probs, made.labels)["nll"], tau, temperature))
        _, tau, temperature = min(tried)
        made = self.predicted(samples, how, tau=tau)
        of = metrics.evaluate(metrics.average_probs(made.logits / temperature), made.labels)
        return {"nll": of["nll"], "accuracy": of["accuracy"], "tau": tau, "temperature": temperature}


def measured(run: Run, args: Any) -> dict[str, Any]:
    """Return all numbers of one run."""
    found: dict[str, Any] = {
        "rows": len(run.shown),
        "last_layers": run.quarter,
        "reference": run.plain(REFERENCE, Drawing()),
        "few": {},
    }
    for n in args.few:
        found["few"][str(n)] = {
            name: [run.plain(n, how, seed) for seed in range(args.repeats)] for name, how in KINDS.items()
        }
    found["stop early"] = {str(value): run.plain(LONG, Drawing(tolerance=value)) for value in TOLERANCES}
    found["all draws"] = run.plain(LONG, Drawing())
    quarter = Drawing(last_layers=run.quarter)
    found["last quarter"] = run.plain(LONG, quarter)
    found["calibrated"] = {"all": run.calibrated(LONG, Drawing()), "last quarter": run.calibrated(LONG, quarter)}
    return found


def tables_of(runs: dict[str, Any]) -> list[Titled]:
    """Return the runs' average change of the NLL, in percent, with the standard error over runs."""
    first = next(iter(runs.values()))

    def above(pick: Callable[[dict[str, Any]], list[dict[str, float]]], base: Callable[[dict[str, Any]], float]) -> str:
        parts = [100 * (statistics.mean(one["nll"] for one in pick(of)) / base(of) - 1) for of in runs.values()]
        error = f" ± {statistics.stdev(parts) / len(parts) ** 0.5:.1f}" if len(parts) > 1 else ""
        return f"{statistics.mean(parts):+.1f}{error}"

    def many(of: dict[str, Any]) -> float:
        return float(of["reference"]["nll"])

    few = []
    for n in first["few"]:
        few.append([n, *(above(lambda of, n=n, kind=kind: of["few"][n][kind], many) for kind in KINDS)])
    less = []
    for value in first["stop early"]:
        passes = statistics.mean(of["stop early"][value]["passes_a_row"] for of in runs.values())
        nll = above(lambda of, value=value: [of["stop early"][value]], many)
        less.append([f"stop at a standard error of {value}", f"{passes:.1f}", nll])
    less.append(["all", str(LONG), above(lambda of: [of["all draws"]], many)])
    less.append(["all, last quarter of the layers", str(LONG), above(lambda of: [of["last quarter"]], many)])
    calibrated = above(lambda of: [of["calibrated"]["last quarter"]], lambda of: float(of["calibrated"]["all"]["nll"]))
    rise = f"NLL above that of {REFERENCE} independent draws, %, {len(runs)} runs"
    return [
        (f"{rise}, by number and kind of draws", ["draws", *KINDS], few),
        (f"{rise}, of what leaves something out", ["draws", "a row", "NLL"], less),
        (
            "NLL with the last quarter drawn above that of full draws, %, with tau and temperature from held-out rows",
            ["draws", "NLL"],
            [[str(LONG), calibrated]],
        ),
    ]


def documented(text: str, found: dict[str, Any]) -> str:
    """Return the document with the tables of a result."""
    return in_document(text, "draws", tables_of(found["runs"]))


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "draws")
    made.add_argument("runs", nargs="+", type=Path, help="finished runs of a method that draws, with held-out rows")
    made.add_argument("--few", nargs="+", type=count, default=[2, 4, 8, 16], help="draws of each kind (2 4 8 16)")
    made.add_argument("--repeats", type=count, default=3, help="seeds of few draws (default: %(default)s)")
    made.add_argument("--limit", type=count, default=200, help="rows of each run (default: %(default)s)")
    made.add_argument("--document", action="store_true", help="write the tables into docs/inference.md as well")
    args = made.parse_args(argv)
    set_up(args)
    runs = {}
    for folder in args.runs:
        runs[os.path.join(*folder.resolve().parts[-5:])] = measured(Run(folder, args.limit), args)
        print(f"measured {folder}", flush=True)
    for table in tables_of(runs):
        print_table(*table)
    write_result(args.out, "draws", args, torch.device("cpu"), runs=runs)
    if args.document:
        write_text(DOCUMENT, documented(DOCUMENT.read_text(encoding="utf-8"), read_json(args.out)))


if __name__ == "__main__":
    main()
