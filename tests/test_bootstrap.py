"""Paired intervals: against a slow twin, the variances that theory gives, and data whose difference is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from varlora import bootstrap
from varlora.bootstrap import Difference, paired_differences, standard_errors, student_quantile
from varlora.metrics import MetricError, by_row, evaluate

Runs = list[tuple[Tensor, Tensor]]
NAMES = ["accuracy", "nll", "ece", "brier"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def methods(seed: int, sizes: list[int], same_rows: bool) -> tuple[Runs, Runs]:
    """Two methods, the second a little better, with coarse probabilities, so that ties and borders occur."""
    source = generator(seed)
    labels = [torch.randint(3, (n,), generator=source) for n in sizes]
    if same_rows:
        labels = [labels[0]] * len(sizes)

    def run(y: Tensor, bonus: int) -> tuple[Tensor, Tensor]:
        weights = torch.randint(1, 6, (len(y), 3), generator=source).double()
        weights[torch.arange(len(y)), y] += bonus
        return weights / weights.sum(1, keepdim=True), y

    return [run(y, 2) for y in labels], [run(y, 3) for y in labels]


def answers(right: Tensor) -> Runs:
    """Runs (K, N) of two classes, sure of the label, which is 0, where `right`, and of the other class elsewhere."""
    labels = torch.zeros(right.shape[1], dtype=torch.int64)
    return [(torch.stack([row, 1 - row], dim=1), labels) for row in right.double()]


def slow_twin(a: Runs, b: Runs, bins: int, level: float, replicates: int, source: torch.Generator, same_rows: bool):
    """Each metric is computed from the drawn rows, one replicate and seed after the other; ends as (4, 2)."""

    def difference(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor], rows: Tensor) -> np.ndarray:
        there, here = (evaluate(probs[rows], labels[rows], bins) for probs, labels in (x, y))
        return np.array([here[name] - there[name] for name in NAMES])

    k, n = len(a), len(a[0][1])
    whole = np.array([difference(x, y, torch.arange(len(x[1]))) for x, y in zip(a, b)])
    of_seeds = whole.var(axis=0, ddof=1) / k if k > 1 else np.zeros(4)
    of_rows = np.zeros(4)
    if same_rows:
        drawn = torch.randint(n, (replicates, n), generator=source)
        moved = [np.mean([difference(x, y, rows) for x, y in zip(a, b)], axis=0) for rows in drawn]
        of_rows = np.var(moved, axis=0, ddof=1) * n / (n - 1)
    ends = []
    for mean, s, r in zip(whole.mean(axis=0), of_seeds, of_rows):
        halves = [stats.t.ppf((1 + level) / 2, k - 1) * math.sqrt(s) if k > 1 else 0]
        halves += [stats.t.ppf((1 + level) / 2, n - 1) * math.sqrt(r)]
        ends.append((mean - math.hypot(*halves), mean + math.hypot(*halves)))
    return np.array(ends)


@pytest.mark.parametrize(
    ("sizes", "same_rows"), [([23], True), ([23, 23, 23], True), ([23, 23, 23], False), ([9, 30, 17], False)]
)
@pytest.mark.parametrize(("bins", "level"), [(10, 0.95), (3, 0.5)])
def test_agrees_with_the_slow_twin(sizes, same_rows, bins, level):
    a, b = methods(0, sizes, same_rows)
    found = paired_differences(a, b, bins=bins, level=level, replicates=50, generator=generator(1))
    low, high = slow_twin(a, b, bins, level, 50, generator(1), same_rows).T
    assert list(found) == NAMES
    assert [difference.low for difference in found.values()] == pytest.approx(low, rel=1e-4, abs=1e-7)
    assert [difference.high for difference in found.values()] == pytest.approx(high, rel=1e-4, abs=1e-7)
    for name, difference in found.items():
        mean = np.mean([evaluate(*y, bins)[name] - evaluate(*x, bins)[name] for x, y in zip(a, b)])
        assert difference.mean == pytest.approx(mean, abs=1e-11)
        assert (difference.level, difference.replicates) == (level, 50)


def test_students_quantiles_are_those_of_scipy():
    for freedom in (1, 2, 4, 30, 999, 9_999, 100_000):
        for share in (0.5, 0.75, 0.975, 0.9999):
            expected = stats.t.ppf(share, freedom)
            assert student_quantile(share, freedom) == pytest.approx(expected, rel=5e-4, abs=1e-12)


@pytest.mark.parametrize("same_rows", [True, False])
def test_draws_do_not_depend_on_how_much_is_drawn_at_a_time(same_rows, monkeypatch):
    a, b = methods(2, [40, 40], same_rows)
    whole = paired_differences(a, b, replicates=100, generator=generator(0))
    monkeypatch.setattr(bootstrap, "BYTES", 7 * 16 * 40)  # 7 draws
    parts = paired_differences(a, b, replicates=100, generator=generator(0))
    for name in NAMES:
        assert (parts[name].low, parts[name].high) == pytest.approx((whole[name].low, whole[name].high), abs=1e-11)


def test_the_generator_decides():
    a, b = methods(3, [50, 50], True)
    first, again, other = (paired_differences(a, b, replicates=100, generator=generator(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


# --- the width, from theory


def variance(difference: Difference, freedom: int) -> float:
    """The variance of the difference, from its interval of level 0.95."""
    return float(((difference.high - difference.low) / (2 * stats.t.ppf(0.975, freedom))) ** 2)


def by_cell(a: Runs, b: Runs) -> list[Tensor]:
    """The difference in NLL of each row, seed by seed."""
    return [by_row(*y).nll - by_row(*x).nll for x, y in zip(a, b)]


def test_width_of_one_seed_is_the_standard_error_over_rows():
    a, b = methods(4, [300], True)
    (cells,) = by_cell(a, b)
    found = paired_differences(a, b, replicates=20_000, generator=generator(0))["nll"]
    assert variance(found, 299) == pytest.approx(cells.var().item() / 300, rel=0.08)


def test_width_with_the_same_rows_is_that_of_seeds_and_that_of_rows():
    source = generator(5)
    k, n = 6, 80
    seed, row = 0.15 * torch.randn(k, 1, generator=source), 0.8 * torch.randn(1, n, generator=source)
    z = 0.3 + (seed + row + 0.3 * torch.randn(k, n, generator=source)).double()
    labels = torch.zeros(n, dtype=torch.int64)
    a = [(torch.full((n, 2), 0.5, dtype=torch.float64), labels)] * k
    b = [(torch.stack([r.sigmoid(), (-r).sigmoid()], dim=1), labels) for r in z]
    cells = torch.stack(by_cell(a, b))
    parts = [cells.mean(1).var().item() / k, cells.mean(0).var().item() / n]
    assert min(parts) > 0.1 * sum(parts)  # neither is negligible here
    found = paired_differences(a, b, replicates=20_000, generator=generator(0))["nll"]
    expected = parts[0] * stats.t.ppf(0.975, k - 1) ** 2 + parts[1] * stats.t.ppf(0.975, n - 1) ** 2
    assert ((found.high - found.low) / 2) ** 2 == pytest.approx(expected, rel=0.08)


def test_width_with_rows_of_their_own_is_that_of_a_mean_over_seeds():
    a, b = methods(6, [60, 90, 120, 75], False)
    of_seeds = torch.stack([cells.mean() for cells in by_cell(a, b)])
    found = paired_differences(a, b, replicates=2, generator=generator(0))["nll"]
    ends = stats.t.interval(0.95, 3, of_seeds.mean(), of_seeds.std() / 2)
    assert (found.low, found.high) == pytest.approx(ends, rel=1e-4)


@pytest.mark.parametrize(("same_rows", "factor"), [(True, 2), (False, 1)])
def test_pure_chance_in_every_cell_is_counted_twice_with_the_same_rows(same_rows, factor):
    """Where neither a seed nor a row has an effect, as the docstring says."""
    source, k, n = generator(11), 40, 50
    found = []
    for _ in range(20):
        right = torch.rand(2, k, n, generator=source) < 0.5
        a, b = answers(right[0]), answers(right[1])
        if not same_rows:  # one label tells the seeds' rows apart
            a, b = ([(p.roll(i % 2, 1), (y + i) % 2) for i, (p, y) in enumerate(runs)] for runs in (a, b))
        found.append(variance(paired_differences(a, b, generator=source)["accuracy"], 39))
    truth = 2 * 0.25 / (k * n)
    assert np.mean(found) / truth == pytest.approx(factor, rel=0.15)


@pytest.mark.parametrize(("k", "spread"), [(1, 0.0), (2, 0.0), (2, 0.1), (3, 0.1), (3, 0.3), (8, 0.1)])
def test_the_interval_covers_a_known_difference(k, spread):
    """P(right) is 0.55 and 0.65 on average; a row is as hard in nine of ten seeds, and seeds differ by up to `spread`.

    What is counted twice makes it somewhat too wide.
    """
    source, n, sets = generator(7), 100, 150
    covered = 0
    for _ in range(sets):
        hard = torch.rand(2, 1, n, generator=source).expand(2, k, n)
        hard = torch.where(torch.rand(2, k, n, generator=source) < 0.9, hard, torch.rand(2, k, n, generator=source))
        seed = spread * (2 * torch.rand(2, k, 1, generator=source) - 1)
        right = hard < torch.tensor([0.55, 0.65])[:, None, None] + seed
        found = paired_differences(answers(right[0]), answers(right[1]), replicates=60, generator=source)["accuracy"]
        covered += found.low <= 0.1 <= found.high
    assert covered / sets >= 0.92
    assert k > 1 or covered / sets <= 0.99  # of one seed nothing is counted twice


@pytest.mark.parametrize("k", [2, 3, 5])
def test_seeds_that_differ_by_chance_alone_seldom_count_as_a_difference(k):
    """Of methods that are the same, whose seeds differ, one comparison in twenty is to be called better or worse."""
    source, sets = generator(13), 150
    wrong = 0
    for _ in range(sets):
        rows = torch.rand(2, k, 100, generator=source) < 0.6 + 0.1 * torch.randn(2, k, 1, generator=source)
        found = paired_differences(answers(rows[0]), answers(rows[1]), replicates=50, generator=source)["accuracy"]
        wrong += not found.noise
    assert wrong / sets < 0.08


def test_standard_errors_of_one_bin_are_those_of_means_over_rows():
    """Of too sure a model in one bin, the ECE is the mean of confidence - accuracy; more bins give another one."""
    confidence = torch.tensor([0.55, 0.95], dtype=torch.float64).repeat(150)
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    labels = (torch.arange(300) % 2) | (torch.arange(300) % 3 == 0).long()  # those of 0.95 are all wrong
    rows = by_row(probs, labels)
    found = standard_errors(probs, labels, bins=1, replicates=20_000, generator=generator(0))
    columns = [rows.right.double(), rows.nll, confidence - rows.right.double(), rows.brier]
    assert list(found) == NAMES
    expected = [column.std(correction=0).item() / math.sqrt(300) for column in columns]
    assert list(found.values()) == pytest.approx(expected, rel=0.04)


# --- edges


@pytest.mark.parametrize("same_rows", [True, False])
def test_a_method_against_itself_is_exactly_zero(same_rows):
    a, _ = methods(8, [31, 31, 31], same_rows)
    for difference in paired_differences(a, a, replicates=200, generator=generator(0)).values():
        assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)
        assert difference.noise


def test_swapping_the_methods_changes_the_sign():
    a, b = methods(9, [40, 30], False)
    there, back = (paired_differences(x, y, replicates=200, generator=generator(0)) for x, y in ((a, b), (b, a)))
    for name in NAMES:
        expected = (-back[name].mean, -back[name].high, -back[name].low)
        assert (there[name].mean, there[name].low, there[name].high) == pytest.approx(expected, abs=1e-11)


def test_one_row_says_nothing_of_others():
    a, b = methods(10, [1, 1], True)
    found = paired_differences(a, b, generator=generator(0))["nll"]
    assert math.isfinite(found.mean)
    assert (found.low, found.high, found.noise) == (-math.inf, math.inf, True)


@pytest.mark.parametrize(
    ("low", "high", "noise"), [(-1.0, 1.0, True), (0.0, 1.0, True), (-1.0, 0.0, True), (0.1, 1.0, False)]
)
def test_noise_is_an_interval_that_holds_zero(low, high, noise):
    assert Difference(0.5, low, high, 0.95, 1000).noise is noise


# --- wrong input


def test_unpaired_methods_are_refused():
    a, b = methods(0, [5, 5], True)
    cases = [
        (a, b[:1], "2 and 1. Leave out the seeds"),
        ([], [], "at least one, but got 0 and 0"),
        (a, [b[0], (b[1][0][:4], b[1][1][:4])], "for seed 1 .* 5 and 4 rows"),
        (a, [(b[0][0], (b[0][1] + 1) % 3), b[1]], "for seed 0 .* labels that differ"),
    ]
    for x, y, says in cases:
        with pytest.raises(MetricError, match=says):
            paired_differences(x, y, generator=generator(0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 95}, "`level`"),
        ({"level": 0.0}, "`level`"),
        ({"replicates": 1}, "`replicates`"),
        ({"replicates": 1e3}, "`replicates`"),
        ({"bins": 0}, "`bins`"),
    ],
)
def test_wrong_numbers_are_refused(options, says):
    a, b = methods(0, [5], True)
    with pytest.raises(MetricError, match=says):
        paired_differences(a, b, generator=generator(0), **options)


def test_rows_that_are_no_probabilities_are_refused():
    a, b = methods(0, [5], True)
    with pytest.raises(MetricError, match="logits"):
        paired_differences(a, [(7 * b[0][0], b[0][1])], generator=generator(0))


@pytest.mark.parametrize("rule", ["right", "left"])
def test_the_rule_of_the_bins_is_that_of_the_difference_and_of_its_width(rule):
    """Many rows have a confidence on the border of two bins."""
    a, b = methods(0, [40], True)
    of_rule, of_other = (
        paired_differences(a, b, bins=3, rule=one, replicates=50, generator=generator(1))["ece"]
        for one in (rule, "left" if rule == "right" else "right")
    )
    mean = evaluate(*b[0], 3, rule)["ece"] - evaluate(*a[0], 3, rule)["ece"]
    assert of_rule.mean == pytest.approx(mean, abs=1e-11)
    assert of_rule.mean != of_other.mean
    assert of_rule.high - of_rule.low != pytest.approx(of_other.high - of_other.low, rel=1e-3)
