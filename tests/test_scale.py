"""The scale that is found: each formula against a simulation or a closed form, with the optimizers themselves."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import nn

from varlora import IVON, scale

WEIGHTS = 4000


def falling(optimizer: torch.optim.Optimizer, steps: int, decay: float) -> torch.optim.lr_scheduler.LRScheduler:
    """torch's own schedules: constant, then linearly down to zero."""
    last = round(decay * steps)
    down = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, last)
    if last == steps:
        return down
    flat = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [flat, down], [steps - last])


def wandered(make: Callable[[nn.Parameter], torch.optim.Optimizer], steps: int, decay: float = 1.0) -> float:
    """Root mean square of how far weights move whose gradients are noise, as the learning rate falls at the end."""
    weight, source = nn.Parameter(torch.zeros(WEIGHTS)), torch.Generator().manual_seed(0)
    optimizer = make(weight)
    schedule = falling(optimizer, steps, decay)
    for _ in range(steps):
        if isinstance(optimizer, IVON):
            optimizer.train()
        weight.grad = torch.randn(WEIGHTS, generator=source)
        optimizer.step()
        schedule.step()
    return weight.detach().square().mean().sqrt().item()


def ivon(step: float, beta1: float = 0.9) -> Callable[[nn.Parameter], torch.optim.Optimizer]:
    return lambda weight: IVON(
        [("w", weight)], lr=step / 1e-3, ess=1.0, hess_init=1.0, beta1=beta1, clip_radius=1e-3, seed=0
    )


@pytest.mark.parametrize(("beta1", "decay"), [(0.0, 1.0), (0.5, 0.5), (0.9, 1.0), (0.9, scale.DECAY)])
def test_weights_that_follow_noise_wander_as_far_as_foreseen(beta1: float, decay: float) -> None:
    foreseen = 1e-4 * scale.walk(300, beta1, decay)
    assert wandered(ivon(1e-4, beta1), 300, decay) == pytest.approx(foreseen, rel=0.07)


@pytest.mark.parametrize("decay", [0.05, scale.DECAY, 1.0])
def test_the_learning_rate_stays_and_then_falls_to_zero_in_a_line(decay: float) -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer, seen = torch.optim.SGD([weight], lr=1.0), []
    schedule = falling(optimizer, 200, decay)
    for _ in range(200):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [scale.fall(step / 200, decay) for step in range(200)] == pytest.approx(seen)


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 4000), (3.3, 4000), (33.0, 4000), (1000.0, 400_000)])
def test_weights_that_wander_change_predictions_by_their_share_of_an_epoch(epochs: float, steps: int) -> None:
    def kl(sigma: float) -> float:
        return 40 * sigma**2

    sigma, _ = scale.largest_sigma(kl, scale.bound([4, 2], epochs), start=0.01)
    wandered = scale.step_size(sigma, epochs, steps, 0.9, 0.3) * scale.walk(steps, 0.9, 0.3)
    answers = (math.log(4) + math.log(2)) / 2
    assert kl(wandered) == pytest.approx(scale.WANDER * answers / epochs)


@pytest.mark.parametrize("decay", [scale.DECAY, 1.0])
def test_in_few_steps_a_weight_that_goes_straight_comes_further_than_sigma(decay: float) -> None:
    steps, sigma = 50, 0.05
    weight = nn.Parameter(torch.zeros(WEIGHTS))
    optimizer = ivon(scale.step_size(sigma, epochs=40.0, steps=steps, beta1=0.9, decay=decay))(weight)
    schedule = falling(optimizer, steps, decay)
    for _ in range(steps):
        optimizer.train()
        weight.grad = torch.ones(WEIGHTS)
        optimizer.step()
        schedule.step()
    assert -weight.mean().item() == pytest.approx(scale.STRAIGHT * sigma, rel=0.05)


def test_with_adamws_learning_rate_they_wander_as_far_as_with_adamw() -> None:
    adamw = wandered(lambda weight: torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0), 300)
    assert wandered(ivon(scale.like_adamw(1e-3, 0.9)), 300) == pytest.approx(adamw, rel=0.12)


