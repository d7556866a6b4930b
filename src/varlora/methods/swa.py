"""SWA and SWAG: the average of the last part of the way, and a Gaussian from how it scatters.

From the fraction `start` of training on, or from a finished AdamW run on, the learning rate stays high and every
`every` steps the weights are a snapshot θᵢ. With θ̄ their mean, σ² their variance and D the last K deviations `θᵢ − θ̄ᵢ`
from the mean so far,

    SWA:   θ̄                                                  (Izmailov et al. 2018)
    SWAG:  N(θ̄, ½ diag(σ²) + D Dᵀ/(2(K − 1)))                 (Maddox et al. 2019, equation 1)

Mean and variance are kept by Welford's recurrence, in float32: the mean of squares minus the squared mean, which the
papers' code keeps, cancels all digits where weights are large beside their scatter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from varlora.errors import VarloraError
from varlora.methods.base import AdamWTraining, Plan, Trained
from varlora.posterior import LowRankGaussian, Point

__all__ = ["Swa", "Swag"]


@dataclass(frozen=True)
class _Averaging(AdamWTraining):
    """What SWA and SWAG share: when snapshots are taken, and at which learning rate."""

    continues_from: ClassVar[tuple[str, ...]] = ("adamw",)

    lr: float = 5e-5
    """Learning rate at the first step."""
    start: float = 0.5
    """Fraction of training after which snapshots are taken."""
    every: int = 10
    """Steps between snapshots."""
    average_lr: float | None = None
    """Learning rate while averaging; left out: half of `lr`."""
    shape: Literal["constant", "cyclic", "trainer"] = "constant"
    """Constant at `average_lr`; from `lr` down to it between two snapshots; or the Trainer's schedule throughout."""

    def problems(self, plan: Plan) -> list[str]:
        bounds = {
            "start": (0 <= self.start < 1, "a fraction of training from 0 to below 1"),
            "every": (self.every >= 1, "a number of steps >= 1"),
            "lr": (self.lr > 0, "a learning rate > 0"),
        }
        found = [
            f"Expected `{name}` to be {expected}, but got {getattr(self, name)}. "
            f"Set e.g. `method.{name}={getattr(_Averaging, name)}`."
            for name, (in_range, expected) in bounds.items()
            if not in_range
        ]
        if self.average_lr is not None and self.average_lr < 0:
            found.append(
                f"Expected `average_lr` to be a learning rate >= 0, but got {self.average_lr}. "
                "Leave it out for half of `lr`."
            )
        if not found and (count := self.snapshots(plan.steps)) < self.needed:
            found.append(
                f"Expected snapshots, at least {self.needed}, but {plan.steps} steps with `start` {self.start} and "
                f"`every` {self.every} give {count}. Train longer, or lower `every` or `start`."
            )
        return found

    @property
    def needed(self) -> int:
        """Snapshots that the posterior takes at the least."""
        return 1

    def collected(self, trained: Trained) -> Mapping[str, dict[str, Any]]:
        """Return what was collected of each parameter; raise if training was ended before there was enough."""
        count = trained.state.get("count", 0)
        if count < self.needed:
            raise VarloraError(
                f"Expected at least {self.needed} snapshots, but training ended after {count}. Train on to the end, or "
                "lower `start` or `every`."
            )
        weights: Mapping[str, dict[str, Any]] = trained.state["weights"]
        return weights

    def snapshots(self, total_steps: int) -> int:
        """Return how many snapshots training takes."""
        return (total_steps - self.first(total_steps)) // self.every

    def first(self, total_steps: int) -> int:
        """Return the step after which averaging begins."""
        return math.ceil(round(self.start * total_steps, 6))  # 0.55 * 100 is 55.000000000000007

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler | None:
        """Constant for half the way to the start, then linearly down to the averaging rate, which stays or cycles.

        References:
            Izmailov et al. 2018, section 3.2; the schedule of their experiments' code.
        """
        if self.shape == "trainer":
            return None
        first = self.first(total_steps)
        low = 0.5 if self.average_lr is None else self.average_lr / self.lr  # `problems` refuses a rate of 0

        def factor(step: int) -> float:  # of the learning rate, at the step numbered from 0
            if step >= first and self.shape == "cyclic":
                return 1 - (1 - low) * ((step - first) % self.every + 1) / self.every
            part = step / first if first else 1.0
            return 1 - (1 - low) * min(max((part - 0.5) / 0.4, 0), 1)

        return LambdaLR(optimizer, factor)

    @torch.no_grad()
    def after_step(
        self, params: Mapping[str, nn.Parameter], step: int, total_steps: int, state: dict[str, Any]
    ) -> None:
        """Take a snapshot, if it is time for one."""
        since = step - self.first(total_steps)
        if since <= 0 or since % self.every:
            return
        count = state["count"] = state.get("count", 0) + 1
        for name, p in params.items():
            theta = p.detach().float()
            mine = state.setdefault("weights", {}).setdefault(name, {})
            for key, value in mine.items():  # a checkpoint brings them back on the CPU
                mine[key] = value.to(p.device)
            mean = mine.setdefault("mean", torch.zeros_like(theta))
            before = theta - mean
            mean += before / count
            self.collect(mine, before, theta - mean)

    def collect(self, mine: dict[str, Any], before: torch.Tensor, after: torch.Tensor) -> None:
        """Keep more than the mean: called with a snapshot's deviation from the mean before and after it counts."""


