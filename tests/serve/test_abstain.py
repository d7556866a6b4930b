"""When to abstain, against a search over all thresholds."""

from __future__ import annotations

import pytest
import torch

from varlora.errors import VarloraError
from varlora.serve.abstain import of_expected_error, of_held_out


def by_search(probs, labels, risk):
    """The lowest confidence of a row such that of those at or above it at most the share `risk` is wrong."""
    confidence, predicted = probs.max(dim=1)
    fine = []
    for t in confidence.tolist():
        answered = confidence >= t
        wrong = int((predicted[answered] != labels[answered]).sum())
        if wrong <= risk * int(answered.sum()) + 1e-9:
            fine.append(t)
    return min(fine, default=None)


@pytest.mark.parametrize("risk", [0.0, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_lowest_that_keeps_the_risk(risk, seed):
    generator = torch.Generator().manual_seed(seed)
    probs = (3 * torch.randn(60, 3, generator=generator, dtype=torch.float64)).round().softmax(1)  # with ties
    labels = torch.multinomial(probs, 1, generator=generator)[:, 0]
    found = of_held_out(probs, labels, risk)
    assert found.confidence == by_search(probs, labels, risk)
    assert (found.risk, found.rows) == (risk, 60)
    answered = [i for i in range(60) if not found.abstains(probs[i].max().item())]
    wrong = sum(int(probs[i].argmax() != labels[i]) for i in answered)
    assert wrong <= risk * len(answered) + 1e-9
    if risk == 1:
        assert len(answered) == 60


def test_where_even_the_surest_are_wrong_everything_is_abstained_from():
    probs = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
    found = of_held_out(probs, torch.tensor([1, 0]), 0.1)
    assert found.confidence is None
    assert found.abstains(1.0)


def test_without_held_out_rows_the_expected_error_decides():
    found = of_expected_error(0.2)
    assert (found.confidence, found.rows) == (0.8, 0)
    assert found.abstains(0.79)
    assert not found.abstains(0.8)


@pytest.mark.parametrize("risk", [-0.1, 1.1, float("nan")])
def test_a_risk_is_a_share(risk):
    for make in (of_expected_error, lambda risk: of_held_out(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), risk)):
        with pytest.raises(VarloraError, match="`risk`"):
            make(risk)
