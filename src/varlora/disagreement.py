"""Which rows the methods answer differently: the rows of a task, those of most disagreement first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from varlora.curves import Series
from varlora.metrics import uncertainty
from varlora.results import EvaluatedRun, Row

__all__ = ["Answered", "Disagreement", "disagreement"]


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
    tables = [_mean_probs(one.shown, width) for one in series]
    ids = [id for id in tables[0] if all(id in table for table in tables)]
    if not ids:
        return Disagreement((), 0)
    probs = torch.stack([torch.stack([table[id] for id in ids]) for table in tables])  # (M, N, C)
    parts = uncertainty(probs.log())  # of methods in place of draws; log 0 is an answer that a row does not have
    scores = parts.epistemic if len(series) > 1 else parts.total
    texts = _texts(runs)
    order = sorted(range(len(ids)), key=lambda i: (-round(scores[i].item(), 9), i))[:limit]
    rows = []
    for i in order:
        prompt, answers, label, count = texts[ids[i]]
        rows.append(
            Answered(
                id=ids[i],
                prompt=prompt,
                answers=answers or tuple(str(k + 1) for k in range(count)),
                label=label,
                probs=tuple(tuple(p[i, :count].tolist()) for p in probs),
                score=max(0.0, scores[i].item()),
            )
        )
    return Disagreement(tuple(rows), len(ids))


def _mean_probs(row: Row, width: int) -> dict[str, Tensor]:
    """Return each row's probabilities (width,) by its id, averaged over the seeds that were evaluated on it."""
    found: dict[str, list[Tensor]] = {}
    for run in row.runs:
        probs = run.probs(row.draws > 0)
        for id, p in zip(run.predictions.ids, pad(probs, (0, width - probs.shape[1]))):
            found.setdefault(id, []).append(p)
    return {id: torch.stack(probs).mean(dim=0) for id, probs in found.items()}


def _texts(runs: Sequence[EvaluatedRun]) -> dict[str, tuple[str, tuple[str, ...], int, int]]:
    """Return (prompt, answers, label, number of answers) of each row, from a run that stores texts where one does."""
    found: dict[str, tuple[str, tuple[str, ...], int, int]] = {}
    for predictions in sorted((run.predictions for run in runs), key=lambda p: not p.prompts):
        counts = predictions.logits_mean.isfinite().sum(dim=1).tolist()
        prompts = predictions.prompts or ("",) * len(counts)
        answers = predictions.answers or ((),) * len(counts)
        for id, *texts in zip(predictions.ids, prompts, answers, predictions.labels.tolist(), counts):
            found.setdefault(id, (texts[0], texts[1], texts[2], texts[3]))
    return found
