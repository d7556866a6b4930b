"""The model card of a pushed adapter: what it was trained on and how, how good it is, and how to load it.

Its metadata is what the hub reads: base, library, tags, data, and the metrics of the posterior as it is to be used. Its
numbers are those of the run's saved predictions; errors are bootstrap standard errors over rows. Text of tasks and runs
may come from strangers: in the metadata YAML quotes it, in the text Markdown's signs are escaped.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from varlora import __version__
from varlora.bootstrap import standard_errors
from varlora.config import Settings
from varlora.diagram import reliability_diagram
from varlora.evaluated import read_run
from varlora.files import read_json
from varlora.fit import TUNED
from varlora.results import Row, rows_of_runs
from varlora.tasks import Task, get_task
from varlora.templating import environment

__all__ = ["PICTURE", "model_card"]

PICTURE = "reliability.png"
BINS = 10
COLUMNS = (  # name, the hub's heading, ours, factor, decimals
    ("accuracy", "Accuracy", "ACC (%)", 100, 1),
    ("ece", "Expected calibration error", "ECE ×100", 100, 1),
    ("nll", "Negative log-likelihood (nats)", "NLL", 1, 3),
    ("brier", "Brier score", "Brier", 1, 3),
)
MARKS = re.compile(r"[\\`*_{}\[\]<>()#!|~$&:@]|(?<=www)\.")
"""What Markdown, or the hub's dialect of it, may read as more than text within a line."""


def model_card(run_dir: Path, name: str, settings: Settings) -> tuple[str, bytes | None]:
    """Return a run's model card, metadata included, and its reliability diagram as a PNG.

    Args:
        run_dir: a trained run; without predictions the card has no numbers and no diagram.
        name: of the repository, `user/name`, checked already.
        settings: the run's, with `model` the base's name on the hub, checked already.

    Raises:
        DamagedFileError: the run's predictions are cut short or altered.
    """
    config = read_json(run_dir / "config.json")
    task = get_task(settings.task)
    rows = _rows(run_dir)
    errors = [_errors(row) for row in rows]
    shown = _shown(rows)
    results = [_results(row, error, task) for row, error in zip(rows, errors) if row is shown]
    metadata = {
        "base_model": settings.model,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["varlora", "lora", "peft", "bayesian", "calibration", "uncertainty", settings.method],
        "datasets": [task.hub[0]] if task.hub else [],
        "metrics": [column[0] for column in COLUMNS] if results else [],
        "model-index": [{"name": name, "results": results}] if results else [],
    }
    metadata = {key: value for key, value in metadata.items() if value}
    templates = environment(autoescape=False)  # the filters escape what Markdown would read
    templates.filters["text"] = escaped
    templates.filters["literal"] = lambda value: json.dumps(value)  # of Python too
    body = templates.get_template("card.md.jinja").render(
        name=name,
        settings=settings,
        method=_method_settings(run_dir, settings),
        task=task,
        config=config,
        held_out=config.get("held_out_rows"),
        answers=_answers(rows),
        split=rows[0].runs[0].meta["split"] if rows else "",
        size=rows[0].size if rows else "",
        headings=[column[2] for column in COLUMNS],
        rows=[_line(row, error) for row, error in zip(rows, errors)],
        shown=shown.label if shown else "",
        bins=BINS,
        picture=PICTURE,
        version=__version__,
    )
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{body}", reliability_diagram(rows, BINS)["png"] if rows else None


def escaped(value: object) -> str:
    r"""Return a text as a part of a line that Markdown shows as it is.

    Example:
        >>> print(escaped("<b>*a*\n# b"))
        \<b\>\*a\* \# b
    """
    return MARKS.sub(lambda mark: f"\\{mark[0]}", " ".join(str(value).split()))


def _method_settings(run_dir: Path, settings: Settings) -> dict[str, Any]:
    """Return the method's settings, what was left to it as it was found."""
    given, path = settings.to_dict()["method_settings"], run_dir / TUNED
    found = read_json(path)["settings"] if path.is_file() else {}

    def told(name: str, value: Any) -> Any:
        if value != "auto" or name not in found:
            return value
        number = found[name]
        return f"{number:.4g} (found)" if isinstance(number, float) else f"{number} (found)"

    return {name: told(name, value) for name, value in given.items()}


def _rows(run_dir: Path) -> list[Row]:
    """Return the run's lines of a table: at the mean, drawn, with a temperature, calibrated; none if not evaluated."""
    if not (run_dir / "predictions.safetensors").is_file():
        return []
    run = read_run(run_dir)
    return rows_of_runs([run], BINS)[0] if run.known.any() else []


def _shown(rows: list[Row]) -> Row | None:
    """Return the line that stands for the posterior as it is to be used."""
    plain = [row for row in rows if not row.tempered]
    return next((row for row in plain if row.calibrated), plain[-1] if plain else None)


def _errors(row: Row) -> dict[str, float]:
    ((probs, labels),) = row.answers
    return standard_errors(probs, labels, bins=BINS, generator=torch.Generator().manual_seed(0))


def _line(row: Row, errors: Mapping[str, float]) -> list[str]:
    numbers = [
        f"{factor * row.stats[name].mean:.{decimals}f} ± {factor * errors[name]:.{decimals}f}"
        for name, _, _, factor, decimals in COLUMNS
    ]
    return [row.label, str(row.draws or "-"), *numbers]


def _results(row: Row, errors: Mapping[str, float], task: Task) -> dict[str, Any]:
    """Return the metrics as the hub reads them: plain numbers, from 0 to 1 but for the NLL and the Brier score."""
    hub, config = task.hub or (task.name, None)
    dataset = {"type": hub, "name": task.name, "split": row.runs[0].meta["split"]}
    metrics = [
        {"type": name, "name": f"{heading} ({row.label})", "value": round(row.stats[name].mean, 6)}
        | {"args": {"standard_error": round(errors[name], 6), "rows": row.size}}
        for name, heading, _, _, _ in COLUMNS
        if math.isfinite(row.stats[name].mean)
    ]
    return {
        "task": {"type": "text-classification", "name": "Question answering by the next token"},
        "dataset": dataset | ({"config": config} if config else {}),
        "metrics": metrics,
    }


def _answers(rows: list[Row]) -> list[str]:
    """Return what the model may say, in the order in which questions have it."""
    known = rows[0].runs[0].predictions.answers if rows else ()
    return list(dict.fromkeys(answer for answers in known for answer in answers))
