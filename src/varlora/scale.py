r"""The scale of IVON's posterior, found by looking: how much noise an adapter bears, and the steps that go with it.

**σ** is the largest standard deviation for which noise in all weights changes the predictions by no more than a bound:

.. math:: \mathrm{KL}(\sigma) = \mathbb{E}_{x, \varepsilon} \, \mathrm{KL}\big(p(\cdot \mid x, m) \,\|\,
    p(\cdot \mid x, m + \sigma\varepsilon)\big) \le \min(b \sqrt{E}, 1/2) \, \ln C

with E the epochs of training, as it takes the more noise against learning rows by heart the more often they are seen,
and ln C what it takes to tell C answers apart: that much can be learned, and noise is to hide a share of it, half at
the most. The KL, and not the loss, because before training the loss is far from any minimum, and noise may lower it.

**The learning rate** is held against the same measure. IVON's steps are clipped nearly everywhere, so a weight whose
gradient is noise makes a random walk with steps of ±αξ, and ends a distance away that is known in advance. Noise of
that size is to change the predictions by w ln C / E: rows that come E times push the same way E times, and what they
push towards by chance is learned by heart. But a weight that always goes the same way has to come further than σ, or
noise hides all that it learns, as it would in few steps of large batches.

**The learning rate stays**, and falls to zero over the last part of training only. For the same walk, steps of one size
go furthest straight on, and steps that are small while the noise is at its full size learn little about it. The fall at
the end lets the mean settle.

**Where no noise meets the bound**, as on a base that answers much the same whatever its adapter is, noise takes a small
share of the most that it can change, and the steps go with the σ at which it changes that (`reach`).

**The noise grows** linearly over the first epochs: from a start at which B is zero, noise of full size drowns the
gradient that tells B where to go; later, under little noise, rows that come again would be learned by heart.

**By layer** σ is in inverse proportion to the gradients, so that each layer's weights have an equal part in the change
of the predictions: it is ½ Σ σ² g² to second order, with g² the Fisher information that squared gradients estimate.

**h₀** is so large that what Price's estimates add to it by chance stays a small part of it; only then is σ what was
found, from the first step to the last.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BOUND",
    "Trial",
    "bound",
    "fall",
    "first_hessian",
    "growth",
    "kl_under_noise",
    "largest_sigma",
    "layer_share",
    "like_adamw",
    "ramp",
    "reach",
    "step_size",
    "walk",
]

BOUND = 0.036
"""b: share of ln C that the predictions may change by in one epoch of training; at E epochs, √E times as much."""
MOST_BORNE = 0.5
"""The most of ln C that it may be, after 193 epochs: with all of it noise would hide all that can be learned."""
WANDER = 0.12
"""w: share of ln C that the predictions may change by as weights wander, in one epoch; at E epochs, one E-th of it."""
STRAIGHT = 1.5
"""How far a weight comes at the least that always goes the same way, over σ."""
DECAY = 0.3
"""Share of training, at its end, over which the learning rate falls to zero."""
FLOOR = 0.1
"""The least share of σ that is drawn: at the first steps."""
GROWTH, LEAST_GROWTH = 3.5, 0.25
"""Epochs over which the noise grows, and the least share of training."""
STEADY = 100.0
"""h₀ over the standard deviation of what chance adds to it, with gradients as they are at first; they may grow."""
MOST_APART = 2.0
"""σ in a layer is at most so many times that of all, or so small a part of it: gradients of a few batches are noisy."""
STEPS_APART = 2
"""Between 1 and 2 times, steps that the layers' σ are rounded to: few different ones make few optimizer groups."""
TRIALS, MOST_TRIALS = 3, 6
"""Scales that are tried: KL grows as a power of σ, so each is a good guess at the next; more where that leads far."""
FAR = 1.5
"""What is found so many times beyond all that was tried is tried as well."""
FLAT, APART = 0.5, 1.1
"""Power of σ below which the KL no longer grows, as predictions of a base that knows little change no further; and how
far apart two scales have to be to show it."""
MOST, SATURATED = 0.5, 0.05
"""Share of the most KL that a bound may be, where the KL stops growing; and the share that noise may take where it does
not get to the bound, as all that the base can say by then is noise. It falls from one to the other between."""
FURTHEST = 4.0
"""A trial is at most so many times the one before, or so small a part of it."""


class Trial(NamedTuple):
    """A scale that was tried."""

    sigma: float
    kl: float
    """In nats; infinite where a draw overflows."""


