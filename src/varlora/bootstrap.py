"""Is one method better than another, or is it noise? Differences of metrics, with intervals over seeds and rows.

Both methods saw the same seeds and the same rows, so that what makes a seed or a row easy is easy for both and cancels
in the difference. How far other seeds would have moved it is estimated from the seeds' differences; how far other rows
would have, from rows that are drawn with replacement, the same ones for both methods (the bootstrap: Efron 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varlora.metrics import MetricError, Rule, bin_of, by_row, evaluate

__all__ = ["Difference", "paired_differences", "standard_errors", "student_quantile"]

METRICS = ("accuracy", "nll", "ece", "brier")  # in the order of `evaluate`
BYTES = 100_000_000  # of drawn rows and their counts at a time


@dataclass(frozen=True)
class Difference:
    """By how much a metric of the second method is larger, and between which numbers that may as well have been."""

    mean: float
    """On the data itself: the mean over seeds of b − a."""
    low: float
    """Lower end of the interval; minus infinity where a single row says nothing of others."""
    high: float
    """Upper end of the interval."""
    level: float
    """How often such an interval holds what the difference is over all seeds and rows."""
    replicates: int
    """How many times rows were drawn."""

    @property
    def noise(self) -> bool:
        """Whether the interval contains 0: other seeds and rows may well give no difference, or the opposite one."""
        return self.low <= 0 <= self.high


def paired_differences(
    a: Sequence[tuple[Tensor, Tensor]],
    b: Sequence[tuple[Tensor, Tensor]],
    *,
    bins: int = 10,
    rule: Rule = "right",
    level: float = 0.95,
    replicates: int = 1000,
    generator: torch.Generator,
) -> dict[str, Difference]:
    r"""Return the difference b − a of accuracy, nll, ece and brier, each with an interval.

    .. math:: \Delta \pm \sqrt{t_{K - 1}^2 V_s + t_{N - 1}^2 V_r}, \qquad
        \Delta = \frac{1}{K} \sum_{k=1}^{K} \Delta_k, \qquad
        V_s = \frac{1}{K (K - 1)} \sum_k (\Delta_k - \Delta)^2

    Δₖ is the difference of the metrics of seed k. If all seeds were evaluated on the same rows, then V_r is how much
    the mean over seeds varies, times N / (N - 1), where N of the N rows are drawn anew, the same for all: a
    hard row is hard in every run, and the spread between seeds does not show it. Otherwise the spread between seeds has
    it all, and V_r is 0. Rows are taken for the same if they are as many and have equal labels. t is Student's
    quantile: the fewer the seeds, the less is known of their spread.

    What it does not say:

    - With a single seed V_s is 0, so the interval is that of other rows, not of other seeds.
    - What is neither of the seed nor of the row, but chance in each cell of seed and row, is in V_s and in V_r if the
      rows are the same: were it all there is, the interval would be too wide by a factor of √2 and, of few seeds, more.

    Memory: about 100 MB of drawn rows, however many there are, and 16 (3 + bins) bytes for each row of one seed.

    Args:
        a: the first method's `(probs (N, C), labels (N,))` of each seed; N may differ between seeds.
        b: the second method's, of the same seeds and rows in the same order.
        bins: number of bins of the ECE.
        rule: rule of these bins; see `bin_of`.
        level: how often the intervals are to hold the truth, between 0 and 1.
        replicates: how many times to draw, at least 2.
        generator: where the draws come from; the same state gives the same intervals.

    Returns:
        A `Difference` for each of accuracy, nll, ece and brier, rounded to 12 decimals, so that what is no difference
        is 0 and not a rounding error.

    Raises:
        MetricError: seeds, rows or labels are not paired; level or replicates out of range; as `evaluate`.

    Example:
        >>> labels = torch.tensor([0] * 60 + [1] * 40)
        >>> sure = torch.tensor([[0.9, 0.1]]).expand(100, 2)  # 90 % sure, but right in 60 % of the rows
        >>> fair = torch.tensor([[0.6, 0.4]]).expand(100, 2)
        >>> found = paired_differences([(sure, labels)], [(fair, labels)], generator=torch.Generator().manual_seed(0))
        >>> found["accuracy"].mean, found["accuracy"].noise
        (0.0, True)
        >>> round(found["nll"].mean, 2), found["nll"].noise
        (-0.31, False)

    References:
        Efron, Bootstrap methods: another look at the jackknife, 1979; Zou and Donner, Construction of confidence limits
        about effect measures, 2008 (how the two parts come together).
    """
    _check(a, b, level, replicates)
    metrics = [[list(evaluate(*of_seed, bins, rule).values()) for of_seed in method] for method in (a, b)]  # [2][K][4]
    of_seeds = torch.tensor(metrics, dtype=torch.float64).diff(dim=0)[0]
    k, n, share = len(a), len(a[0][1]), (1 + level) / 2
    square = torch.zeros(len(METRICS), dtype=torch.float64)  # of half the interval
    if k > 1:
        square += student_quantile(share, k - 1) ** 2 * of_seeds.var(dim=0) / k
    if all(torch.equal(labels, a[0][1]) for _, labels in a):
        before, moved = generator.get_state(), torch.zeros((), dtype=torch.float64, device=generator.device)
        for pair in zip(a, b):
            generator.set_state(before)  # so that every seed gets the same rows
            columns = torch.stack([_columns(*method, bins, rule) for method in pair], dim=1).to(generator.device)
            moved = moved + _differences(columns, replicates, generator) / k
        square += student_quantile(share, n - 1) ** 2 * moved.var(dim=0).cpu() * n / (n - 1) if n > 1 else torch.inf

    mean, half = of_seeds.mean(dim=0), square.sqrt()
    means, lows, highs = (_rounded(values).tolist() for values in (mean, mean - half, mean + half))
    return {name: Difference(means[i], lows[i], highs[i], level, replicates) for i, name in enumerate(METRICS)}


def student_quantile(share: float, freedom: int) -> float:
    """Return the number that a share of Student's distribution lies below.

    With x = √ν tan θ its density is proportional to cos^(ν − 1) θ, which is summed over a grid of θ.

    Args:
        share: from 0.5, below 1.
        freedom: degrees of freedom ν, at least 1; above 10,000 it is taken for the normal distribution.

    Example:
        >>> [round(student_quantile(0.975, freedom), 2) for freedom in (1, 2, 4, 1000)]
        [12.71, 4.3, 2.78, 1.96]
    """
    if freedom > 10_000:
        return math.sqrt(2) * torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.float64)).item()
    angles = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64)
    below = torch.cumulative_trapezoid(angles.cos() ** (freedom - 1), angles)
    wanted = (2 * share - 1) * below[-1]
    after = int(torch.searchsorted(below, wanted))
    before = below[after - 1] if after else 0.0
    angle = angles[after] + (wanted - before) / (below[after] - before) * (angles[1] - angles[0])
    return math.sqrt(freedom) * math.tan(angle)


def standard_errors(
    probs: Tensor, labels: Tensor, *, bins: int = 10, replicates: int = 1000, generator: torch.Generator
) -> dict[str, float]:
    """Return the bootstrap standard error of accuracy, nll, ece and brier of one model: how far other rows move them.

    Each replicate draws N of the N rows with replacement; the error is the standard deviation of their metrics. What
    another seed of training would change is not in it.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).
        bins: number of equal-width bins (lo, hi] of the ECE.
        replicates: how many times to draw, at least 2.
        generator: where the draws come from; the same state gives the same errors.

    Raises:
        MetricError: `replicates` is out of range; as `evaluate`.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1]]).expand(100, 2)
        >>> labels = torch.tensor([0] * 80 + [1] * 20)
        >>> errors = standard_errors(probs, labels, generator=torch.Generator().manual_seed(0))
        >>> round(errors["accuracy"], 2)  # √(0.8 · 0.2 / 100)
        0.04

    References:
        Efron, Bootstrap methods: another look at the jackknife, 1979.
    """
    _check_replicates(replicates)
    columns = _columns(probs, labels, bins)
    both = torch.stack([torch.zeros_like(columns), columns], dim=1).to(
        generator.device
    )  # of nothing, all metrics are 0
    spread = _differences(both, replicates, generator).std(dim=0).tolist()
    return dict(zip(METRICS, spread))


def _columns(probs: Tensor, labels: Tensor, bins: int, rule: Rule = "right") -> Tensor:
    """Return (N, 3 + bins) numbers whose means over rows are all that the metrics need.

    They are accuracy, nll and Brier score of each row and, in the column of its bin, accuracy - confidence.
    """
    rows = by_row(probs, labels)
    gap = rows.right.double() - rows.confidence.double()
    gaps = gap.new_zeros(len(gap), bins).scatter_(1, bin_of(rows.confidence, bins, rule)[:, None], gap[:, None])
    return torch.cat([torch.stack([rows.right.double(), rows.nll, rows.brier], dim=1), gaps], dim=1)


def _differences(columns: Tensor, draws: int, generator: torch.Generator) -> Tensor:  # (N, 2, 3 + bins) -> (draws, 4)
    """Draw N rows `draws` times and return the metrics of the second method less those of the first."""
    n = len(columns)
    size = max(1, BYTES // (16 * n))
    means = columns.new_empty(draws, *columns.shape[1:])
    for part in means.split(size):
        rows = torch.randint(n, (len(part), n), generator=generator, device=generator.device)
        counts = columns.new_zeros(rows.shape).scatter_add_(1, rows, columns.new_ones(()).expand_as(rows))
        part[:] = (counts @ columns.flatten(1) / n).view_as(part)
    accuracy, nll, brier = means[..., :3].unbind(-1)
    ece = means[..., 3:].abs().sum(dim=-1)
    return torch.stack([accuracy, nll, ece, brier], dim=-1).diff(dim=1)[:, 0]


def _rounded(values: Tensor) -> Tensor:
    return values.round(decimals=12) + 0.0  # + 0.0: no negative zero


def _check_replicates(replicates: int) -> None:
    if isinstance(replicates, bool) or not isinstance(replicates, int) or replicates < 2:
        raise MetricError(f"Expected `replicates` to be a whole number >= 2, but got {replicates!r}. Pass 1000.")


def _check(
    a: Sequence[tuple[Tensor, Tensor]], b: Sequence[tuple[Tensor, Tensor]], level: float, replicates: int
) -> None:
    if not 0 < level < 1:
        raise MetricError(f"Expected `level` to be between 0 and 1, but got {level!r}. Pass level=0.95.")
    _check_replicates(replicates)
    if len(a) != len(b) or not a:
        raise MetricError(
            "Expected `a` and `b` to hold the same seeds in the same order, at least one, "
            f"but got {len(a)} and {len(b)}. Leave out the seeds that only one of them has."
        )
    for seed, ((_, of_a), (_, of_b)) in enumerate(zip(a, b)):
        if of_a.shape != of_b.shape or not torch.equal(of_a, of_b):
            found = f"{len(of_a)} and {len(of_b)} rows" if of_a.shape != of_b.shape else "labels that differ"
            raise MetricError(
                f"Expected `a` and `b` to hold the same rows in the same order, but for seed {seed} (by position) got "
                f"{found}. Evaluate both on the same rows, or keep those that both have, sorted by id."
            )
