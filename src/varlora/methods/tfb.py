"""TFB, training-free Bayesianisation: as much noise in the adapter as its loss bears (Shi et al. 2024).

With B = U diag(d) Vᵀ, the adapter is written as B' = U diag(d) and A' = VᵀA, the same product. Row i of A' gets noise
of standard deviation σ/dᵢ, so that each direction of B's column space carries noise of the same size, and σ is the
largest for which

    NLL(σ) ≤ (1 + bound) NLL(0)

on some rows, the anchor set, with the average of S draws. All σ are tried with the same noise, so NLL(σ) is smooth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from varlora.adapter import lora_pairs
from varlora.errors import VarloraError
from varlora.methods.base import AdamWTraining, Plan, Trained
from varlora.params import copied, trainable
from varlora.posterior import DiagonalGaussian

__all__ = ["Tfb"]

FIRST = 0.01
"""The σ that is tried first."""
HALVINGS = 20
"""How often it is doubled or halved until it fails or passes, at the most."""
BISECTIONS = 6
"""Bisections of the last factor of two: σ is exact to about 1 %."""


@dataclass(frozen=True)
class Tfb(AdamWTraining):
    """Train with AdamW, then find the largest noise in the adapter that hardly raises the loss.

    Example:
        >>> lora = {"lora_A": nn.Linear(2, 1, bias=False), "lora_B": nn.Linear(1, 2, bias=False)}
        >>> model, d = nn.ModuleDict({"q": nn.ModuleDict(lora)}), lora["lora_B"].weight.norm().item()
        >>> def draw(posterior, rows, n):  # noise makes the right answer less sure
        ...     sigma = d * posterior.std["q.lora_A.weight"].mean().item()
        ...     return torch.tensor([[1 - sigma, 0.0]]).expand(max(n, 1), 1, 2), torch.tensor([0])
        >>> end = Trained(model, rows=["a row"], draw=draw, forward=None, say=lambda words: None)
        >>> sigma = d * Tfb(bound=0.1).posterior(end).std["q.lora_A.weight"].mean().item()
        >>> without, with_noise = (math.log(1 + math.exp(-logit)) for logit in (1, 1 - sigma))
        >>> round(with_noise / without, 2)
        1.1

    References:
        Shi et al. 2024, Training-Free Bayesianization for Low-Rank Adapters of Large Language Models.
    """

    name: ClassVar[str] = "tfb"
    title: ClassVar[str] = "TFB"
    concludes_from: ClassVar[tuple[str, ...]] = ("adamw", "swa", "ivon", "blob")

    bound: float = 0.003
    """Relative rise of the NLL that is borne."""
    anchor_rows: int = 500
    """Training rows, chosen by the seed, on which the NLL is taken."""
    samples: int = 10
    """Draws S that are averaged for it."""

    def problems(self, plan: Plan) -> list[str]:
        """Bound, rows and draws must leave something to search with."""
        found = []
        if not 0 < self.bound < math.inf:
            found.append(
                f"Expected `bound` to be a relative rise > 0, but got {self.bound}. "
                f"Set e.g. `method.bound={Tfb.bound}`."
            )
        found += [
            f"Expected `{name}` to be a whole number >= 1, but got {getattr(self, name)}. "
            f"Set e.g. `method.{name}={getattr(Tfb, name)}`."
            for name in ("anchor_rows", "samples")
            if getattr(self, name) < 1
        ]
        return found

    def check_model(self, model: nn.Module) -> None:
        """Raise if the adapter has more than A and B."""
        super().check_model(model)
        lora_pairs(trainable(model))

    def posterior(self, trained: Trained) -> DiagonalGaussian:
        """Turn the adapter, and search the scale."""
        mean, unit = turned({name: p.float() for name, p in copied(trained.model).items()})

        def noisy(sigma: float) -> DiagonalGaussian:
            return DiagonalGaussian(mean, {name: sigma * std for name, std in unit.items()})

        dead = sum(int((std[:, 0] == 0).sum()) for name, std in unit.items() if ".lora_A." in name)
        directions = sum(len(std) for name, std in unit.items() if ".lora_A." in name)
        if dead:
            trained.say(f"{dead} of {directions} directions of the adapter have no singular value and get no noise.")
        if dead == directions:
            return noisy(0.0)
        anchors, without = trained.at_mean(noisy(0.0), trained.some_rows(self.anchor_rows))
        if not anchors:
            raise VarloraError(
                "Expected training rows with finite logits, but there are none. Load the base in float32 or bfloat16."
            )
        trained.say(f"Searching the scale of the noise on {len(anchors)} training rows.")
        limit = (1 + self.bound) * without
        sigma = largest(lambda sigma: trained.nll(noisy(sigma), anchors, self.samples) <= limit)
        if sigma == 0:
            trained.say("No noise passes the bound, so there is none. Raise `bound`.")
        elif sigma >= FIRST * 2**HALVINGS:
            trained.say(f"No noise fails the bound up to a scale of {sigma:.4g}: the rows do not set it.")
        else:
            trained.say(f"The scale of the noise is {sigma:.4g}.")
        return noisy(sigma)


def turned(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the adapter as U diag(d) and VᵀA, and the standard deviations for σ = 1: 1/dᵢ in row i of A.

    Directions whose dᵢ is zero but for rounding get none: B passes nothing of them on.
    """
    mean, unit = {}, {}
    for a, b in lora_pairs(weights):
        wide = weights[b].shape[0] < weights[b].shape[1]  # a rank above the outputs: V is to be whole all the same
        u, d, vt = torch.linalg.svd(weights[b], full_matrices=wide)
        missing = len(vt) - len(d)
        u, d = nn.functional.pad(u, (0, missing)), nn.functional.pad(d, (0, missing))
        mean[a], mean[b] = vt @ weights[a], u * d
        least = d.max() * max(weights[b].shape) * torch.finfo(d.dtype).eps
        inverse = torch.where(d > least, 1 / d, 0.0)
        unit[a], unit[b] = inverse[:, None].expand_as(mean[a]).contiguous(), torch.zeros_like(mean[b])
    return mean, unit


def largest(passes: Callable[[float], bool]) -> float:
    """Return the largest σ found that passes, where larger ones fail; 0 if none does.

    Example:
        >>> round(largest(lambda sigma: sigma <= 0.3), 2)
        0.3
    """
    sigma = FIRST
    factor = 2.0 if passes(sigma) else 0.5
    for _ in range(HALVINGS):
        if passes(sigma * factor) != (factor > 1):
            break
        sigma *= factor
    else:
        return sigma if factor > 1 else 0.0
    low, high = sorted((sigma, sigma * factor))
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low