@pytest.mark.parametrize("growth", [0.0, 0.25, 1.0])
def test_chance_moves_the_first_hessian_by_a_hundredth(growth: float) -> None:
    steps, sigma, beta2 = 400, 0.02, 1 - 1e-5
    weight, source = nn.Parameter(torch.zeros(WEIGHTS)), torch.Generator().manual_seed(0)
    h = scale.first_hessian(0.01, sigma, steps, beta2, growth)
    optimizer = IVON([("w", weight)], lr=0.0, ess=1.0, hess_init=h, beta2=beta2, seed=0)
    for step in range(steps):
        optimizer.param_groups[0]["ess"] = 1 / (h * (sigma * scale.ramp(step / steps, growth)) ** 2)
        optimizer.train()
        weight.grad = 0.01 * torch.randn(WEIGHTS, generator=source)
        optimizer.step()
    moved = optimizer.state[weight]["hess"] / h - 1
    assert moved.std().item() == pytest.approx(1 / scale.STEADY, rel=0.15)


# --- the change of the predictions ---


def test_kl_is_that_of_the_draws_from_the_mean() -> None:
    source = torch.Generator().manual_seed(0)
    mean, logits = torch.randn(5, 3, generator=source), torch.randn(4, 5, 3, generator=source)
    expected = nn.functional.kl_div(
        logits.log_softmax(-1), mean.log_softmax(-1).expand(4, 5, 3), log_target=True, reduction="sum"
    )
    assert scale.kl_under_noise(logits, mean) == pytest.approx(expected.item() / 20, rel=1e-5)


def test_an_answer_that_a_row_lacks_does_not_matter() -> None:
    mean, logits = torch.randn(5, 3), torch.randn(4, 5, 3)
    wider = [nn.functional.pad(one, (0, 2), value=-math.inf) for one in (logits, mean)]
    assert scale.kl_under_noise(*wider) == pytest.approx(scale.kl_under_noise(logits, mean), rel=1e-6)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_draw_that_overflows_changes_the_predictions_without_bound(lost: float) -> None:
    assert scale.kl_under_noise(torch.full((2, 3, 4), lost), torch.zeros(3, 4)) == math.inf


@pytest.mark.parametrize("start", [0.003, 0.05, 0.6])
@pytest.mark.parametrize("power", [1.5, 2.0, 3.0, 4.0])
def test_the_largest_sigma_meets_the_bound(power: float, start: float) -> None:
    answer = 0.04
    sigma, trials = scale.largest_sigma(lambda sigma: 0.1 * (sigma / answer) ** power, 0.1, start)
    assert sigma == pytest.approx(answer, rel=0.02 if 0.01 < start < 0.2 else 0.1)
    assert trials[0].sigma == start
    assert len(trials) == scale.TRIALS


def test_the_bound_grows_to_half_of_what_there_is_to_know() -> None:
    for epochs in (1.0, 3.3, 190.0):
        assert scale.bound([4, 2], epochs) == scale.BOUND * (math.log(4) + math.log(2)) / 2 * math.sqrt(epochs)
        wandered = 0.03 * math.sqrt(scale.WANDER / (scale.BOUND * epochs**1.5))
        step = max(wandered / scale.walk(400, 0.9, 1.0), scale.STRAIGHT * 0.03 / 200.5)
        assert scale.step_size(0.03, epochs, 400, 0.9, 1.0) == pytest.approx(step)
    for epochs in (194.0, 1e6):
        assert scale.bound([2, 2], epochs) == math.log(2) / 2


@pytest.mark.parametrize("most", [1.0, 1.5, 3.0])
def test_sigma_does_not_fall_with_more_epochs_where_the_kl_stops_growing(most: float) -> None:
    """At ln C and above: what all that the base can say is worth."""

    def kl(sigma: float) -> float:
        return most * math.log(4) * (1 - math.exp(-((sigma / 0.2) ** 2)))

    sigmas = []
    for epochs in (1.0, 25.0, 100.0, 193.0, 300.0, 600.0, 700.0, 1500.0, 1e5):
        bound = scale.bound([4], epochs)
        sigma, trials = scale.largest_sigma(kl, bound, start=0.1)
        assert scale.reach(sigma, trials, bound) == pytest.approx(sigma, rel=1e-6) or most == 1.0
        sigmas.append(sigma)
    assert all(later > 0.99 * sooner for sooner, later in itertools.pairwise(sigmas))