def kl_under_noise(logits: Tensor, mean: Tensor) -> float:
    """Return the KL divergence of the draws' predictions from the mean's, averaged over draws and rows.

    Args:
        logits: (S, N, C), -inf where a row does not have the answer.
        mean: (N, C), at the mean.

    Example:
        >>> kl_under_noise(torch.zeros(3, 2, 4), torch.zeros(2, 4))
        0.0
    """
    if logits.isnan().any() or (logits == math.inf).any():
        return math.inf
    log_p, log_q = mean.double().log_softmax(-1), logits.double().log_softmax(-1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.nan_to_num(nan=0.0).sum(-1).mean().item()  # 0 · (−∞ + ∞): an answer that a row does not have


def bound(answers: Sequence[int], epochs: float) -> float:
    """Return by how many nats noise may change the predictions.

    Args:
        answers: how many each row has.
        epochs: of training.

    Example:
        >>> round(bound([4, 4], epochs=1.0), 3), round(bound([2, 2], epochs=4.0), 3)
        (0.05, 0.05)
    """
    nats = statistics.fmean(map(math.log, answers))
    return min(BOUND * nats * math.sqrt(epochs), MOST_BORNE * nats)


def largest_sigma(
    kl: Callable[[float], float], bound: float, start: float, least: int = TRIALS
) -> tuple[float, list[Trial]]:
    """Return the σ at which the KL meets a bound, and what was tried.

    Args:
        kl: KL at a σ, with the same noise for each.
        bound: in nats.
        start: σ to begin with.
        least: trials at the least.

    Example:
        >>> sigma, trials = largest_sigma(lambda sigma: 30 * sigma**2, bound=0.1, start=0.01)
        >>> round(sigma, 4), len(trials)
        (0.0577, 3)
    """
    trials: list[Trial] = []
    sigma = start
    while len(trials) < least or (len(trials) < MOST_TRIALS and _is_far(sigma, trials)):
        trials.append(Trial(sigma, kl(sigma)))
        sigma = _next(sorted(trial for trial in trials if 0 < trial.kl < math.inf), bound, trials[-1])
        if len(trials) < least and all(1 / APART < sigma / trial.sigma < APART for trial in trials):
            sigma /= 2  # scales that are alike tell nothing of how the KL grows
    return sigma, trials


def _is_far(sigma: float, trials: Sequence[Trial]) -> bool:
    """Whether a σ lies far from all that was tried, where the KL may stop growing, or has done so already."""
    tried = [trial.sigma for trial in trials]
    return bool(trials[-1].kl) and not min(tried) / FAR < sigma < max(tried) * FAR


def _next(known: list[Trial], bound: float, last: Trial) -> float:
    """Return σ where the line through the two trials nearest the bound, of log KL over log σ, meets it."""
    if last not in known:
        return last.sigma * (FURTHEST if last.kl == 0 else 1 / FURTHEST)
    rising = _rising(known)
    if _is_out_of_reach(bound, known):
        most = max(trial.kl for trial in known)
        bound = most * MOST * (SATURATED / MOST) ** min((bound / most - MOST) / (1 - MOST), 1.0)
    if len(known) > len(rising) == 1 and rising[0].kl > bound:  # all of what was tried is where the KL no longer grows
        return rising[0].sigma / FURTHEST
    nearest = sorted(rising, key=lambda trial: abs(math.log(trial.kl / bound)))[:2]
    power = 2.0
    if len(nearest) == 2 and nearest[0].sigma != nearest[1].sigma:
        (a, kl_a), (b, kl_b) = nearest
        power = min(max(math.log(kl_a / kl_b) / math.log(a / b), 1.0), 4.0)  # as σ² near 0, as σ⁴ where B is
    factor = (bound / nearest[0].kl) ** (1 / power)
    return nearest[0].sigma * min(max(factor, 1 / FURTHEST), FURTHEST)


def _rising(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials up to where the KL stops growing; they are sorted."""
    for at, (a, b) in enumerate(itertools.pairwise(trials)):
        if b.sigma > APART * a.sigma and math.log(b.kl / a.kl) < FLAT * math.log(b.sigma / a.sigma):
            return list(trials[: at + 1])
    return list(trials)


def _is_out_of_reach(bound: float, trials: Sequence[Trial]) -> bool:
    """Whether the KL stops growing before it meets a bound, or hardly after; the trials are sorted."""
    return len(_rising(trials)) < len(trials) and bound > MOST * max(trial.kl for trial in trials)


def reach(sigma: float, trials: Sequence[Trial], bound: float) -> float:
    """Return the σ that the steps go with: the one that was found, where noise of some size meets the bound.

    Where none does, or hardly, noise is small, lest it hide all that the base can say as it is, but the adapter has far
    to go: as far as noise with which the KL would be at its most, if it grew as σ² from the last trial that it grew at.

    Args:
        sigma: what was found.
        trials: what was tried.
        bound: in nats.

    Example:
        >>> trials = [Trial(0.01, 0.002), Trial(0.02, 0.005), Trial(0.16, 0.01)]
        >>> round(reach(0.0071, trials, bound=0.08), 4), reach(0.02, trials, bound=0.004)
        (0.0283, 0.02)
    """
    known = sorted(trial for trial in trials if 0 < trial.kl < math.inf)
    if not _is_out_of_reach(bound, known):
        return sigma
    last = _rising(known)[-1]
    return last.sigma * math.sqrt(max(trial.kl for trial in known) / last.kl)


def layer_share(gradient: float, whole: float) -> float:
    """Return a layer's σ over that of all, with which the change of the predictions stays what it was, shared evenly.

    It is one of 1/2, 1/√2, 1, √2 and 2.

    Args:
        gradient: root mean square of the gradient's entries in the layer.
        whole: that in all layers.

    Example:
        >>> [round(layer_share(gradient, whole=1.0), 2) for gradient in (0.75, 0.9, 5.0, 0.0)]
        [1.41, 1.0, 0.5, 2.0]
    """
    if not whole:
        return 1.0
    share = min(max(whole / gradient, 1 / MOST_APART), MOST_APART) if gradient else MOST_APART
    return 2 ** (round(STEPS_APART * math.log2(share)) / STEPS_APART)


def fall(part: float, decay: float) -> float:
    """Return the share of the learning rate when a part of training is done.

    Args:
        part: of training, 0 to 1.
        decay: share of training, at its end, over which the learning rate falls to zero.

    Example:
        >>> [round(fall(part, decay=0.5), 3) for part in (0.0, 0.5, 0.75, 1.0)]
        [1.0, 1.0, 0.5, 0.0]
    """
    return min(max((1 - part) / decay, 0.0), 1.0)


def _course(steps: int, decay: float) -> list[float]:
    """Return the share of the learning rate at each step."""
    return [fall(step / steps, decay) for step in range(steps)]


def walk(steps: int, beta1: float, decay: float) -> float:
    """Return how far a weight wanders whose gradient is noise, in units of αξ at the first step.

    Its momentum is an average of white noise with decay β₁, whose signs k steps apart correlate by 2/π arcsin(β₁ᵏ).

    Example:
        >>> round(walk(300, 0.9, decay=1.0)), round(walk(300, 0.0, decay=1.0)), round(walk(300, 0.9, decay=0.3))
        (37, 10, 57)
    """
    lags = torch.arange(1, 10_000, dtype=torch.float64)
    together = 1 + 2 * (2 / math.pi * (beta1**lags).asin()).sum().item()
    shares = _course(steps, decay)
    return min(math.sqrt(together * sum(share**2 for share in shares)), sum(shares))  # which is the straight path


def step_size(sigma: float, epochs: float, steps: int, beta1: float, decay: float) -> float:
    """Return αξ, by which a weight moves at the first step at the most.

    With it weights whose gradient is noise wander as far as noise that changes the predictions by w ln C / E, and a
    weight that goes straight comes 1.5 σ at the least.

    Args:
        sigma: of noise that changes the predictions by the `bound`, as one that is given is taken to do, or by all
            that noise can (`reach`); the change grows as its square.
        epochs: E, of training.
        steps: of training.
        beta1: decay of the gradient's average.
        decay: share of training, at its end, over which the learning rate falls to zero.

    Example:
        >>> round(step_size(0.03, epochs=1.0, steps=400, beta1=0.9, decay=1.0), 5)
        0.0013
        >>> round(step_size(0.06, epochs=16.0, steps=400, beta1=0.9, decay=1.0), 5)  # by the straight path
        0.00045
    """
    wandered = sigma * math.sqrt(WANDER / min(BOUND * epochs**1.5, MOST_BORNE * epochs))
    return max(wandered / walk(steps, beta1, decay), STRAIGHT * sigma / sum(_course(steps, decay)))


def like_adamw(lr: float, beta1: float) -> float:
    """Return the αξ with which weights that follow noise wander as far as with AdamW at a learning rate.

    AdamW divides the average gradient by its root mean square: its walk is that of white noise, without the momentum's
    correlation. (Weights that follow a steady gradient move by αξ, or by AdamW's learning rate, a step.)

    Example:
        >>> round(like_adamw(1e-4, 0.9), 6)
        2.7e-05
    """
    return lr * walk(1000, 0.0, decay=1.0) / walk(1000, beta1, decay=1.0)


def growth(epochs: float) -> float:
    """Return the share of training over which the noise grows: three and a half epochs, and a quarter at the least.

    Example:
        >>> growth(2.0), growth(7.0), growth(100.0)
        (1.0, 0.5, 0.25)
    """
    return min(max(GROWTH / epochs, LEAST_GROWTH), 1.0)


def ramp(part: float, growth: float) -> float:
    """Return the share of σ that is drawn when a part of training is done.

    Args:
        part: of training, 0 to 1.
        growth: share of training over which the noise grows; 0: none.

    Example:
        >>> [ramp(part, growth=0.5) for part in (0.0, 0.25, 0.5, 1.0)]
        [0.1, 0.5, 1.0, 1.0]
    """
    return min(max(part / growth, FLOOR), 1.0) if growth else 1.0


def first_hessian(gradient: float, sigma: float, steps: int, beta2: float, growth: float) -> float:
    """Return an h₀ that Price's estimates, ĝε/σ, leave where it is but for a hundredth.

    Args:
        gradient: root mean square of the entries of a mini-batch's gradient ĝ.
        sigma: σ at the end of training.
        steps: of training.
        beta2: decay of the Hessian's average.
        growth: share of training over which the noise grows.
    """
    noise = math.sqrt(sum(ramp(step / steps, growth) ** -2 for step in range(1, steps + 1))) / sigma
    return STEADY * (1 - beta2) * gradient * noise
