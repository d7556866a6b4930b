"""Evaluated runs made up for the tests of tables: no model, and files only where a test is about them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from varlora.evaluated import EvaluatedRun, Skipped
from varlora.predictions import Predictions
from varlora.results import Row, rows_of_runs

N, C, DRAWS = 120, 4, 10


def evaluated(
    task: str = "boolq",
    method: str = "adamw",
    seed: int = 1,
    *,
    skill: float = 0.5,
    noise: float = 0.0,
    own: float = 0.0,
    n: int = N,
    folder: Path = Path("runs"),
    concluded_from: Sequence[str] = (),
    method_settings: dict[str, Any] | None = None,
    temperature: float | None = None,
    tau: float = 1.0,
    **settings: Any,
) -> EvaluatedRun:
    """Return a run on the same rows for all methods and seeds of a task.

    Its logits have `skill` at the right answer; chance of the seed, and `own` of it of the method, at all of them.
    Draws have `noise` around the mean; without, the run is of a point.
    """
    of_task, of_seed = _generator(task), _generator(task, seed)
    labels = torch.randint(C, (n,), generator=of_task)
    mean = 3 * torch.randn(n, C, generator=of_seed) + 4 * skill * torch.nn.functional.one_hot(labels, C)
    mean += own * torch.randn(n, C, generator=_generator(task, method, seed))
    spread = torch.randn(DRAWS, n, C, generator=_generator(task, method, seed, tau))
    logits = mean + noise * math.sqrt(tau) * spread
    meta = {"task": task, "split": "dev", "tau": str(tau), "samples": str(DRAWS), "seed": "0"}
    if temperature is not None:
        meta |= {"temperature": str(temperature), "temperature_mean": str(temperature)}
    config = {
        "settings": {
            "task": task,
            "model": "tiny",
            "method": method,
            "seed": seed,
            "method_settings": method_settings or {},
            **settings,
        },
        "concluded_from": [{"method": source, "method_settings": {}} for source in concluded_from],
    }
    predictions = Predictions(logits, mean, labels, tuple(f"row {i}" for i in range(n)), meta=meta)
    return EvaluatedRun(folder / f"{task}-{method}-{seed}", config, predictions)


def seeds(*args: Any, **kwargs: Any) -> list[EvaluatedRun]:
    """Return the runs of three seeds."""
    return [evaluated(*args, seed=seed, **kwargs) for seed in (1, 2, 3)]


def rows(*runs: EvaluatedRun) -> list[Row]:
    """Return their rows."""
    return rows_of_runs(runs)[0]


def failure(run: EvaluatedRun, reason: str) -> Skipped:
    """Return the run as one that failed."""
    return Skipped(str(run.run), reason, run.meta["task"], run.settings["method"])


def written(run: EvaluatedRun) -> EvaluatedRun:
    """Write a run's config.json."""
    run.run.mkdir(parents=True, exist_ok=True)
    (run.run / "config.json").write_text(json.dumps(run.config))
    return run


def _generator(*what: Any) -> torch.Generator:
    return torch.Generator().manual_seed(sum(97**i * ord(char) for i, char in enumerate(str(what))) % 2**31)


def settings_of(runs: Sequence[EvaluatedRun]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what Table 3 is made of."""
    return [(run.meta["task"], run.settings) for run in runs]
