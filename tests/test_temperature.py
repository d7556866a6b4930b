"""Fitting a temperature, against scipy's optimizer and cases that can be solved by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize, special
from torch import Tensor

from varlora.metrics import MetricError
from varlora.predictions import Predictions
from varlora.temperature import RANGE, fit_temperature


def problem(seed: int, draws: int, rows: int = 40, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits of random confidence, right more often than not, and labels; some rows lack an answer."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes - 1, (rows,), generator=source)
    sure = 10 ** (2 * torch.rand(1, generator=source) - 0.5)
    logits = torch.randn(1, rows, classes, generator=source) + 0.7 * torch.randn(draws, rows, classes, generator=source)
    logits = sure * (logits + 1.2 * torch.nn.functional.one_hot(labels, classes))
    logits[:, ::3, -1] = -math.inf
    return logits, labels


def nll(log_temperature: float, logits: Tensor, labels: Tensor) -> float:
    """−mean log mean_s softmax(z_s/T), in numpy and logarithms throughout."""
    z = logits.double().numpy() / math.exp(log_temperature)
    log_probs = special.log_softmax(z, axis=-1)[:, np.arange(len(labels)), labels.numpy()]  # (S, N)
    return -float((special.logsumexp(log_probs, axis=0) - math.log(len(z))).mean())


def best(logits: Tensor, labels: Tensor) -> float:
    """The temperature by scipy: the best of a fine grid, refined between its neighbours."""
    grid = np.linspace(*np.log(RANGE), 300)
    at = int(np.argmin([nll(value, logits, labels) for value in grid]))
    bounds = (grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
    found = optimize.minimize_scalar(
        nll, bounds=bounds, args=(logits, labels), method="bounded", options={"xatol": 1e-10}
    )
    return math.exp(found.x)


@pytest.mark.parametrize("draws", [1, 2, 8])
@pytest.mark.parametrize("seed", range(6))
def test_agrees_with_scipy(seed: int, draws: int) -> None:
    logits, labels = problem(seed, draws)
    expected = best(logits, labels)
    assert 0.06 < expected < 40  # not at an end
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-5)


def test_no_other_temperature_is_better() -> None:
    logits, labels = problem(0, draws=5)
    found = nll(math.log(fit_temperature(logits, labels)), logits, labels)
    assert all(found <= nll(value, logits, labels) + 1e-12 for value in np.linspace(*np.log(RANGE), 500))


@pytest.mark.parametrize(("counts", "high"), [((90, 60), True), ((60, 90), False)])
def test_of_two_minima_it_takes_the_lower(counts: tuple[int, int], high: bool) -> None:
    """Rows whose draws contradict each other, the right one being surer, at two scales that are far apart."""
    pairs = [[100.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 0.03]]  # of the first rows, and of the others
    logits = torch.cat([torch.tensor(pair)[:, None].repeat(1, count, 1) for pair, count in zip(pairs, counts)], 1)
    labels = torch.zeros(150, dtype=torch.long)
    values = [nll(value, logits, labels) for value in np.linspace(*np.log(RANGE), 400)]
    minima = [b for a, b, c in zip(values, values[1:], values[2:]) if a > b < c]
    assert len(minima) == 2
    assert (best(logits, labels) > 1) == high
    assert fit_temperature(logits, labels) == pytest.approx(best(logits, labels), rel=1e-5)


# --- solved by hand ---


@pytest.mark.parametrize("gap", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("right", [6, 8, 9])
def test_equal_gaps_give_the_share_that_is_right(gap: float, right: int) -> None:
    """Of ten rows with one gap, r right: softmax(gap/T) is r/10, so T = gap / log(r/(10 − r))."""
    logits = torch.tensor([[[gap, 0.0]] * 10])
    labels = torch.tensor([0] * right + [1] * (10 - right))
    assert fit_temperature(logits, labels) == pytest.approx(gap / math.log(right / (10 - right)), rel=1e-6)


def test_equal_draws_are_one_draw() -> None:
    logits, labels = problem(1, draws=1)
    assert fit_temperature(logits.repeat(3, 1, 1), labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-6)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_logits_so_many_times_as_large_take_so_many_times_the_temperature(factor: float) -> None:
    logits, labels = problem(2, draws=4)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * fit_temperature(logits, labels), rel=1e-6)


def test_a_constant_beside_a_rows_logits_does_not_matter() -> None:
    logits, labels = problem(3, draws=4)
    shift = torch.arange(float(logits.shape[1]))[:, None]
    assert fit_temperature(logits + shift, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-4)


def test_answers_that_a_row_lacks_do_not_matter() -> None:
    logits, labels = problem(4, draws=4)
    wider = torch.nn.functional.pad(logits, (0, 2), value=-math.inf)
    assert fit_temperature(wider, labels) == pytest.approx(fit_temperature(logits, labels), rel=1e-9)


# --- the ends of the range ---


@pytest.mark.parametrize("gap", [0.001, 0.5, 3.0, 1000.0])
@pytest.mark.parametrize("draws", [1, 3])
def test_a_model_that_is_always_right_is_as_sure_as_so_few_rows_allow(gap: float, draws: int) -> None:
    """Four rows that are right say no more than five in six."""
    logits = torch.tensor([[gap, 0.0]] * 4).expand(draws, 4, 2)
    temperature = fit_temperature(logits, torch.zeros(4, dtype=torch.long))
    expected = min(max(gap / math.log(5), RANGE[0]), 1.0)
    assert temperature == pytest.approx(expected, rel=1e-6)


def test_where_draws_disagree_on_some_of_the_rows_the_others_are_not_certain() -> None:
    """The lower the temperature, the likelier all 80 rows, and three of them stay open, as a draw votes otherwise."""
    logits = torch.tensor([3.0, 0.0]).repeat(10, 80, 1)
    logits[0, :3] = torch.tensor([0.0, 3.0])
    logits[1, 3] = torch.tensor([0.0, 0.01])  # with which 0.05 is not quite the best
    said: list[str] = []
    temperature = fit_temperature(logits, torch.zeros(80, dtype=torch.long), said.append)
    assert said
    assert 0.4 < temperature < 1
    assert (logits / temperature).softmax(-1).mean(0).amax(1).max() < 1 - 1e-3


def test_two_rows_are_added_where_the_lowest_is_not_ruled_out_at_the_5_percent_level() -> None:
    labels, seen = torch.zeros(20, dtype=torch.long), set[bool]()
    for wrong in torch.linspace(0.05, 0.4, 30).tolist():  # the gap of one row of 20; the others, right, have one of 1
        logits = torch.tensor([[[1.0, 0.0]] * 19 + [[0.0, wrong]]])
        plain = best(logits, labels)
        less = 20 * (nll(math.log(RANGE[0]), logits, labels) - nll(math.log(plain), logits, labels))
        doubted = less < 3.84 / 2  # of χ² with one degree of freedom
        assert (fit_temperature(logits, labels) > 1.001 * plain) == doubted
        seen.add(doubted)
    assert seen == {True, False}


def test_rows_with_one_answer_alone_have_no_doubt() -> None:
    """Nine rows are right, the one that is added as right is like nine in ten of all, and one is wrong: 9.9 to 1."""
    logits = torch.tensor([[[1.0, 0.0]] * 9 + [[1.0, -math.inf]]])
    assert fit_temperature(logits, torch.zeros(10, dtype=torch.long)) == pytest.approx(1 / math.log(9.9), rel=1e-6)


@pytest.mark.parametrize("gap", [0.001, 3.0, 1000.0])
def test_a_model_that_is_always_wrong_gets_the_highest(gap: float) -> None:
    logits = torch.tensor([[[gap, 0.0]] * 4])
    assert fit_temperature(logits, torch.ones(4, dtype=torch.long)) == pytest.approx(RANGE[1], rel=1e-9)


def test_a_temperature_at_the_end_of_its_range_is_told() -> None:
    said: list[str] = []
    logits = torch.tensor([[[3.0, 0.0]] * 4])
    fit_temperature(logits, torch.ones(4, dtype=torch.long), said.append)
    assert len(said) == 1
    assert "at the end of its range, 50" in said[0]
    fit_temperature(logits, torch.tensor([0, 0, 0, 1]), said.append)  # which is set by its rows
    assert len(said) == 1


def test_logits_that_say_nothing_give_some_temperature_in_the_range() -> None:
    found = fit_temperature(torch.zeros(1, 4, 3), torch.tensor([0, 1, 2, 0]))
    assert RANGE[0] * (1 - 1e-9) <= found <= RANGE[1]


# --- what it takes ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_takes_logits_of_any_type(dtype: torch.dtype) -> None:
    logits, labels = problem(5, draws=2)
    rounded = logits.to(dtype)
    assert fit_temperature(rounded, labels) == pytest.approx(best(rounded, labels), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "labels"),
    [((4, 3), [0, 1, 2, 0]), ((2, 4, 3), [0, 1, 2]), ((2, 0, 3), []), ((0, 4, 3), [0, 1, 2, 0]), ((1, 2, 3), [0, -1])],
    ids=["no draws' dimension", "labels missing", "no rows", "no draws", "an unknown label"],
)
def test_refuses_what_has_no_nll(shape: tuple[int, ...], labels: list[int]) -> None:
    with pytest.raises(MetricError, match="Expected"):
        fit_temperature(torch.zeros(shape), torch.tensor(labels, dtype=torch.long))


def test_draws_and_mean_have_temperatures_of_their_own() -> None:
    logits = torch.tensor([[[2.0, 0.0]], [[-4.0, 0.0]]])  # (2, 1, 2)
    meta = {"temperature": "2.0", "temperature_mean": "4.0"}
    found = Predictions(logits, torch.tensor([[8.0, 0.0]]), torch.tensor([0]), ("a",), meta=meta)
    share = (special.expit(1.0) + special.expit(-2.0)) / 2
    assert found.tempered(drawn=True)[0].tolist() == pytest.approx([share, 1 - share])
    assert found.tempered(drawn=False)[0].tolist() == pytest.approx([special.expit(2.0), special.expit(-2.0)])
