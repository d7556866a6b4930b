"""What the tests of all rows check."""

from __future__ import annotations

import torch
from everywhere.rows import SETTINGS, Outcome, Task, Weights
from everywhere.twin import Expected
from helpers import same
from torch import Tensor


def check_draws(outcome: Outcome, task: Task, draws: int = 1, passes: int | None = None) -> None:
    """Check that every training pass ran at a draw, and that every evaluation and what is left are the mean.

    Args:
        outcome: of the task.
        task: what the row was asked.
        draws: draws a step.
        passes: training passes a step; the number of micro-batches if not given.
    """
    watch, passes = outcome.watch, passes or task.micro
    trained = [name for name, p in outcome.model.named_parameters() if p.requires_grad]
    assert len(watch.training) == task.steps * passes
    assert len(watch.means) == len(watch.evaluation) == task.steps
    for number, weights in enumerate(watch.training):
        for mean in watch.means:
            assert not any(torch.equal(weights[name], mean[name]) for name in trained)
        if number:
            assert same(weights, watch.training[number - 1]) == (number % passes >= draws)
    for weights, mean in zip(watch.evaluation, watch.means):
        assert same(weights, mean)
    assert same(watch.weights(), watch.means[-1])
    for name, mean in outcome.state("mean").items():
        assert torch.equal(mean.to(watch.means[-1][name]), watch.means[-1][name])


def check_twin(outcome: Outcome, twin: Expected, tolerance: float = 1e-3) -> None:
    """Check that mean and Hessian are the slow twin's, but for a part of the way that they have come."""
    start = torch.tensor(SETTINGS["hess_init"])
    for name, mean in outcome.state("mean").items():
        assert distance(mean, twin.mean[name]) <= tolerance * distance(twin.mean[name], twin.start[name]), name
    for name, hess in outcome.state("hess").items():
        assert distance(hess, twin.hess[name]) <= tolerance * distance(twin.hess[name], start), name


def distance(one: Tensor, other: Tensor) -> float:
    return (one.cpu().double() - other.cpu().double()).norm().item()


def close(found: Weights, wanted: Weights) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
