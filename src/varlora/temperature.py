"""Temperature scaling: one number, chosen on held-out rows, that all logits are divided by (Guo et al. 2017).

It is the cheapest calibration there is, keeps the answer of a single model, and works on top of every method.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from varlora import metrics

__all__ = ["at_an_end", "fit_temperature"]

RANGE = (0.05, 50.0)
STEPS = 60  # of golden sections: the bracket shrinks to 1e-12 of itself


def at_an_end(temperature: float) -> bool:
    """Whether a temperature is at an end of the range, so that rows do not set it.

    Example:
        >>> at_an_end(1.0), at_an_end(50.0)
        (False, True)
    """
    return not 1.001 * RANGE[0] < temperature < RANGE[1] / 1.001


def fit_temperature(logits: Tensor, labels: Tensor, say: Callable[[str], None] | None = None) -> float:
    """Return the temperature T that minimises the NLL of `mean_s softmax(logits_s / T)`.

    The best of 21 temperatures from 0.05 to 50 is refined by golden sections, so several draws, for which the NLL need
    not have one minimum, are no problem; where the NLL keeps rising up to 50, that is returned. Where it keeps falling
    down to 0.05, as it does where all n rows are right, nothing says how sure the model may be: then it is as sure as
    Laplace's rule of succession allows, (n + 1) / (n + 2) on average, or stays as it is if it is surer than that.

    Args:
        logits: (S, N, C) of rows that were not trained on, -inf where a row does not have the answer.
        labels: (N,), all known.
        say: told if the temperature is at an end of the range.

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

    def loss(log_temperature: float) -> float:
        return metrics.nll(metrics.average_probs(logits.double() / math.exp(log_temperature)), labels)

    low, high = map(math.log, RANGE)
    grid = torch.linspace(low, high, 21, dtype=torch.float64).tolist()
    best = min(range(len(grid)), key=lambda i: loss(grid[i]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(STEPS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    temperature = math.exp((low + high) / 2)
    if temperature < 1 and at_an_end(temperature):
        if say:
            say(
                f"The {len(labels)} held-out rows do not set the temperature: the surer the model, the better, as far "
                "as they tell. Hold out more rows (`calibration_fraction`)."
            )
        return _as_sure_as(logits, (len(labels) + 1) / (len(labels) + 2))
    if say and at_an_end(temperature):
        say(
            f"The temperature is at the end of its range, {temperature:.3g}: the {len(labels)} held-out rows do not "
            "set it. Hold out more rows (`calibration_fraction`)."
        )
    return temperature


def _as_sure_as(logits: Tensor, share: float) -> float:
    """Return the temperature up to 1 at which the likeliest answers have some probability on average; 1 if more."""

    def sure(log_temperature: float) -> float:
        return metrics.average_probs(logits.double() / math.exp(log_temperature)).amax(1).mean().item()

    low, high = math.log(RANGE[0]), 0.0
    if sure(high) >= share:
        return 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if sure(middle) >= share else (low, middle)
    return math.exp(high)
