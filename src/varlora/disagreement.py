"""Which rows the methods answer differently: the rows of a task, those of most disagreement first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from varlora.curves import Series
from varlora.evaluated import EvaluatedRun
from varlora.metrics import uncertainty
from varlora.predictions import Predictions
from varlora.results import Row

__all__ = ["Answered", "Disagreement", "disagreement"]

Key = tuple[str, str]
"""A row's id and what it asks."""


@dataclass(frozen=True, eq=False)
class Answered:
    """A row and what each method says of it."""

    id: str
    prompt: str
    """What is asked; empty where the predictions are of an older version, which did not store it."""
    answers: tuple[str, ...]
    """Texts of the answers; their numbers where they are not known."""
    label: int
    """Which answer is right; -1 where unknown."""
    probs: tuple[tuple[float, ...], ...]
    """For each method the probability of each answer, averaged over its seeds."""
    score: float
    """How much the methods disagree, in nats; of a single method, how unsure it is."""


@dataclass(frozen=True, eq=False)
class Disagreement:
    """The rows of a task that the methods disagree on most."""

    rows: tuple[Answered, ...]
    """Ordered by score, the largest first."""
    total: int
    """Rows that all methods were evaluated on, of which these are some."""


def disagreement(series: Sequence[Series], limit: int) -> Disagreement:
    r"""Return a task's rows, those on which the methods disagree most first.

    .. math:: D = H\Big[\frac{1}{M} \sum_m p_m\Big] - \frac{1}{M} \sum_m H[p_m]

    the Jensen-Shannon divergence of the M methods' probabilities: 0 where all say the same, log M where each is sure of
    another answer. Of a single method, H of its probabilities takes its place.

    Args:
        series: the methods; rows that one of them was not evaluated on are left out.
        limit: rows to return, at most.

    References:
        Lin, Divergence measures based on the Shannon entropy, 1991.
    """
    runs = [run for one in series for run in one.shown.runs]
    width = max(run.predictions.logits_mean.shape[1] for run in runs)
    told = all(run.predictions.prompts for run in runs)
    tables = [_mean_probs(one.shown, width, told) for one in series]
    keys = [key for key in tables[0] if all(key in table for table in tables)]
    if not keys:
        return Disagreement((), 0)
    probs = torch.stack([torch.stack([table[key] for key in keys]) for table in tables])  # (M, N, C)
    parts = uncertainty(probs.log())  # of methods in place of draws; log 0 is an answer that a row does not have
    scores = parts.epistemic if len(series) > 1 else parts.total
    texts = _texts(runs, told)
    order = sorted(range(len(keys)), key=lambda i: (-round(scores[i].item(), 9), i))[:limit]
    rows = []
    for i in order:
        prompt, answers, label, count = texts[keys[i]]
        rows.append(
            Answered(
                id=keys[i][0],
                prompt=prompt,
                answers=answers or tuple(str(k + 1) for k in range(count)),
                label=label,
                probs=tuple(tuple(p[i, :count].tolist()) for p in probs),
                score=max(0.0, scores[i].item()),
            )
        )
    return Disagreement(tuple(rows), len(keys))


def _keys(predictions: Predictions, told: bool) -> list[Key]:
    """Return by what rows are known: the id and, where all predictions tell, what is asked; ids may be row numbers."""
    return list(zip(predictions.ids, predictions.prompts if told else ("",) * len(predictions.ids)))


def _mean_probs(row: Row, width: int, told: bool) -> dict[Key, Tensor]:
    """Return each row's probabilities (width,) by its key, averaged over the seeds that were evaluated on it."""
    found: dict[Key, list[Tensor]] = {}
    for run in row.runs:
        probs = run.probs(row.draws > 0)
        for key, p in zip(_keys(run.predictions, told), pad(probs, (0, width - probs.shape[1]))):
            found.setdefault(key, []).append(p)
    return {key: torch.stack(probs).mean(dim=0) for key, probs in found.items()}


def _texts(runs: Sequence[EvaluatedRun], told: bool) -> dict[Key, tuple[str, tuple[str, ...], int, int]]:
    """Return (prompt, answers, label, number of answers) of each row, from a run that stores texts where one does."""
    found: dict[Key, tuple[str, tuple[str, ...], int, int]] = {}
    for predictions in sorted((run.predictions for run in runs), key=lambda p: not p.prompts):
        counts = predictions.logits_mean.isfinite().sum(dim=1).tolist()
        prompts = predictions.prompts or ("",) * len(counts)
        answers = predictions.answers or ((),) * len(counts)
        for key, *texts in zip(_keys(predictions, told), prompts, answers, predictions.labels.tolist(), counts):
            found.setdefault(key, (texts[0], texts[1], texts[2], texts[3]))
    return found
