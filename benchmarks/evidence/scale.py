"""Write the tables of benchmarks/results/auto.json into docs/scale.md, between its markers, and draw its picture.

A marker names a setting, `<!-- auto: demo-400 -->`; what follows up to `<!-- end -->` is made. A line averages over the
setting's tasks within each seed, and then over seeds, with the standard error over these. `<!-- auto: paired -->` has
what IVON left to itself differs by from the rest, of the same setting and seed.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean as mean
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.style
from _common import RESULTS, ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from varlora.diagram import BLUE, GREY, ORANGE, STYLE
from varlora.files import read_json, write_text
from varlora.metrics import standard_error

DOCUMENT = ROOT / "docs" / "scale.md"
PICTURE = RESULTS / "auto.png"
MARKER = re.compile(r"(<!-- auto: ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    ("auto", "ivon"): "IVON, left to itself",
    ("grid", "ivon"): "IVON, the best of the grid",
    ("paper", "ivon"): "IVON, the paper's values",
    ("peers", "adamw"): "AdamW, the best of its search",
    ("peers", "swag"): "SWAG, on the best AdamW",
    ("longer", "ivon"): "auto, as many steps as SWAG",
    ("falling", "ivon"): "auto, learning rate that falls from the start",
    ("recheck", "ivon"): "falling, σ tried again after a quarter",
    ("one-sigma", "ivon"): "falling, one σ for all layers",
    ("no-warmup", "ivon"): "falling, noise of full size at once",
    ("no-cooling", "ivon"): "falling, never held back",
    ("prior", "ivon"): "falling, prior by evidence",
    ("learned", "ivon"): "falling, Hessian of the run's squared gradients",
    ("root", "ivon"): "falling, λ = 5000 √N",
}
OF_FALLING = ("recheck", "one-sigma", "no-warmup", "no-cooling", "prior", "learned", "root")
"""Groups that change one thing of `falling`."""
OWN_MEAN = ("auto", "auto", "ivon@mean", "its own mean, with a temperature where calibrated")
AS_LONG = ("longer", "peers", "swag", "SWAG, IVON with as many steps")
METRICS = (
    ("accuracy", "ACC %", 100, 1),
    ("ece", "ECE x100", 100, 1),
    ("ece_if_calibrated", "if calibrated", 100, 1),
    ("nll", "NLL", 1, 3),
)


class Line(NamedTuple):
    """A group's numbers in a setting."""

    group: str
    method: str
    how: str
    """`x10` or the like, `+T` or `calibrated`; empty for a point."""
    values: dict[str, list[float]]
    """By metric, one for each seed."""
    runs: int
    """Trainings that it took for each that is reported."""


