"""Calibration of what lm-evaluation-harness logs: the numbers that it has no metrics for.

The harness logs of each multiple-choice row the loglikelihoods of its choices. Their softmax are the probabilities that
its `acc` takes the largest of and its `brier_score` is made of; here are their NLL and ECE as well, of any model that
the harness can run.

Of a posterior these are the averaged likelihoods, made probabilities. That is not quite the average of each draw's
probabilities, which `varlora evaluate` has: a draw that finds all of the choices more likely counts for more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlora import metrics
from varlora.errors import VarloraError

__all__ = ["calibration_of", "choices_of"]

PAIRS = ("brier_score", "likelihood", "f1", "mcc")
"""Metrics of the harness that log (right choice, what it is judged by)."""


def calibration_of(samples: str | Path | Iterable[Mapping[str, Any]], bins: int = 10) -> dict[str, float]:
    """Return accuracy, nll, ece and brier of a multiple-choice task's logged samples, and the number of rows.

    Args:
        samples: `results["samples"][task]` of `simple_evaluate(..., log_samples=True)`, or the file
            `samples_<task>_<date>.jsonl` that the harness's command line writes with `--log_samples`.
        bins: equal-width bins (lo, hi] of the ECE.

    Raises:
        VarloraError: there are no rows, or one is not of a multiple-choice task, or has several right choices.

    Example:
        >>> row = {"doc_id": 0, "target": 1, "filtered_resps": [(-3.0, False), (-1.0, True)], "acc": 1.0}
        >>> row["arguments"] = [("Is 7 a prime?", " no"), ("Is 7 a prime?", " yes")]
        >>> values = calibration_of([row])
        >>> round(values["nll"], 4), values["rows"]  # log(1 + e^-2)
        (0.1269, 1)
    """
    probs, labels = choices_of(samples)
    return {**metrics.evaluate(probs, labels, bins=bins), "rows": len(labels)}


def choices_of(samples: str | Path | Iterable[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the probabilities of the choices, (N, C) float64, 0 where a row has fewer, and the right ones, (N,).

    They are what every function of `varlora.metrics` takes. Arguments and errors are those of `calibration_of`.
    """
    rows = _read(Path(samples)) if isinstance(samples, str | Path) else list(samples)
    if not rows:
        raise VarloraError("Expected `samples` to hold rows, but got none. Pass log_samples=True to the harness.")
    found = [_row(row) for row in rows]
    logits = torch.full((len(found), max(len(lls) for lls, _ in found)), -torch.inf, dtype=torch.float64)
    for of_row, (lls, _) in zip(logits, found):
        of_row[: len(lls)] = torch.tensor(lls, dtype=torch.float64)
    return metrics.average_probs(logits[None]), torch.tensor([right for _, right in found])


def _read(path: Path) -> list[Any]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # and not where a text has a separator of its own
        return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise VarloraError(
            f"Expected the harness's samples in {path}, but cannot read it: {error}. "
            "It writes them with `--log_samples --output_path`, a JSON object a line."
        ) from error


def _row(row: Any) -> tuple[list[float], int]:
    """Return the loglikelihoods of a row's choices, and the right one."""
    try:
        where = f"row {row['doc_id']}"
        arguments = row["arguments"]
        if isinstance(arguments, Mapping):  # in a file
            arguments = [tuple(pair.values()) for pair in arguments.values()]
        lls = [float(ll) for ll, _ in row["filtered_resps"]]
        contexts, continuations = zip(*((pair[0], pair[1]) for pair in arguments))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise VarloraError(
            f"Expected a sample of a multiple-choice task as the harness logs it, but got {str(row)[:200]} ({error}). "
            "Pass those of one multiple-choice task."
        ) from error
    if "acc_mutual_info" in row:  # its second half are the same choices without a question
        half = len(lls) // 2
        lls, contexts, continuations = lls[:half], contexts[:half], continuations[:half]
    if len(lls) < 2 or len(lls) != len(continuations):
        raise VarloraError(
            f"Expected at least two choices in {where}, each with its loglikelihood, but got {len(lls)}. "
            "Pass the samples of a multiple-choice task."
        )
    return lls, _right(row, lls, continuations, where)


def _right(row: Mapping[str, Any], lls: Sequence[float], continuations: Sequence[str], where: str) -> int:
    """Return the right choice: logged by a metric, or the target by its text or index; `acc` tells what may be."""
    target = row.get("target")
    candidates = [row[name][0] for name in PAIRS if isinstance(row.get(name), Sequence) and len(row[name]) == 2]
    if not candidates:
        texts = [text.strip() for text in continuations]
        if isinstance(target, str) and texts.count(target.strip()) == 1:
            candidates.append(texts.index(target.strip()))
        if isinstance(target, int) or (isinstance(target, str) and target.isdecimal()):
            candidates.append(int(target))
        if not candidates:  # the choices are in the contexts, as WinoGrande's
            candidates = list(range(len(lls)))
    best = max(range(len(lls)), key=lambda index: lls[index])  # the first of equal ones, as the harness's argmax
    if "acc" in row:
        candidates = [index for index in candidates if (index == best) == (float(row["acc"]) == 1.0)]
    possible = sorted({index for index in candidates if isinstance(index, int) and 0 <= index < len(lls)})
    if len(possible) != 1 or isinstance(target, list):
        raise VarloraError(
            f"Expected one right choice of {len(lls)} in {where}, but its target is {target!r:.100}, which says "
            f"{possible or 'none of them'}. Rows with several right choices have no NLL; otherwise add the metric "
            "`brier_score` to the task, which logs the right one."
        )
    return possible[0]
