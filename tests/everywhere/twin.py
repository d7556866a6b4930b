"""What every row has to come to: the slow twin of IVON on the rows' batches, with the optimizer's own noise."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from everywhere.rows import SCALE, SETTINGS, Task, Weights, make_model
from reference.ivon_slow import SlowIVON
from reference.noise import fill_normal
from torch import Tensor

from varlora.optim.bucket import TRAIN
from varlora.optim.noise import mix


@dataclass
class Expected:
    """What the slow twin has come to."""

    start: Weights
    mean: Weights
    hess: Weights
    norms: list[float]
    """Of the gradient of each step, before it was clipped."""


@functools.cache
def expected(
    *phases: tuple[Task, torch.dtype],
    samples: int = 1,
    closure: bool = False,
    overflow_step: int | None = None,
    unused: bool = False,
) -> Expected:
    """Make the steps of one task after the other.

    Args:
        phases: tasks as a row was asked, and the type of the weights in each.
        samples: draws a step; each of the first micro-batches has one.
        closure: each draw sees the whole step's batch instead, as a closure that is called for each of them does, and
            its gradient is clipped on its own.
        overflow_step: a step that is left out because a gradient overflows.
        unused: whether some of the model gets no gradient.
    """
    model: Any = make_model(unused)
    positions = {name: at for at, (name, _) in enumerate(model.named_parameters())}
    model.to(phases[0][1])
    start = {name: p.detach().float() for name, p in model.named_parameters() if p.requires_grad}
    twin, draws, norms = SlowIVON(start, **SETTINGS), 0, []
    for task, dtype in phases:
        model.to(dtype)
        for state in (twin.m, twin.g, twin.h):
            state.update({name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in state.items()})
        scale = SCALE if task.precision == "fp16" else 1.0
        for step in range(task.steps):
            shares: list[dict[str, Tensor]] = []
            noises: list[dict[str, Tensor]] = []
            passes = task.batches(step) * (samples if closure else 1)
            for number, batch in enumerate(passes):
                if number < samples:
                    noises.append(_noise(draws, positions, twin.m))
                    shares.append({})
                    draws += 1
                theta = {name: value.to(dtype).requires_grad_() for name, value in twin.draw(noises[-1]).items()}
                with task.autocast():
                    loss = torch.func.functional_call(model, theta, kwargs=batch).loss
                gradients = torch.autograd.grad(scale / len(passes) * loss, list(theta.values()), allow_unused=True)
                for (name, value), gradient in zip(twin.m.items(), gradients):
                    if gradient is not None:
                        # Draws are averaged there and micro-batches added up here.
                        share = gradient.to(value) / scale * samples
                        shares[-1][name] = shares[-1].get(name, torch.zeros(())) + share
            average = {name: torch.stack([share[name] for share in shares]).mean(0) for name in shares[0]}
            norms.append(_norm(average))
            factors = [_factor(task.clip, _norm(share) if closure else norms[-1]) for share in shares]
            twin.lr = SETTINGS["lr"] * task.lr_factor(step)
            if step != overflow_step:
                clipped = [{name: g * factor for name, g in share.items()} for share, factor in zip(shares, factors)]
                twin.step(clipped, noises)
    return Expected(start, twin.m, twin.h, norms)


def _norm(gradients: dict[str, Tensor]) -> float:
    return torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()


def _factor(clip: float | None, norm: float) -> float:
    """What `clip_grad_norm_` multiplies a gradient by."""
    return min(1.0, clip / (norm + 1e-6)) if clip else 1.0


def _noise(draw: int, positions: dict[str, int], like: Weights) -> dict[str, Tensor]:
    noise = {name: torch.empty(value.shape) for name, value in like.items()}
    fill_normal(mix(0, TRAIN, draw), [(x, positions[name], 0) for name, x in noise.items()])
    return {name: x.to(like[name].dtype) for name, x in noise.items()}
