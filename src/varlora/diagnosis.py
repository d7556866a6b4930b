"""Signs that the scale does not suit model and data, from what training logged, each with what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from varlora.methods.ivon import STEADY

if TYPE_CHECKING:
    from varlora.curves import Training

__all__ = ["signs", "signs_of"]

HELD_BACK = 0.5
"""Share of σ below which holding it back is worth a word."""
LOUD, QUIET = 0.8, 0.03
"""Shares of weights whose signal exceeds their noise that are surprising."""
LEARNED = 0.95
"""Share of chance's loss that is hardly better than chance."""
BY_HEART = 0.05
"""Share of chance's loss that rows learned by heart have."""
TAKEN = 0.5
"""Share of what training gained that noise may take back."""


def signs_of(logs: Mapping[str, Mapping[str, Training]]) -> list[tuple[str, str, str]]:
    """Return task, method and sentence for each warning sign in what was logged, by task and method."""
    return [
        (task, method, sentence)
        for task, of_task in logs.items()
        for method, log in of_task.items()
        for sentence in signs(log.end)
    ]


def signs(end: Mapping[str, float]) -> list[str]:
    """Return a sentence for each warning sign.

    Args:
        end: what was logged last, by name; averages of the last lines if they are noisy.

    Example:
        >>> signs({"hessian_over_first": 3.0})[0]
        'The Hessian has moved to 3 times its first value, so that sigma is not what it was set to: raise `hess_init`.'
        >>> signs({"hessian_over_first": 1.0, "signal_above_noise": 0.3})
        []
    """
    found = []
    nan = math.nan
    held, moved, heard, at_mean, under_noise, chance = (
        end.get(name, nan)
        for name in (
            *("held_back", "hessian_over_first", "signal_above_noise"),
            *("loss_at_mean", "loss_under_noise", "loss_of_chance"),
        )
    )
    if held < HELD_BACK:
        found.append(
            f"Sigma was held back to {held:.0%} of what was found, as noise took back too much of what training had "
            "gained: train longer, or expect draws that are close to the mean."
        )
    if (moved < STEADY[0] or moved > STEADY[1]) and not end.get("hessian_of_run"):
        found.append(
            f"The Hessian has moved to {moved:.3g} times its first value, so that sigma is not what it was set to: "
            "raise `hess_init`."
        )
    if at_mean > LEARNED * chance:
        found.append(
            f"The training loss at the mean, {at_mean:.3f}, is {'no' if at_mean >= chance else 'hardly'} better than "
            f"chance, {chance:.3f}: hardly anything was learned. Train longer, raise `lr`, or lower sigma (a larger "
            "`ess`)."
        )
    elif under_noise - at_mean > TAKEN * (chance - at_mean):
        found.append(
            f"Noise takes back more than half of what training gained: loss {at_mean:.3f} at the mean, "
            f"{under_noise:.3f} under noise. Lower sigma (a larger `ess`), or predict with `--tau` below 1 "
            "(`varlora calibrate` finds it)."
        )
    if under_noise < BY_HEART * chance:
        found.append(
            f"The training rows are learned by heart even under noise (loss {under_noise:.3f}): raise sigma (a smaller "
            "`ess`), or train for fewer steps."
        )
    if heard > LOUD:
        found.append(
            f"The signal of {heard:.0%} of the weights exceeds their noise: this is nearly a point. Raise sigma (a "
            "smaller `ess`) for draws that differ."
        )
    if heard < QUIET:
        found.append(
            f"The signal of only {heard:.1%} of the weights exceeds their noise: most of the adapter is noise. Lower "
            "sigma (a larger `ess`), or train longer."
        )
    return found
