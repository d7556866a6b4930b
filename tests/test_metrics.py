"""Each metric against an oracle that shares no code with it."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from varlora.errors import VarloraError
from varlora.metrics import (
    MetricError,
    accuracy,
    auroc,
    average_probs,
    brier,
    by_row,
    ece,
    ece_if_calibrated,
    evaluate,
    evaluate_all,
    nll,
    reliability,
    risk_coverage,
    standard_error,
    uncertainty,
)

RULES = ["right", "left", "adaptive"]
METRICS = [accuracy, nll, brier, ece, risk_coverage]


def random_rows(seed: int, n: int = 200, c: int = 4, dtype: torch.dtype = torch.float64, sharp: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(n, c, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits.softmax(1).to(dtype), labels


def ece_by_hand(probs: list[list[float]], labels: list[int], bins: int, rule: str) -> float:
    """The definition, row by row and bin by bin, with borders from exact comparison of confidence * bins."""
    rows = [(max(p), p.index(max(p)) == y) for p, y in zip(probs, labels)]
    total = 0.0
    for b in range(bins):
        lo, hi = b / bins, (b + 1) / bins
        if rule == "right":
            inside = [r for r in rows if lo < r[0] <= hi or (b == 0 and r[0] == 0)]
        elif rule == "left":
            inside = [r for r in rows if lo <= r[0] < hi or (b == bins - 1 and r[0] >= 1)]
        else:
            inside = [r for r in rows if sum(o[0] < r[0] for o in rows) * bins // len(rows) == b]
        if inside:
            confidence = sum(r[0] for r in inside) / len(inside)
            right = sum(r[1] for r in inside) / len(inside)
            total += len(inside) / len(rows) * abs(right - confidence)
    return total


def risks_by_hand(confidences: list[float], wrong: list[bool]) -> list[float]:
    """The risks averaged over every order of the rows in which confidence does not rise."""
    n = len(wrong)
    orders = [
        order
        for order in itertools.permutations(range(n))
        if all(confidences[i] >= confidences[j] for i, j in itertools.pairwise(order))
    ]
    return [sum(wrong[i] for order in orders for i in order[:k]) / k / len(orders) for k in range(1, n + 1)]


def two_classes(confidences: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    p = torch.tensor(confidences, dtype=dtype)
    return torch.stack([p, 1 - p], dim=1)


# --- against oracles


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("c", [2, 3, 5])
def test_accuracy_nll_and_brier_agree_with_scikit_learn(c, dtype):
    probs, labels = random_rows(c, c=c, dtype=dtype)
    p, y = probs.double().numpy(), labels.numpy()
    p = p / p.sum(1, keepdims=True)
    assert accuracy(probs, labels) == accuracy_score(y, p.argmax(1))
    assert nll(probs, labels) == pytest.approx(log_loss(y, p, labels=range(c)), rel=1e-6)
    # scikit-learn's multi-class Brier score is young, so the sum is written out
    by_hand = sum(sum((p[i, k] - (y[i] == k)) ** 2 for k in range(c)) for i in range(len(y))) / len(y)
    assert brier(probs, labels) == pytest.approx(by_hand, rel=1e-6)


def test_brier_is_twice_the_one_sided_score_of_two_classes():
    probs, labels = random_rows(9, c=2)
    one_sided = np.mean((probs[:, 1].numpy() - labels.numpy()) ** 2)
    assert brier(probs, labels) == pytest.approx(2 * one_sided)
    assert one_sided == pytest.approx(brier_score_loss(labels.numpy(), probs[:, 1].numpy()))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bins", [1, 7, 10, 15])
def test_ece_agrees_with_the_definition(rule, bins):
    for seed in range(5):
        probs, labels = random_rows(seed, n=97)
        assert ece(probs, labels, bins, rule) == pytest.approx(
            ece_by_hand(probs.tolist(), labels.tolist(), bins, rule), abs=1e-12
        )


def test_ece_default_is_ten_bins_open_on_the_left():
    probs, labels = random_rows(3)
    assert ece(probs, labels) == ece(probs, labels, bins=10, rule="right")
    border = two_classes([0.6, 0.6, 0.65])
    assert reliability(border, torch.zeros(3, dtype=torch.int64)).count.tolist() == [0, 0, 0, 0, 0, 2, 1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tenth", range(5, 11))
def test_confidence_on_a_border_goes_where_the_rule_says(tenth, dtype):
    probs, labels = two_classes([tenth / 10], dtype), torch.tensor([0])
    right, left = (reliability(probs, labels, 10, rule).count.argmax().item() for rule in ("right", "left"))
    assert right == tenth - 1
    assert left == min(tenth, 9)


def test_small_confidences_of_many_classes_on_a_border():
    probs = torch.full((1, 5), 0.2, dtype=torch.float64)
    assert reliability(probs, torch.tensor([0])).count.argmax() == 1  # (0.1, 0.2]
    assert reliability(probs, torch.tensor([0]), rule="left").count.argmax() == 2  # [0.2, 0.3)


def test_adaptive_bins_have_equal_mass_and_keep_equal_confidences_together():
    probs, labels = random_rows(1, n=103)
    assert set(reliability(probs, labels, 10, "adaptive").count.tolist()) == {10, 11}
    same = two_classes([0.7] * 9)
    assert reliability(same, torch.zeros(9, dtype=torch.int64), 3, "adaptive").count.tolist() == [9, 0, 0]


def test_reliability_bins_by_hand():
    probs = two_classes([0.55, 0.58, 0.95])
    found = reliability(probs, torch.tensor([0, 1, 0]))
    confidence, right = found.confidence, found.accuracy
    assert found.count.tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 0, 1]
    assert confidence[5] == pytest.approx(0.565)
    assert right[5] == 0.5
    assert (confidence[9], right[9]) == (pytest.approx(0.95), 1.0)
    assert confidence[0].isnan()
    assert right[0].isnan()


def test_uncertainties_agree_with_scipy():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 11, 4, generator=generator)
    logits[:, 3, 2:] = -math.inf
    draws = np.exp(logits.double().numpy())
    draws /= draws.sum(-1, keepdims=True)
    mean = draws.mean(0)
    result = uncertainty(logits)
    np.testing.assert_allclose(result.total, scipy.stats.entropy(mean, axis=-1), atol=1e-12)
    np.testing.assert_allclose(result.aleatoric, scipy.stats.entropy(draws, axis=-1).mean(0), atol=1e-12)
    divergence = scipy.stats.entropy(draws, np.broadcast_to(mean, draws.shape), axis=-1).mean(0)  # mutual information
    np.testing.assert_allclose(result.epistemic, divergence, atol=1e-12)


def test_average_probs_averages_probabilities_not_logits():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 6, 3, generator=generator)
    logits[:, 0, 2] = -math.inf
    expected = scipy.special.softmax(logits.double().numpy(), axis=-1).mean(0)
    probs = average_probs(logits)
    np.testing.assert_allclose(probs, expected, rtol=1e-12)
    assert probs[0, 2] == 0
    assert probs.dtype == torch.float64
    assert not np.allclose(probs, scipy.special.softmax(logits.double().numpy().mean(0), axis=-1), atol=1e-2)


@pytest.mark.parametrize("grid", [3, 20, 10**6])  # many ties, some, none
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_auroc_agrees_with_scikit_learn(grid, dtype):
    generator = torch.Generator().manual_seed(grid)
    scores = (torch.randint(grid, (151,), generator=generator) / grid - 0.5).to(dtype)
    positives = torch.rand(151, generator=generator) < 0.4 + scores / 2
    assert auroc(scores, positives) == pytest.approx(roc_auc_score(positives.numpy(), scores.numpy()), abs=1e-12)


def test_auroc_of_infinite_scores():
    scores = torch.tensor([math.inf, math.inf, 0.0, -math.inf])
    assert auroc(scores, torch.tensor([True, False, False, False])) == pytest.approx(2.5 / 3)


def test_each_row_is_the_metric_of_that_row_alone():
    probs, labels = random_rows(4, n=20)
    rows = by_row(probs, labels)
    for i in range(20):
        one = evaluate(probs[i : i + 1], labels[i : i + 1])
        assert (rows.right[i], rows.nll[i], rows.brier[i]) == (one["accuracy"], one["nll"], one["brier"])
        assert abs(rows.confidence[i] - one["accuracy"]) == pytest.approx(one["ece"])


@pytest.mark.parametrize("levels", [1, 2, 3, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_risk_is_averaged_over_the_orders_of_equal_confidences(levels, seed):
    generator = torch.Generator().manual_seed(seed)
    confidences = (0.55 + 0.4 * torch.randint(levels, (6,), generator=generator).double() / levels).tolist()
    labels = torch.randint(2, (6,), generator=generator)
    found = risk_coverage(two_classes(confidences), labels)
    assert found.risk.tolist() == pytest.approx(risks_by_hand(confidences, (labels == 1).tolist()))
    assert found.coverage.tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert found.aurc == pytest.approx(sum(found.risk.tolist()) / 6)


def test_auroc_of_the_curve_says_how_well_confidence_finds_the_right_answers():
    probs, labels = random_rows(5, n=300)
    expected = roc_auc_score((probs.argmax(1) == labels).numpy(), probs.max(1).values.numpy())
    assert risk_coverage(probs, labels).auroc == pytest.approx(expected)
    assert expected > 0.6  # rows of calibrated probabilities: what is sure is right more often


def test_risk_coverage_of_the_best_and_the_worst_ranking():
    confidences, n, wrong = [0.9 - 0.01 * i for i in range(20)], 20, 5
    last = torch.tensor([0] * (n - wrong) + [1] * wrong)
    best, worst = (risk_coverage(two_classes(confidences), labels) for labels in (last, last.flip(0)))
    assert (best.auroc, worst.auroc) == (1.0, 0.0)
    assert best.aurc == pytest.approx(sum((k - 15) / k for k in range(16, 21)) / n)
    assert worst.aurc == pytest.approx((5 + sum(5 / k for k in range(6, 21))) / n)
    assert best.risk[-1] == worst.risk[-1] == wrong / n


def test_the_ece_of_perfect_calibration_is_that_of_labels_drawn_from_the_probabilities():
    probs, _ = random_rows(8)
    source = torch.Generator().manual_seed(0)
    drawn = [ece(probs, torch.multinomial(probs, 1, generator=source)[:, 0], 5) for _ in range(4000)]
    error = statistics.stdev(drawn) / math.sqrt(len(drawn))
    assert abs(ece_if_calibrated(probs, 5) - statistics.mean(drawn)) < 4 * error
    assert error < 0.002
    sure = torch.eye(3)[torch.tensor([0, 2, 2])]
    assert ece_if_calibrated(sure) == 0.0
    a_coin = torch.full((4, 2), 0.5)
    assert ece_if_calibrated(a_coin) == pytest.approx((2 * 2 + 8 * 1) / 16 / 4)


def test_in_large_bins_the_ece_of_perfect_calibration_is_that_of_a_gaussian(monkeypatch):
    probs, _ = random_rows(9, n=1500, c=2)
    exact = ece_if_calibrated(probs, 2)
    monkeypatch.setattr("varlora.metrics.NORMAL", 100.0)
    assert ece_if_calibrated(probs, 2) == pytest.approx(exact, rel=1e-3)
    assert ece_if_calibrated(probs, 2) != exact


def test_in_large_bins_of_sure_rows_it_is_not():
    """Of 5000 rows that are wrong with a chance of 1e-4 each, half a row is wrong on average: a binomial number."""
    n, wrong = 5000, 1e-4
    chances = scipy.stats.binom(n, wrong).pmf(range(50))
    expected = sum(chance * abs(k - n * wrong) for k, chance in enumerate(chances)) / n
    probs = torch.tensor([[1 - wrong, wrong]], dtype=torch.float64).repeat(n, 1)
    assert ece_if_calibrated(probs) == pytest.approx(expected, rel=1e-6)


def test_the_ece_of_perfect_calibration_has_the_bins_of_the_ece():
    """A float32 0.6 is on the border of two bins, and a little above it as a float64."""
    probs = torch.tensor([[0.6, 0.4]] * 3 + [[0.65, 0.35]] * 3)
    assert ece_if_calibrated(probs) == pytest.approx(ece_if_calibrated(probs.double().round(decimals=2)))


def test_evaluate_all_adds_to_evaluate():
    probs, labels = random_rows(6)
    found = evaluate_all(probs, labels, bins=7, rule="left")
    curve = risk_coverage(probs, labels)
    assert found == {
        **evaluate(probs, labels, 7, "left"),
        "ece_if_calibrated": ece_if_calibrated(probs, 7, "left"),
        "adaptive_ece": ece(probs, labels, 7, "adaptive"),
        "auroc": curve.auroc,
        "aurc": curve.aurc,
    }


def test_both_eces_are_of_bins_by_the_same_rule():
    """Of a confidence on a border, beside one in either bin."""
    probs, labels = two_classes([0.6] * 5 + [0.65] * 3 + [0.55] * 2), torch.tensor([0, 1] * 5)
    left, right = (evaluate_all(probs, labels, rule=rule)["ece_if_calibrated"] for rule in ("left", "right"))
    assert left == ece_if_calibrated(probs, rule="left") != pytest.approx(right)
    assert right == ece_if_calibrated(probs)


def test_standard_error_agrees_with_scipy():
    values = [70.1, 71.4, 69.0]
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values))
    assert standard_error([1e9 + 1, 1e9 + 2]) == pytest.approx(0.5)
    assert math.isnan(standard_error([1.0]))


# --- properties


@st.composite
def rows(draw):
    n, c = draw(st.integers(1, 25)), draw(st.integers(2, 5))
    grid = st.integers(0, 20)  # coarse, so that ties, zeros, ones and borders occur
    weights = [draw(st.lists(grid, min_size=c, max_size=c).filter(any)) for _ in range(n)]
    probs = [[w / sum(row) for w in row] for row in weights]
    labels = draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    return probs, labels


@settings(deadline=None, max_examples=100)
@given(rows(), st.sampled_from(RULES), st.integers(1, 12), st.randoms(use_true_random=False))
def test_bounds_permutations_and_padding(data, rule, bins, random):
    p, y = data
    probs, labels = torch.tensor(p, dtype=torch.float64), torch.tensor(y)
    values = evaluate(probs, labels, bins, rule)
    assert 0 <= values["accuracy"] <= 1
    assert 0 <= values["ece"] <= 1 + 1e-12
    assert 0 <= values["brier"] <= 2 + 1e-12
    assert 0 <= values["nll"] < 709
    assert values["ece"] == pytest.approx(ece_by_hand(p, y, bins, rule), abs=1e-12)
    order = random.sample(range(len(y)), len(y))
    assert evaluate(probs[order], labels[order], bins, rule) == pytest.approx(values, abs=1e-12)
    padded = torch.cat([probs, torch.zeros(len(y), 2, dtype=torch.float64)], dim=1)
    assert evaluate(padded, labels, bins, rule) == pytest.approx(values, abs=1e-12)
    assert reliability(probs, labels, bins, rule).count.sum() == len(y)


@settings(deadline=None, max_examples=60)
@given(rows(), st.randoms(use_true_random=False))
def test_risk_coverage_does_not_depend_on_the_order_of_rows(data, random):
    probs, labels = torch.tensor(data[0], dtype=torch.float64), torch.tensor(data[1])
    curve, n = risk_coverage(probs, labels), len(labels)
    order = random.sample(range(n), n)
    assert risk_coverage(probs[order], labels[order]).risk.tolist() == pytest.approx(curve.risk.tolist(), abs=1e-12)
    assert curve.risk[-1] == pytest.approx(1 - accuracy(probs, labels), abs=1e-12)
    assert curve.risk.min() >= 0
    assert curve.risk.max() <= 1 + 1e-12


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 6), st.integers(2, 5), st.integers(0, 10_000), st.sampled_from([0.1, 3.0, 200.0])
)
def test_uncertainty_bounds(s, n, c, seed, sharp):
    logits = sharp * torch.randn(s, n, c, generator=torch.Generator().manual_seed(seed))
    total, aleatoric, epistemic = uncertainty(logits)
    assert (epistemic >= 0).all()
    assert (total <= math.log(c) + 1e-12).all()
    assert torch.allclose(total, aleatoric + epistemic, atol=1e-12)
    assert (epistemic <= math.log(s) + 1e-12).all()
    if s == 1:
        assert epistemic.abs().max() < 1e-12


# --- edges


@pytest.mark.parametrize("rule", RULES)
def test_perfect_predictions(rule):
    probs, labels = torch.eye(4), torch.arange(4)
    assert evaluate(probs, labels, rule=rule) == {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "brier": 0.0}


@pytest.mark.parametrize("rule", RULES)
def test_sure_and_wrong(rule):
    probs, labels = torch.eye(2), torch.tensor([1, 0])
    values = evaluate(probs, labels, rule=rule)
    assert values == {"accuracy": 0.0, "nll": pytest.approx(708.396, abs=1e-3), "ece": 1.0, "brier": 2.0}


@pytest.mark.parametrize(("right", "aurc"), [(True, 0.0), (False, 1.0)])
def test_auroc_is_nan_where_all_rows_are_right_or_all_are_wrong(right, aurc):
    labels = torch.full((3,), 0 if right else 1)
    found = evaluate_all(two_classes([0.9, 0.8, 0.8]), labels)
    assert math.isnan(found["auroc"])
    assert found["aurc"] == aurc


def test_confidence_a_rounding_error_above_one_is_in_the_last_bin():
    probs = torch.tensor([[1.0000001, 0.0]])
    for rule in ("right", "left"):
        assert reliability(probs, torch.tensor([0]), rule=rule).count[-1] == 1


def test_float64_sums_of_many_half_precision_rows():
    probs = torch.full((70_000, 2), 0.5, dtype=torch.float16)  # a float16 sum overflows
    assert nll(probs, torch.zeros(70_000, dtype=torch.int64)) == pytest.approx(math.log(2))


# --- wrong input


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("probs", "labels", "says"),
    [
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "logits"),
        (torch.tensor([[0.5, 0.5], [3.0, 4.0]]), torch.tensor([0, 0]), "row 1"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([2]), r"in \[0, 2\)"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-1]), "known = labels >= 0"),
        (torch.tensor([[0.5, math.nan]]), torch.tensor([0]), "finite"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), r"\(1, 2\) and \(2,\)"),
        (torch.tensor([0.5, 0.5]), torch.tensor([0, 1]), "shape"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "at least one row"),
        (torch.tensor([[1, 0]]), torch.tensor([0]), "floating-point"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "int64"),
    ],
)
def test_wrong_probs_or_labels_are_refused(metric, probs, labels, says):
    with pytest.raises(MetricError, match=says) as caught:
        metric(probs, labels)
    assert isinstance(caught.value, VarloraError)


@pytest.mark.parametrize("function", [average_probs, uncertainty])
@pytest.mark.parametrize(
    ("logits", "says"),
    [
        (torch.zeros(3, 2), r"logits\[None\]"),
        (torch.zeros(0, 3, 2), "none of them 0"),
        (torch.tensor([[[0.0, math.nan]]]), "NaN"),
        (torch.tensor([[[0.0, math.inf]]]), r"\+inf"),
        (torch.full((1, 1, 2), -math.inf), "row 0 is -inf throughout"),
    ],
)
def test_wrong_logits_are_refused(function, logits, says):
    with pytest.raises(MetricError, match=says):
        function(logits)


def test_wrong_bins_rule_and_values_are_refused():
    probs, labels = torch.tensor([[0.5, 0.5]]), torch.tensor([0])
    with pytest.raises(MetricError, match="`bins`"):
        ece(probs, labels, bins=0)
    with pytest.raises(MetricError, match="Did you mean `right`"):
        ece(probs, labels, rule="rigth")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="`values`"):
        standard_error([])
    with pytest.raises(MetricError, match="`values`"):
        standard_error([1.0, math.nan])


@pytest.mark.parametrize(
    ("scores", "positives", "says"),
    [
        (torch.zeros(2), torch.tensor([True]), r"\(2,\) and \(1,\)"),
        (torch.zeros(1, 2), torch.tensor([[True, False]]), r"shape \(N,\)"),
        (torch.zeros(2), torch.tensor([1, 0]), "labels == 1"),
        (torch.tensor([0.5, math.nan]), torch.tensor([True, False]), "NaN"),
        (torch.zeros(2), torch.tensor([True, True]), "2 positive and 0 negative"),
        (torch.zeros(2), torch.tensor([False, False]), "0 positive and 2 negative"),
        (torch.zeros(0), torch.zeros(0, dtype=torch.bool), "0 positive and 0 negative"),
    ],
)
def test_wrong_scores_or_positives_are_refused(scores, positives, says):
    with pytest.raises(MetricError, match=says):
        auroc(scores, positives)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64])
def test_labels_of_any_integer_type_are_compared_as_numbers(dtype: torch.dtype) -> None:
    probs, labels = torch.full((2, 256), 1 / 256), torch.tensor([0, 100], dtype=dtype)
    assert nll(probs, labels) == pytest.approx(math.log(256), rel=1e-5)
