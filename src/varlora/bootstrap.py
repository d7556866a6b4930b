"""Is one method better than another, or is it noise? Differences of metrics, with bootstrap intervals.

Both methods saw the same seeds and the same rows, so that what makes a seed or a row easy is easy for both and cancels
in the difference. Each replicate draws seeds and rows with replacement, the same ones for both methods, and the spread
of the replicates' differences says how far other seeds and other rows would have moved the result (Efron 1979; of seeds
and rows at once, Owen 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varlora.metrics import MetricError, bin_of, by_row, evaluate

__all__ = ["Difference", "paired_differences", "standard_errors"]

METRICS = ("accuracy", "nll", "ece", "brier")  # in the order of `evaluate`
BYTES = 100_000_000  # of drawn rows and their counts at a time


@dataclass(frozen=True)
class Difference:
    """By how much a metric of the second method is larger, and between which numbers that may as well have been."""

    mean: float
    """On the data itself: the mean over seeds of b − a."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    level: float
    """Share of the replicates within the interval; as many lie below as above."""
    replicates: int
    """How many times seeds and rows were drawn."""

    @property
    def noise(self) -> bool:
        """Whether the interval contains 0: other seeds and rows may well give no difference, or the opposite one."""
        return self.low <= 0 <= self.high


def paired_differences(
    a: Sequence[tuple[Tensor, Tensor]],
    b: Sequence[tuple[Tensor, Tensor]],
    *,
    bins: int = 10,
    level: float = 0.95,
    replicates: int = 1000,
    generator: torch.Generator,
) -> dict[str, Difference]:
    r"""Return the difference b − a of accuracy, nll, ece and brier, each with a percentile bootstrap interval.

    .. math:: \Delta = \frac{1}{K} \sum_{k=1}^{K} \left[ m(b_{s_k}, w_k) - m(a_{s_k}, w_k) \right]

    A replicate draws K of the K seeds s with replacement and, for each of these, N of its N rows (w counts how often
    each was drawn); m is the metric of the drawn rows. If all seeds were evaluated on the same rows, then these are
    drawn once for each replicate and all its seeds: a hard row is hard in every run, and rows drawn anew for each seed
    would average out what is the same in all of them. Rows are taken for the same if they are as many and have equal
    labels; otherwise each drawn seed draws its own.

    What it does not say:

    - With a single seed only rows are drawn, so the interval is that of other rows, not of other seeds.
    - With few seeds it is too narrow: the variance between seeds is on average (K - 1) / K of the true one.
    - With several seeds, what is neither of the seed nor of the row, but chance in each cell of seed and row, is in the
      spread of both and counted more than once: were it all there is, the interval would be too wide by a factor of
      nearly √3 with shared rows (Owen 2007), and √2 otherwise.
    - The ECE of drawn rows is on average larger than that of the data, because drawing adds noise to every bin. In the
      difference of two methods most of this cancels, but not all.

    Memory: about 100 MB of drawn rows, however many there are, and 16 (3 + bins) bytes for each row of one seed.

    Args:
        a: the first method's `(probs (N, C), labels (N,))` of each seed; N may differ between seeds.
        b: the second method's, of the same seeds and rows in the same order.
        bins: number of equal-width bins (lo, hi] of the ECE.
        level: share of the replicates that the interval holds, between 0 and 1.
        replicates: how many times to draw.
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
        Efron, Bootstrap methods: another look at the jackknife, 1979; Owen, The pigeonhole bootstrap, 2007.
    """
    _check(a, b, level, replicates)
    actual = [[list(evaluate(*of_seed, bins).values()) for of_seed in method] for method in (a, b)]  # [2][K][4]
    same_rows = all(torch.equal(labels, a[0][1]) for _, labels in a)

    seeds = torch.randint(len(a), (replicates, len(a)), generator=generator, device=generator.device)
    before_rows = generator.get_state()
    drawn = torch.empty(*seeds.shape, len(METRICS), dtype=torch.float64, device=generator.device)
    for seed, pair in enumerate(zip(a, b)):
        here = seeds == seed
        columns = torch.stack([_columns(*method, bins) for method in pair], dim=1).to(generator.device)
        if same_rows:
            generator.set_state(before_rows)  # so that every seed gets the same rows
            drawn[here] = _differences(columns, replicates, generator)[here.nonzero()[:, 0]]
        else:
            drawn[here] = _differences(columns, int(here.sum()), generator)

    tail = (1 - level) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64, device=drawn.device)
    low, high = _rounded(drawn.mean(dim=1)).quantile(ends, dim=0).tolist()
    mean = _rounded(torch.tensor(actual, dtype=torch.float64).diff(dim=0).mean(dim=(0, 1))).tolist()
    return {name: Difference(mean[i], low[i], high[i], level, replicates) for i, name in enumerate(METRICS)}


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
    if isinstance(replicates, bool) or not isinstance(replicates, int) or replicates < 2:
        raise MetricError(f"Expected `replicates` to be a whole number >= 2, but got {replicates!r}. Pass 1000.")
    columns = _columns(probs, labels, bins)
    both = torch.stack([torch.zeros_like(columns), columns], dim=1).to(
        generator.device
    )  # of nothing, all metrics are 0
    spread = _differences(both, replicates, generator).std(dim=0).tolist()
    return dict(zip(METRICS, spread))


def _columns(probs: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Return (N, 3 + bins) numbers whose means over rows are all that the metrics need.

    They are accuracy, nll and Brier score of each row and, in the column of its bin, accuracy - confidence.
    """
    rows = by_row(probs, labels)
    gap = rows.right.double() - rows.confidence.double()
    gaps = gap.new_zeros(len(gap), bins).scatter_(1, bin_of(rows.confidence, bins)[:, None], gap[:, None])
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


def _check(
    a: Sequence[tuple[Tensor, Tensor]], b: Sequence[tuple[Tensor, Tensor]], level: float, replicates: int
) -> None:
    if not 0 < level < 1:
        raise MetricError(f"Expected `level` to be between 0 and 1, but got {level!r}. Pass level=0.95.")
    if isinstance(replicates, bool) or not isinstance(replicates, int) or replicates < 1:
        raise MetricError(f"Expected `replicates` to be a whole number >= 1, but got {replicates!r}. Pass 1000.")
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