@pytest.mark.parametrize("start", [0.01, 0.1])
def test_also_where_the_power_changes_on_the_way(start: float) -> None:
    """As with LoRA: the noise of B acts as σ², that of both as σ⁴."""

    def kl(sigma: float) -> float:
        return 20 * sigma**2 + 8000 * sigma**4

    sigma, _ = scale.largest_sigma(kl, 0.1, start)
    assert kl(sigma) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("start", [0.02, 0.1, 0.3, 2.0, 10.0])
@pytest.mark.parametrize("beyond", [0.0, -0.1])
def test_where_the_kl_stops_growing_below_the_bound_it_is_where_a_twentieth_of_it_is_reached(
    start: float, beyond: float
) -> None:
    """A random base answers much the same whatever its adapter is: no noise reaches the bound. Steps are longer."""

    def kl(sigma: float) -> float:
        return 0.004 * (1 - math.exp(-((sigma / 0.2) ** 2))) * (1 + beyond * math.log1p(sigma))

    sigma, trials = scale.largest_sigma(kl, 0.09, start)
    assert sigma <= max(trial.sigma for trial in trials)
    assert 0.03 < sigma < 0.06
    assert 0.2 < scale.reach(sigma, trials, 0.09) < 0.7  # σ² would get to all of it at 0.2


@pytest.mark.parametrize("power", [2, 3, 4])
@pytest.mark.parametrize("start", [0.02, 0.3, 2.0])
def test_the_steps_do_not_go_far_beyond_where_it_stops_however_fast_it_grew(power: int, start: float) -> None:
    sigma, trials = scale.largest_sigma(lambda sigma: 0.004 * (1 - math.exp(-((sigma / 0.2) ** power))), 0.09, start)
    assert sigma < scale.reach(sigma, trials, 0.09) <= 1.2 * max(trial.sigma for trial in trials)
    assert scale.reach(sigma, trials, 0.09) < 5 * 0.2


@pytest.mark.parametrize("start", [1.0, 3.0])
@pytest.mark.parametrize(("most", "share"), [(0.201, 0.5), (0.1334, 0.158), (0.1, 0.05), (0.05, 0.05)])
def test_the_less_of_the_bound_is_met_the_smaller_a_share_of_what_there_is_it_takes(
    most: float, share: float, start: float
) -> None:
    """All of it twice over: the bound, which is half. Just so: a twentieth. Between, the share falls evenly."""
    sigma, _ = scale.largest_sigma(lambda sigma: most * (1 - math.exp(-((sigma / 0.2) ** 2))), 0.1, start)
    assert most * (1 - math.exp(-((sigma / 0.2) ** 2))) == pytest.approx(share * most, rel=0.25)


@pytest.mark.parametrize("start", [0.02, 0.3, 2.0])
def test_where_it_stops_growing_far_above_the_bound_that_is_met(start: float) -> None:
    sigma, trials = scale.largest_sigma(lambda sigma: 0.5 * (1 - math.exp(-((sigma / 0.2) ** 2))), 0.05, start)
    assert sigma == pytest.approx(0.2 * math.sqrt(-math.log1p(-0.1)), rel=0.2)
    assert scale.reach(sigma, trials, 0.05) == sigma


@pytest.mark.parametrize("seed", range(20))
def test_trials_that_are_nearly_one_do_not_look_flat(seed: int) -> None:
    """What rounding does to the KL of two nearly equal scales says nothing of how it grows."""
    source = random.Random(seed)
    sigma, _ = scale.largest_sigma(lambda sigma: 30 * sigma**2 * source.gauss(1, 0.003), 0.1, math.sqrt(0.1 / 30))
    assert sigma == pytest.approx(math.sqrt(0.1 / 30), rel=0.02)


@pytest.mark.parametrize("beta1", [0.9, 0.99])
def test_nothing_wanders_further_than_it_could_go_straight(beta1: float) -> None:
    assert scale.walk(2, beta1, 1.0) == 1.5
    assert scale.walk(3, beta1, 1.0) == pytest.approx(2.0)
    assert scale.walk(3, beta1, 0.3) == 3.0


def test_where_draws_overflow_it_is_smaller_and_where_nothing_changes_larger() -> None:
    narrow, _ = scale.largest_sigma(lambda sigma: math.inf if sigma > 0.1 else sigma**2, 0.1, 10.0)
    assert narrow < 1.0
    wide, _ = scale.largest_sigma(lambda sigma: 0.0, 0.1, 0.1)
    assert wide == pytest.approx(0.1 * scale.FURTHEST**scale.TRIALS)
