"""Metrics of class probabilities: accuracy, likelihood, calibration, Brier score, selective prediction, uncertainties.

Everything here takes probabilities `probs: (N, C)`, rows sum to 1, and `labels: (N,)`, integers in [0, C). Classes that
a row does not have (fewer answers than C) carry probability 0. Logits become probabilities by `average_probs`, which is
called by name: no metric applies a softmax of its own accord. Sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from varlora.errors import VarloraError, did_you_mean

__all__ = [
    "MetricError",
    "Reliability",
    "RiskCoverage",
    "Rows",
    "Rule",
    "Uncertainty",
    "accuracy",
    "auroc",
    "average_probs",
    "bin_of",
    "brier",
    "by_row",
    "ece",
    "ece_if_calibrated",
    "evaluate",
    "evaluate_all",
    "nll",
    "reliability",
    "risk_coverage",
    "standard_error",
    "uncertainty",
]

Rule = Literal["right", "left", "adaptive"]
RULES: dict[Rule, str] = {"right": "(lo, hi]", "left": "[lo, hi)", "adaptive": "of equal mass"}
"""What the rules of bins are called beside a figure."""
NORMAL = 500.0
"""Variance from which on the number of a bin's right rows is taken to be normal; 2000 rows have that at the most."""


class MetricError(VarloraError):
    """Probabilities, labels or logits that a metric cannot be computed from."""


class Rows(NamedTuple):
    """What each row says by itself; accuracy, nll and brier are means of it."""

    right: Tensor  # (N,) bool, the most probable class is the label
    confidence: Tensor  # (N,) in the type of the probabilities, the largest of them
    nll: Tensor  # (N,) float64
    brier: Tensor  # (N,) float64


@dataclass(frozen=True, eq=False)
class Reliability:
    """What a reliability diagram shows, bin by bin; in an empty bin confidence and accuracy are NaN."""

    confidence: Tensor  # (bins,) float64, mean of the largest probability
    accuracy: Tensor  # (bins,) float64, share of rows that are right
    count: Tensor  # (bins,) int64, rows
    rule: Rule = "right"  # which bin a row goes to; see `bin_of`

    @property
    def bins(self) -> dict[str, Any]:
        """Number and rule of the bins, as the functions here take them."""
        return {"bins": len(self.count), "rule": self.rule}

    @property
    def described(self) -> str:
        """The bins in words, such as `10 bins (lo, hi]`."""
        return f"{len(self.count)} bins {RULES[self.rule]}"


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """What is gained by answering only where the model is sure: the error rate among the k most confident rows."""

    coverage: Tensor  # (N,) float64, k / N for k = 1, ..., N
    risk: Tensor  # (N,) float64, share of the k rows that is wrong
    auroc: float  # how well confidence separates right answers from wrong ones; NaN if there is only one kind

    @property
    def aurc(self) -> float:
        """Area under the curve, the mean of the risks: 0 if all answers are right, 1 if all are wrong."""
        return self.risk.mean().item()


class Uncertainty(NamedTuple):
    """Uncertainties of each row in nats; total = aleatoric + epistemic."""

    total: Tensor  # (N,) float64, entropy of the averaged probabilities
    aleatoric: Tensor  # (N,) float64, average entropy of the draws
    epistemic: Tensor  # (N,) float64, mutual information of answer and draw, >= 0