@dataclass(frozen=True)
class Swa(_Averaging):
    """Train with AdamW and average the weights of the last part of training.

    Example:
        >>> weights, state = {"w": nn.Parameter(torch.zeros(1))}, {}
        >>> method = Swa(start=0.0, every=1)
        >>> for step in (1, 2):
        ...     _ = nn.init.constant_(weights["w"], step)
        ...     method.after_step(weights, step, 2, state)
        >>> posterior = method.posterior(Trained(None, rows=(), draw=None, forward=None, state=state))
        >>> posterior.mean["w"].item()
        1.5

    References:
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization; Onal et al. 2024,
        Gaussian Stochastic Weight Averaging for Bayesian Low-Rank Adaptation of Large Language Models.
    """

    name: ClassVar[str] = "swa"
    title: ClassVar[str] = "SWA"
    concludes_from: ClassVar[tuple[str, ...]] = ("swag",)

    def has_variances(self) -> bool:
        """A point has none."""
        return False

    def posterior(self, trained: Trained) -> Point:
        """Return the average, or the mean of a finished SWAG, which is the same."""
        if trained.sources:
            (swag,) = trained.sources
            assert isinstance(swag, LowRankGaussian)
            return Point(swag.mean)
        return Point({name: mine["mean"].clone() for name, mine in self.collected(trained).items()})


@dataclass(frozen=True)
class Swag(_Averaging):
    """Train with AdamW and fit a Gaussian to the weights of the last part of training.

    Example:
        >>> weights, state = {"w": nn.Parameter(torch.zeros(1))}, {}
        >>> method = Swag(start=0.0, every=1)
        >>> for step in (1, 2):
        ...     _ = nn.init.constant_(weights["w"], step)
        ...     method.after_step(weights, step, 2, state)
        >>> posterior = method.posterior(Trained(None, rows=(), draw=None, forward=None, state=state))
        >>> posterior.mean["w"].item(), posterior.std["w"].item()
        (1.5, 0.5)

    References:
        Maddox et al. 2019, A Simple Baseline for Bayesian Uncertainty in Deep Learning; Onal et al. 2024, Gaussian
        Stochastic Weight Averaging for Bayesian Low-Rank Adaptation of Large Language Models.
    """

    name: ClassVar[str] = "swag"
    title: ClassVar[str] = "SWAG"

    rank: int = 20
    """K: the last K deviations are kept."""

    @property
    def needed(self) -> int:
        """A variance takes two."""
        return 2

    def problems(self, plan: Plan) -> list[str]:
        """Fewer than two snapshots or deviations give no covariance."""
        found = super().problems(plan)
        if self.rank < 2:
            found.append(
                f"Expected `rank` to be a number of deviations >= 2, but got {self.rank}. "
                f"Set e.g. `method.rank={Swag.rank}`."
            )
        return found

    def collect(self, mine: dict[str, Any], before: torch.Tensor, after: torch.Tensor) -> None:
        """Add to the sum of squares (Welford), and keep the last K deviations."""
        mine["squares"] = mine.get("squares", 0) + before * after
        kept = mine.get("deviations", after.new_empty(0, *after.shape))
        mine["deviations"] = torch.cat([kept, after[None]])[-self.rank :]

    def posterior(self, trained: Trained) -> LowRankGaussian:
        """Return the Gaussian."""
        weights, count = self.collected(trained), trained.state["count"]
        return LowRankGaussian(
            {name: mine["mean"].clone() for name, mine in weights.items()},
            {name: (mine["squares"] / count).clamp(min=0).sqrt() for name, mine in weights.items()},
            {name: mine["deviations"].clone() for name, mine in weights.items()},
        )
