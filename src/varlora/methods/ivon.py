"""IVON: variational learning of a diagonal Gaussian over the adapter, at AdamW's cost.

The optimizer (`varlora.IVON`) does all the work; the posterior is read from its state. Defaults are the paper's LoRA
recipe (its Table 3, ARC and OBQA columns). At β₂ = 1 − 1e-5 the Hessian hardly leaves its initial value, so the
posterior's scale is mostly σ₀ = 1/√(λ h₀), here 0.03: that is the setting to choose well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from varlora.methods.base import Method, Plan, Trained
from varlora.optim.ivon import IVON
from varlora.posterior import DiagonalGaussian

__all__ = ["Ivon"]

LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")


@dataclass(frozen=True)
class Ivon(Method):
    """Train with IVON and keep its Gaussian.

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON, Table 3; Shen et al. 2024, Algorithm 1.
    """

    name: ClassVar[str] = "ivon"
    title: ClassVar[str] = "IVON"

    lr: float = 0.03
    """Learning rate α at the first step; a weight moves by at most `lr * clip_radius` a step."""
    ess: float = 1e6
    """Effective sample size λ; the number of training rows approximates Bayes' posterior, more is colder."""
    hess_init: float = 1e-3
    """Initial Hessian h₀."""
    beta1: float = 0.9
    """Decay β₁ of the gradient's average."""
    beta2: float = 1 - 1e-5
    """Decay β₂ of the Hessian's average."""
    weight_decay: float = 0.0
    """Prior precision divided by λ, δ."""
    clip_radius: float = 1e-3
    """Bound ξ on each entry of the preconditioned step."""
    mc_samples: int = 1
    """Draws a step; more than one needs as many micro-batches a step (`accumulation`)."""
    hess_approx: str = "price"
    """Estimator of the Hessian: price or gradsq."""
    rescale_lr: bool = False
    """Whether to multiply the learning rate by h₀ + δ."""
    debias: bool = True
    """Whether to divide the momentum by 1 − β₁ᵗ."""

    def problems(self, plan: Plan) -> list[str]:
        """Each draw of a step takes a micro-batch of its own."""
        if self.mc_samples <= plan.accumulation:
            return []
        return [
            f"Expected `accumulation` to be at least `method.mc_samples`, but got {plan.accumulation} for "
            f"{self.mc_samples} draws a step: each draw takes a micro-batch of its own. "
            f"Set `accumulation={self.mc_samples}`."
        ]

    def optimizer(self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int) -> IVON:
        """Return IVON over the named parameters."""
        return IVON(list(params.items()), batch_size=batch_size, seed=seed, **asdict(self))

    def posterior(self, trained: Trained) -> DiagonalGaussian:
        """Read mean and variance from the optimizer."""
        assert isinstance(trained.optimizer, IVON)
        return trained.optimizer.posterior()

    def log(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Mean σ over all weights and by layer: where it jumps in the first steps, h₀ is far off (the paper's hint)."""
        assert isinstance(optimizer, IVON)
        sigma = optimizer.mean_sigma()
        sizes = {name: p.numel() for group in optimizer.param_groups for name, p in _named(group)}
        lots: dict[str, list[str]] = defaultdict(list)
        for name in sigma:
            lots["sigma"].append(name)
            if layer := LAYER.search(name):
                lots[f"sigma/layer_{int(layer[1]):02d}"].append(name)
        return {
            lot: sum(sigma[name] * sizes[name] for name in names) / sum(sizes[name] for name in names)
            for lot, names in lots.items()
        }


def _named(group: dict[str, Any]) -> Iterable[tuple[str, nn.Parameter]]:
    return zip(group["param_names"], group["params"])