def by_row(probs: Tensor, labels: Tensor) -> Rows:
    """Return for each row whether it is right, its confidence, its nll and its Brier score.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).

    Raises:
        MetricError: wrong shapes, labels out of range, rows that are no probabilities, or no rows.

    Example:
        >>> by_row(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1])).brier.tolist()
        [0.0, 0.5]
    """
    _check(probs, labels)
    confidence, predicted = probs.max(dim=1)
    chosen = probs.double().gather(1, labels.long()[:, None])[:, 0]
    truth = torch.nn.functional.one_hot(labels.long(), probs.shape[1])
    return Rows(
        right=predicted == labels,
        confidence=confidence.clamp_max(1.0),  # rounding may leave 1 + 1e-7
        nll=0.0 - chosen.clamp(torch.finfo(torch.float64).tiny, 1.0).log(),  # 0.0 -: no negative zero
        brier=(probs.double() - truth).square().sum(dim=1),
    )


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Return the share of rows whose most probable class is the label; of equal classes the first counts.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).

    Raises:
        MetricError: wrong shapes, labels out of range, rows that are no probabilities, or no rows.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        0.5
    """
    return by_row(probs, labels).right.double().mean().item()


def nll(probs: Tensor, labels: Tensor) -> float:
    """Return the mean negative natural logarithm of the label's probability.

    A probability below the smallest normal float64 (2.2e-308) counts as that number, so that a label of probability 0
    costs 708.4 nats rather than infinity.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).

    Raises:
        MetricError: wrong shapes, labels out of range, rows that are no probabilities, or no rows.

    Example:
        >>> round(nll(torch.tensor([[0.5, 0.5]]), torch.tensor([0])), 4)  # log 2
        0.6931
    """
    return by_row(probs, labels).nll.mean().item()


def brier(probs: Tensor, labels: Tensor) -> float:
    """Return the Brier score: squared errors summed over classes, averaged over rows; from 0 (best) to 2.

    A class of probability 0 that is not the label adds nothing, so classes that a row does not have do not matter.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).

    Raises:
        MetricError: wrong shapes, labels out of range, rows that are no probabilities, or no rows.

    Example:
        >>> brier(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([0]))  # 0.25 + 0.25
        0.5
    """
    return by_row(probs, labels).brier.mean().item()


def bin_of(confidence: Tensor, bins: int = 10, rule: Rule = "right") -> Tensor:
    """Return the bin that each row is in, (N,) int64 in [0, bins).

    - `right`: equal-width bins (lo, hi], as in the IVON-LoRA paper's code; confidence 1 is in the last.
    - `left`: equal-width bins [lo, hi), confidence 1 in the last.
    - `adaptive`: bins of equal mass. The row with r rows of smaller confidence is in bin floor(r * bins / N), so equal
      confidences share a bin and the order of rows does not matter.

    Borders are k / bins rounded to the type of `confidence`: a float32 0.3 lies on the border 0.3.

    Args:
        confidence: (N,), each row's largest probability.
        bins: number of bins, at least 1.
        rule: "right", "left" or "adaptive".

    Raises:
        MetricError: bins or rule unknown.

    Example:
        >>> confidence = torch.tensor([0.8, 0.9, 1.0])
        >>> bin_of(confidence).tolist(), bin_of(confidence, rule="left").tolist()
        ([7, 8, 9], [8, 9, 9])
    """
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise MetricError(f"Expected `bins` to be a whole number of bins >= 1, but got {bins!r}. Pass bins=10.")
    if rule == "adaptive":
        rank = torch.searchsorted(confidence.sort().values, confidence)
        return rank * bins // len(confidence)
    if rule in ("right", "left"):
        borders = (torch.arange(bins + 1, dtype=torch.float64) / bins).to(confidence)
        return (torch.bucketize(confidence, borders, right=rule == "left") - 1).clamp(0, bins - 1)
    raise MetricError(
        f"Expected `rule` to be a rule of bins, but got {rule!r}. {did_you_mean(str(rule), get_args(Rule))}"
    )


def reliability(probs: Tensor, labels: Tensor, bins: int = 10, rule: Rule = "right") -> Reliability:
    """Return mean confidence, accuracy and number of rows of each bin of confidence.

    A row's confidence is its largest probability. The rules differ in the bin that a row goes to; see `bin_of`.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).
        bins: number of bins, at least 1.
        rule: "right", "left" or "adaptive".

    Raises:
        MetricError: wrong shapes, labels out of range, rows that are no probabilities, no rows, bins or rule unknown.

    Example:
        >>> reliability(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 0]), bins=2).count.tolist()
        [0, 2]
    """
    rows = by_row(probs, labels)
    index = bin_of(rows.confidence, bins, rule)

    def total(values: Tensor) -> Tensor:  # (N,) -> (bins,)
        return torch.zeros(bins, dtype=torch.float64, device=probs.device).index_add_(0, index, values.double())

    count = torch.bincount(index, minlength=bins)
    return Reliability(total(rows.confidence) / count, total(rows.right) / count, count, rule)


def ece(probs: Tensor, labels: Tensor, bins: int = 10, rule: Rule = "right") -> float:
    r"""Return the expected calibration error, from 0 to 1.

    .. math:: \text{ECE} = \sum_b \frac{n_b}{N} \, |\text{accuracy}_b - \text{confidence}_b|

    It is not one number: it depends on bins and rule, which belong beside each figure. The default is that of the
    IVON-LoRA paper's code, 10 equal-width bins (lo, hi].

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).
        bins: number of bins, at least 1.
        rule: "right" (lo, hi], "left" [lo, hi) or "adaptive" (equal mass); see `bin_of`.

    Raises:
        MetricError: as `reliability`.

    Example:
        >>> round(ece(torch.tensor([[0.8, 0.2], [0.4, 0.6]]), torch.tensor([0, 0])), 4)  # (0.2 + 0.6) / 2
        0.4

    References:
        Guo et al., On calibration of modern neural networks, 2017; Nixon et al., Measuring calibration in deep
        learning, 2019 (adaptive bins).
    """
    found = reliability(probs, labels, bins, rule)
    gaps = (found.accuracy - found.confidence).abs().nan_to_num(0.0)  # an empty bin has none
    return ((found.count * gaps).sum() / found.count.sum()).item()


def ece_if_calibrated(probs: Tensor, bins: int = 10, rule: Rule = "right") -> float:
    r"""Return the ECE that a perfectly calibrated model with these probabilities would show on average.

    It is not 0: of n rows that are right with probability c, not exactly n c are. An ECE near this number is as low as
    so many rows can show.

    .. math:: \frac{1}{N} \sum_b \mathbb{E} \, \Big| \sum_{i \in b} (x_i - c_i) \Big|,
        \quad x_i \sim \text{Bernoulli}(c_i)

    Args:
        probs: (N, C), rows sum to 1.
        bins: number of bins, at least 1.
        rule: "right", "left" or "adaptive"; see `bin_of`.

    Raises:
        MetricError: as `reliability`.

    Example:
        >>> ece_if_calibrated(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))  # 0, 1 or 2 are right, and 1 is expected
        0.25

    References:
        Bröcker and Smith, Increasing the reliability of reliability diagrams, 2007 (consistency resampling; here its
        expectation, exactly).
    """
    confidence = by_row(probs, torch.zeros(len(probs), dtype=torch.long, device=probs.device)).confidence
    index = bin_of(confidence, bins, rule)
    return sum(_deviation(confidence[index == one].double()) for one in range(bins)) / len(probs)


def _deviation(chances: Tensor) -> float:
    """Return the mean absolute deviation of the number of successes in trials of given chances, (n,).

    Of a variance above `NORMAL` it is that of a Gaussian, to a few in 10,000.
    """
    variance = (chances * (1 - chances)).sum().item()
    if variance > NORMAL:
        return math.sqrt(2 / math.pi * variance)
    # The distribution of that number has the coefficients of the product of 1 − c + c x, taken by pairs.
    chances = chances[(chances > 0) & (chances < 1)]  # the others deviate by nothing
    share = torch.stack([1 - chances, chances], 1) if len(chances) else chances.new_ones(1, 1)
    while len(share) > 1:
        if len(share) % 2:
            one = nn.functional.pad(torch.ones(1, 1).to(share), (0, share.shape[1] - 1))
            share = torch.cat([share, one])
        size = 2 * share.shape[1] - 1
        parts = torch.fft.rfft(share, size)
        share = torch.fft.irfft(parts[::2] * parts[1::2], size)
    return (share[0] * (torch.arange(share.shape[1]).to(share) - chances.sum()).abs()).sum().item()


def auroc(scores: Tensor, positives: Tensor) -> float:
    r"""Return the area under the ROC curve: how often a positive row has a larger score than a negative one.

    .. math:: P(s_+ > s_-) + \tfrac{1}{2} P(s_+ = s_-)

    over all pairs of a positive and a negative row; 1 separates them, 0.5 says nothing.

    Args:
        scores: (N,), larger where a row is thought to be positive; of any scale.
        positives: (N,) bool, with both kinds of rows.

    Raises:
        MetricError: wrong shapes or types, a score that is NaN, or rows of one kind only.

    Example:
        >>> auroc(torch.tensor([0.9, 0.6, 0.6, 0.1]), torch.tensor([True, True, False, False]))  # 3.5 of 4 pairs
        0.875

    References:
        Hanley and McNeil, The meaning and use of the area under a ROC curve, 1982.
    """
    if scores.ndim != 1 or scores.shape != positives.shape:
        raise MetricError(
            "Expected `scores` and `positives` of one shape (N,), "
            f"but got {tuple(scores.shape)} and {tuple(positives.shape)}."
        )
    if positives.dtype != torch.bool:
        raise MetricError(f"Expected `positives` to be bool, but got {positives.dtype}. Pass labels == 1.")
    if scores.isnan().any():
        raise MetricError("Expected `scores` to be numbers, but got NaN.")
    high, low = scores[positives].double(), scores[~positives].double().sort().values
    if not (len(high) and len(low)):
        raise MetricError(
            "Expected `positives` to hold rows of both kinds, "
            f"but got {len(high)} positive and {len(low)} negative ones. The AUROC is not defined there: leave it out."
        )
    below, up_to = (torch.searchsorted(low, high, right=right).sum().item() for right in (False, True))
    return (below + up_to) / (2 * len(high) * len(low))


def risk_coverage(probs: Tensor, labels: Tensor) -> RiskCoverage:
    r"""Return the error rate among the k most confident rows, for each k.

    .. math:: \text{risk}_k = \frac{1}{k} \sum_{i \le k} e_i, \qquad \text{AURC} = \frac{1}{N} \sum_k \text{risk}_k

    Rows are sorted by confidence, the largest probability, and e is 1 where the answer is wrong. Of rows of equal
    confidence each counts with their average e, which is what random orders among them give on average.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).

    Returns:
        The curve, the area under it (`aurc`), and the `auroc` of confidence, with right answers as the positives.

    Raises:
        MetricError: wrong shapes, labels out of range, rows that are no probabilities, or no rows.

    Example:
        >>> curve = risk_coverage(torch.tensor([[0.6, 0.4], [0.9, 0.1]]), torch.tensor([1, 0]))
        >>> curve.coverage.tolist(), curve.risk.tolist(), curve.aurc, curve.auroc
        ([0.5, 1.0], [0.0, 0.5], 0.25, 1.0)

    References:
        Geifman and El-Yaniv, Selective classification for deep neural networks, 2017; Geifman et al., Bias-reduced
        uncertainty estimation for deep neural classifiers, 2019 (AURC).
    """
    rows = by_row(probs, labels)
    n = len(rows.right)
    _, tie, size = (-rows.confidence).unique(return_inverse=True, return_counts=True)  # ties, the most confident first
    wrong = torch.zeros(len(size), dtype=torch.float64, device=probs.device).index_add_(0, tie, (~rows.right).double())
    k = torch.arange(1, n + 1, dtype=torch.float64, device=probs.device)
    risk = (wrong / size).repeat_interleave(size).cumsum(dim=0) / k
    both = 0 < rows.right.sum() < n
    return RiskCoverage(k / n, risk, auroc(rows.confidence, rows.right) if both else math.nan)


def finite_rows(logits: Tensor) -> Tensor:
    """Return which rows have numbers in all draws, (N,) bool: a base in float16 may overflow on some.

    Args:
        logits: (S, N, C), -inf where a row does not have the answer.

    Example:
        >>> finite_rows(torch.tensor([[[1.0, -math.inf], [math.inf, 0.0], [math.nan, 0.0], [-math.inf, -math.inf]]]))
        tensor([ True, False, False, False])
    """
    highest = logits.amax(2)  # NaN where one is
    return ((highest > -math.inf) & (highest < math.inf)).all(0)


def average_probs(logits: Tensor) -> Tensor:
    """Return the average over draws of the draws' probabilities: softmax, then mean; never the mean of logits.

    Args:
        logits: (S, N, C), S draws; -inf where a row does not have the class.

    Returns:
        Probabilities, (N, C) float64, exactly 0 at -inf.

    Raises:
        MetricError: wrong shape, NaN or +inf, or a row that is -inf throughout.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0]], [[100.0, 0.0]]])  # one row: unsure in one draw, sure in the other
        >>> average_probs(logits).tolist()
        [[0.75, 0.25]]
    """
    return _softmax(logits).mean(dim=0)


def uncertainty(logits: Tensor) -> Uncertainty:
    r"""Return total, aleatoric and epistemic uncertainty of each row, in nats.

    .. math:: H[\bar p] = \frac{1}{S} \sum_s H[p_s] + I, \qquad H[p] = -\sum_c p_c \log p_c

    The entropy of the averaged probabilities (total) is the draws' average entropy (aleatoric: they agree that it is
    open) plus the mutual information of answer and draw (epistemic: they disagree), which is at least 0. Of S draws it
    is on average some 1/S of itself too small, as their average is nearer to them than that of all would be: compare
    what was made of as many draws.

    Args:
        logits: (S, N, C), S draws; -inf where a row does not have the class.

    Returns:
        Three tensors (N,) float64.

    Raises:
        MetricError: wrong shape, NaN or +inf, or a row that is -inf throughout.

    Example:
        >>> agree = uncertainty(torch.zeros(2, 1, 2))
        >>> round(agree.total.item(), 4), agree.epistemic.item()
        (0.6931, 0.0)
        >>> disagree = uncertainty(torch.tensor([[[99.0, 0.0]], [[0.0, 99.0]]]))
        >>> round(disagree.total.item(), 4), round(disagree.epistemic.item(), 4)
        (0.6931, 0.6931)

    References:
        Depeweg et al., Decomposition of uncertainty in Bayesian deep learning, 2018.
    """
    draws = _softmax(logits)
    total = torch.special.entr(draws.mean(dim=0)).sum(dim=-1)
    aleatoric = torch.special.entr(draws).sum(dim=-1).mean(dim=0)
    return Uncertainty(total, aleatoric, (total - aleatoric).clamp_min(0.0))


def evaluate(probs: Tensor, labels: Tensor, bins: int = 10, rule: Rule = "right") -> dict[str, float]:
    """Return accuracy, nll, ece and brier by name.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).
        bins: number of bins of the ECE.
        rule: rule of the ECE's bins; see `bin_of`.

    Raises:
        MetricError: as `reliability`.

    Example:
        >>> evaluate(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        {'accuracy': 1.0, 'nll': 0.0, 'ece': 0.0, 'brier': 0.0}
    """
    return {
        "accuracy": accuracy(probs, labels),
        "nll": nll(probs, labels),
        "ece": ece(probs, labels, bins, rule),
        "brier": brier(probs, labels),
    }


def evaluate_all(probs: Tensor, labels: Tensor, bins: int = 10, rule: Rule = "right") -> dict[str, float]:
    """Return what `evaluate` does and more: how well confidence ranks the answers, and what the ECE is at the least.

    `ece_if_calibrated` is the ECE that perfect calibration would show on so many rows, `adaptive_ece` the ECE with bins
    of equal mass, `auroc` how well confidence separates right answers from wrong ones, and `aurc` the area under the
    risk-coverage curve. `auroc` is NaN where all answers are right or all are wrong; JSON has no NaN, so leave it out
    there.

    Args:
        probs: (N, C), rows sum to 1.
        labels: (N,) integers in [0, C).
        bins: number of bins of both ECEs.
        rule: rule of the first ECE's bins; see `bin_of`.

    Raises:
        MetricError: as `reliability`.

    Example:
        >>> values = evaluate_all(torch.tensor([[0.75, 0.25], [1.0, 0.0]]), torch.tensor([1, 0]))
        >>> values["adaptive_ece"], values["auroc"], values["aurc"]
        (0.375, 1.0, 0.25)
    """
    curve = risk_coverage(probs, labels)
    return {
        **evaluate(probs, labels, bins, rule),
        "ece_if_calibrated": ece_if_calibrated(probs, bins, rule),
        "adaptive_ece": ece(probs, labels, bins, "adaptive"),
        "auroc": curve.auroc,
        "aurc": curve.aurc,
    }


def standard_error(values: Sequence[float]) -> float:
    r"""Return the standard error of the mean, with the sample standard deviation (n - 1); NaN for one value.

    .. math:: \sqrt{\frac{1}{n (n - 1)} \sum_i (x_i - \bar x)^2}

    Args:
        values: one number for each seed.

    Raises:
        MetricError: no values, or one that is not finite.

    Example:
        >>> standard_error([1.0, 3.0])
        1.0
        >>> standard_error([1.0])
        nan
    """
    numbers = [float(value) for value in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise MetricError(f"Expected `values` to be one or more finite numbers, but got {numbers}.")
    n = len(numbers)
    if n == 1:
        return math.nan
    mean = math.fsum(numbers) / n
    return math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (n - 1) / n)


def _softmax(logits: Tensor) -> Tensor:  # (S, N, C) -> (S, N, C)
    if logits.ndim != 3 or 0 in logits.shape:
        raise MetricError(
            f"Expected `logits` to have shape (S, N, C) with none of them 0, but got {tuple(logits.shape)}. "
            "For a single draw pass logits[None]."
        )
    if logits.isnan().any() or logits.isposinf().any():
        raise MetricError(
            "Expected `logits` to be finite or -inf (no such class), but got NaN or +inf: the model overflows. With "
            "draws lower `tau`; else load the base in float32 or bfloat16."
        )
    empty = logits.isneginf().all(dim=-1).nonzero()
    if len(empty):
        raise MetricError(
            "Expected each row of `logits` to have a finite entry, but in draw {} row {} is -inf throughout.".format(
                *empty[0].tolist()
            )
        )
    return logits.double().softmax(dim=-1)


def _check(probs: Tensor, labels: Tensor) -> None:
    if probs.ndim != 2 or labels.ndim != 1 or len(probs) != len(labels):
        raise MetricError(
            "Expected `probs` of shape (N, C) and `labels` of shape (N,), "
            f"but got {tuple(probs.shape)} and {tuple(labels.shape)}."
        )
    if probs.numel() == 0:
        raise MetricError(f"Expected at least one row and one class, but got `probs` of shape {tuple(probs.shape)}.")
    if not probs.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise MetricError(
            "Expected `probs` to be floating-point and `labels` to be integers (int64), "
            f"but got {probs.dtype} and {labels.dtype}."
        )
    if not probs.isfinite().all():
        raise MetricError("Expected `probs` to be finite, but got NaN or infinity.")
    sums = probs.double().sum(dim=1)
    tolerance = max(1e-3, 4 * torch.finfo(probs.dtype).eps)  # probabilities read from text are rounded
    off = ((sums - 1).abs() > tolerance) | (probs < 0).any(dim=1)
    if off.any():
        row = int(off.nonzero()[0])
        raise MetricError(
            "Expected each row of `probs` to be probabilities that sum to 1, "
            f"but row {row} is {[round(p, 4) for p in probs[row].tolist()]} (sum {sums[row]:.4g}). "
            "If these are logits, pass average_probs(logits[None])."
        )
    outside = (labels < 0) | (labels.long() >= probs.shape[1])
    if outside.any():
        row = int(outside.nonzero()[0])
        raise MetricError(
            f"Expected `labels` to be in [0, {probs.shape[1]}), but label {row} is {int(labels[row])}. "
            "Leave rows without a known label (-1) out: known = labels >= 0."
        )