def lines_of(setting: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the lines of a setting, as its posteriors are used and as they are calibrated."""
    for (group, method), _ in NAMES.items():
        if group not in setting:
            continue
        found: dict[str, list[Mapping[str, Any]]] = {}
        for row in setting[group]["rows"]:
            name, _, how = row["label"].partition(" ")
            if name == method:
                found.setdefault(how, []).append(row)
        for how, rows in found.items():
            if "+T" in how or (how.startswith("@")):
                continue
            yield Line(group, method, how, _over_tasks(rows), setting[group]["candidates"][method])


def _over_tasks(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the average of some tasks' rows by metric, one for each seed."""
    return {
        metric: [sum(seed) / len(rows) for seed in zip(*(row[metric] for row in rows), strict=True)]
        for metric, *_ in METRICS
    }


def table(setting: Mapping[str, Any]) -> str:
    """Return a setting's table in Markdown."""
    heads = ["trainings tried", "seeds", *(head for _, head, *_ in METRICS)]
    out = [f"| | | {' | '.join(heads)} |", f"| --- | --- |{' ---: |' * len(heads)}"]
    for line in lines_of(setting):
        cells = [str(line.runs), str(len(line.values["nll"]))]
        for metric, _, factor, decimals in METRICS:
            values = [factor * value for value in line.values[metric]]
            error = standard_error(values) if len(values) > 1 else math.nan
            text = f"{sum(values) / len(values):.{decimals}f}"
            cells.append(text if math.isnan(error) else f"{text} ± {error:.{decimals}f}")
        name = NAMES[line.group, line.method]
        out.append(f"| {name} | {line.how or 'a point'} | {' | '.join(cells)} |")
    return "\n".join([*out, "", "± is the standard error over seeds."])


def paired_table(settings: Mapping[str, Any]) -> str:
    """Return in Markdown what IVON left to itself differs by from each other line, over what both have been run on.

    `falling` is in its place where one thing of that was changed.
    """
    metrics = [metric for metric in METRICS if metric[0] != "ece_if_calibrated"]
    out = [f"| IVON left to itself, minus | | settings | pairs | {' | '.join(head for _, head, *_ in metrics)} |"]
    out.append(f"| --- | --- |{' ---: |' * (2 + len(metrics))}")
    others = [
        ("falling" if group in OF_FALLING else "auto", group, method, name)
        for (group, method), name in NAMES.items()
        if group != "auto"
    ]
    for own, group, method, name in [OWN_MEAN, AS_LONG, *others]:
        for how, mine, labels in (
            ("x10", "ivon x10", (method, f"{method} x10")),
            ("calibrated", "ivon calibrated", (f"{method} +T" if group == "auto" else f"{method} calibrated",)),
        ):
            pairs = [
                [(one, other) for seed, one in _by_seed(setting, own, mine).items() if (other := theirs.get(seed))]
                for setting in settings.values()
                if (theirs := _by_seed(setting, group, *labels))
            ]
            both = [pair for of_setting in pairs for pair in of_setting]
            if len(both) < 2:
                continue
            cells = [str(sum(map(bool, pairs))), str(len(both))]
            for metric, _, factor, decimals in metrics:
                values = [[factor * (one[metric] - other[metric]) for one, other in of] for of in pairs if of]
                cells.append(f"{mean(itertools.chain(*values)):+.{decimals}f} ± {error_of(values):.{decimals}f}")
            out.append(f"| {name} | {how} | {' | '.join(cells)} |")
    notes = (
        "± is the standard error over settings, in which seeds are alike; of a single setting, over seeds. Where a "
        "line begins with *falling*, the learning rate falls from the start on both sides."
    )
    return "\n".join([*out, "", notes])


def error_of(groups: Sequence[Sequence[float]]) -> float:
    """Return the standard error of the mean of all numbers, of which those of a group have much in common.

    √(G / (G − 1) Σ_g (Σ_i (x_gi − x̄))²) / n, for G groups of n numbers (cluster-robust; Liang and Zeger 1986).

    Example:
        >>> error_of([[1.0, 1.0], [3.0, 3.0]])  # as that of 1 and 3
        1.0
    """
    if len(groups) == 1:
        return standard_error(groups[0])
    center, n = mean(itertools.chain(*groups)), sum(map(len, groups))
    apart = sum(sum(value - center for value in of) ** 2 for of in groups)
    return math.sqrt(len(groups) / (len(groups) - 1) * apart) / n


def _by_seed(setting: Mapping[str, Any], group: str, *labels: str) -> dict[int, dict[str, float]]:
    """Return the metrics of a setting's rows with one of some labels, averaged over tasks, by seed."""
    rows = [row for row in setting.get(group, {"rows": ()})["rows"] if row["label"] in labels]
    if not rows:
        return {}
    by_metric = _over_tasks(rows)
    return {
        seed: {metric: values[at] for metric, values in by_metric.items()}
        for at, seed in enumerate(setting[group]["seeds"])
    }


def documented(text: str, settings: Mapping[str, Any]) -> str:
    """Return a document with what stands between its markers made anew."""

    def made(name: str) -> str:
        return paired_table(settings) if name == "paired" else table(settings[name])

    return MARKER.sub(lambda found: f"{found[1]}\n{made(found[2].strip())}\n\n{found[3]}", text)


def picture(settings: Mapping[str, Any]) -> Figure:
    """Draw the NLL of each line, a panel for each setting."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8.4, 2.3 * len(settings) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
        for panel, (name, setting) in zip(panels, settings.items(), strict=True):
            _panel(panel, name, list(lines_of(setting)))
        return figure


def _panel(panel: Any, name: str, lines: Sequence[Line]) -> None:
    shown = [line for line in lines if line.group in ("auto", "falling", "grid", "paper", "peers")]
    for at, line in enumerate(reversed(shown)):
        values = line.values["nll"]
        color = ORANGE if line.group == "auto" else BLUE if line.method == "ivon" else GREY
        panel.plot(values, [at] * len(values), ".", color=color, alpha=0.4)
        filled = color if line.how == "calibrated" else "white"
        panel.plot(sum(values) / len(values), at, "o", color=color, markerfacecolor=filled)
    panel.set_yticks(range(len(shown)), [f"{NAMES[one.group, one.method]} {one.how}" for one in reversed(shown)])
    panel.set_title(name, fontsize=8, loc="left")
    panel.set_xlabel("NLL; dots are seeds, filled is calibrated")
    panel.grid(axis="x", alpha=0.3, linewidth=0.5)


if __name__ == "__main__":
    results = read_json(RESULTS / "auto.json")["settings"]
    write_text(DOCUMENT, documented(DOCUMENT.read_text(encoding="utf-8"), results))
    picture(results).savefig(PICTURE, dpi=150, metadata={"Software": None})
    print(f"wrote {DOCUMENT.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")
