"""How well calibrated finished runs can be: the ECE of the mean with temperatures chosen in several ways.

On held-out rows, as `evaluate` does; on the very rows that are reported, which nobody may do, and which shows what a
better choice could give at the best; and both with a temperature that may depend on how unsure the model is,
T exp(w H / ln C) with H the entropy (as in Balanya et al. 2022, Adaptive temperature scaling), on held-out rows also
with a prior w ~ N(0, 1), as few rows say little of w. Next to them the ECE that perfect calibration would show on so
many rows.

    python benchmarks/temperatures.py RUN ...
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from _common import ROOT, Titled, in_document, parser, print_table, set_up, write_result
from torch import Tensor

from varlora import metrics
from varlora.files import read_json, write_text
from varlora.predictions import load_predictions
from varlora.temperature import fit_temperature

DOCUMENT = ROOT / "docs" / "scale.md"
WAYS = {
    "held-out rows": (0.0, False),
    "reported rows": (0.0, True),
    "held-out rows, by entropy": (math.inf, False),
    "held-out rows, by entropy, with a prior": (1.0, False),
    "reported rows, by entropy": (math.inf, True),
}
"""(Standard deviation of the prior on w, 0 where the temperature does not depend on the entropy; whether it is chosen
on the rows that are reported)."""
SLOPES = torch.linspace(-3, 3, 31).tolist()


def tempered(logits: Tensor, temperature: float, slope: float) -> Tensor:
    """Return logits (N, C) divided by T exp(w H / ln C), of rows with entropy H."""
    probs = logits.double().softmax(-1)
    entropy = torch.special.entr(probs).sum(-1) / torch.log((probs > 0).sum(-1).clamp(min=2))  # (N,), of 1
    return logits / (temperature * torch.exp(slope * entropy))[:, None]


def chosen(logits: Tensor, labels: Tensor, prior: float) -> tuple[float, float]:
    """Return the temperature and slope that minimise the NLL, and half the square of the slope over its prior's std."""
    tried = []
    for slope in SLOPES if prior else [0.0]:
        bent = tempered(logits, 1.0, slope)
        temperature = fit_temperature(bent[None], labels)
        loss = metrics.nll((bent / temperature).double().softmax(-1), labels)
        unlikely = (slope / prior) ** 2 / 2 if prior else 0.0
        tried.append((loss + unlikely / len(labels), temperature, slope))
    return min(tried)[1:]


def measured(run: Path) -> dict[str, Any]:
    """Return the metrics of a run's mean, each way."""
    shown, held_out = (load_predictions(run / f"predictions{end}.safetensors") for end in ("", "-calibration"))
    ways = {}
    for name, (prior, on_reported) in WAYS.items():
        source = shown if on_reported else held_out
        temperature, slope = chosen(source.logits_mean, source.labels, prior)
        probs = tempered(shown.logits_mean, temperature, slope).double().softmax(-1)
        of = metrics.evaluate_all(probs, shown.labels)
        ways[name] = {key: of[key] for key in ("nll", "ece", "ece_if_calibrated")}
        ways[name] |= {"temperature": temperature, "slope": slope}
    return {"task": shown.meta["task"], "rows": len(shown.labels), "held_out": len(held_out.labels), "ways": ways}


def table_of(runs: dict[str, Any]) -> Titled:
    """Return for each way and task the ECE of its runs, on average, and over all tasks with that of perfection."""
    tasks = sorted({run["task"] for run in runs.values()})

    def average(way: str, key: str, task: str | None = None, factor: float = 100) -> float:
        return factor * statistics.mean(
            run["ways"][way][key] for run in runs.values() if task is None or run["task"] == task
        )

    table = [
        [
            way,
            *(f"{average(way, 'ece', task):.1f}" for task in tasks),
            f"{average(way, 'ece'):.1f}",
            f"{average(way, 'ece_if_calibrated'):.1f}",
            f"{average(way, 'nll', factor=1):.3f}",
        ]
        for way in WAYS
    ]
    columns = ["temperature chosen on", *tasks, "all", "if calibrated", "NLL"]
    return f"ECE x100 of the mean of {len(runs)} runs", columns, table


def documented(text: str, found: dict[str, Any]) -> str:
    """Return the document with the table of a result."""
    return in_document(text, "temperatures", [table_of(found["runs"])])


def main(argv: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "temperatures")
    made.add_argument("runs", nargs="+", type=Path, help="evaluated runs with held-out rows")
    made.add_argument("--document", action="store_true", help="write the table into docs/scale.md as well")
    args = made.parse_args(argv)
    set_up(args)
    runs = {os.path.join(*folder.resolve().parts[-5:]): measured(folder) for folder in args.runs}
    print_table(*table_of(runs))
    write_result(args.out, "temperatures", args, torch.device("cpu"), runs=runs)
    if args.document:
        write_text(DOCUMENT, documented(DOCUMENT.read_text(encoding="utf-8"), read_json(args.out)))


if __name__ == "__main__":
    main()
