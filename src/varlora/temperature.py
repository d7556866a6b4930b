"""Temperature scaling: one number, chosen on held-out rows, that all logits are divided by (Guo et al. 2017).

It is the cheapest calibration there is, keeps the answer of a single model, and works on top of every method.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from varlora import metrics

__all__ = ["fit_temperature"]

RANGE = (0.05, 50.0)
ALLOWED = 1.92
"""A temperature is ruled out if the likelihood of all rows is so many nats lower at it: at the 5 % level."""
STEPS = 60  # of golden sections: the bracket shrinks to 1e-12 of itself


def fit_temperature(logits: Tensor, labels: Tensor, say: Callable[[str], None] | None = None) -> float:
    """Return the temperature T that minimises the NLL of `mean_s softmax(logits_s / T)`.

    The best of 21 temperatures from 0.05 to 50 is refined by golden sections, so several draws, for which the NLL need
    not have one minimum, are no problem; where the NLL keeps rising up to 50, that is returned. Where the rows do not
    rule 0.05 out, as where all are right, nothing says how sure the model may be: then two more rows are counted, as in
    Laplace's rule of succession, one of which is wrong, and T is at most 1. Of n rows that are all right and all as
    sure, that is (n + 1) / (n + 2) sure.

    Args:
        logits: (S, N, C) of rows that were not trained on, -inf where a row does not have the answer.
        labels: (N,), all known.
        say: told if the rows do not set the temperature.

    Returns:
        T, from 0.05 to 50: > 1 if the model was too sure of itself.

    Raises:
        MetricError: there are no rows, or shapes or labels are wrong.

    Example:
        >>> sure = torch.tensor([[[4.0, 0.0]] * 4])  # 98 % sure of the first answer, right in three of four
        >>> temperature = fit_temperature(sure, torch.tensor([0, 0, 0, 1]))
        >>> round(torch.tensor([4.0, 0.0]).div(temperature).softmax(0)[0].item(), 3)
        0.75

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks, section 4.2.
    """

    def loss(temperature: float) -> float:
        return metrics.nll(metrics.average_probs(logits.double() / temperature), labels)

    temperature = _best(loss, *RANGE)
    if temperature < 1 and len(labels) * (loss(RANGE[0]) - loss(temperature)) < ALLOWED:
        if say:
            say(
                f"The {len(labels)} held-out rows do not set the temperature: by them the model may be as sure as it "
                "likes. Hold out more rows (`calibration_fraction`)."
            )
        return _best(lambda temperature: _doubted(logits.double() / temperature, labels), RANGE[0], 1.0)
    if say and temperature > RANGE[1] / 1.001:
        say(
            f"The temperature is at the end of its range, {temperature:.3g}: the {len(labels)} held-out rows do not "
            "set it. Hold out more rows (`calibration_fraction`)."
        )
    return temperature


def _best(loss: Callable[[float], float], least: float, most: float) -> float:
    """Return the temperature of least loss: the best of 21, refined by golden sections."""
    grid = torch.linspace(math.log(least), math.log(most), 21, dtype=torch.float64).tolist()
    best = min(range(len(grid)), key=lambda i: loss(math.exp(grid[i])))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(math.exp(left)) <= loss(math.exp(right)) else (left, high)
    return math.exp((low + high) / 2)


def _doubted(logits: Tensor, labels: Tensor) -> float:
    """Return the NLL of rows, (S, N, C), and of two like them on average: the likeliest answer is right in but one."""
    log_probs = logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))  # also of what float64 holds as 0
    ordered = log_probs.sort(1, descending=True).values
    others = ordered[:, 1:].logsumexp(1)
    others = others[others > -math.inf]  # where there are any
    doubt = others.mean() if len(others) else 0.0
    return -(log_probs.gather(1, labels[:, None]).sum() + ordered[:, 0].mean() + doubt).item()
