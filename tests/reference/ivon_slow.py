"""A slow twin of IVON: Shen et al. 2024, Algorithm 1, line by line over a dictionary of tensors.

No chunks, no views, no random numbers: gradients and noise of each draw are handed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


class SlowIVON:
    """The state of one parameter group: m, g, h and the number of steps t, by parameter name."""

    def __init__(
        self,
        mean: Tensors,
        lr: float,
        ess: float,
        hess_init: float,
        beta1: float = 0.9,
        beta2: float = 1 - 1e-5,
        weight_decay: float = 0.0,
        clip_radius: float = 1e-3,
        hess_approx: str = "price",
        batch_size: int | None = None,
        rescale_lr: bool = False,
        debias: bool = True,
    ) -> None:
        self.lr = lr * (hess_init + weight_decay) if rescale_lr else lr
        self.ess, self.beta1, self.beta2, self.delta, self.xi = ess, beta1, beta2, weight_decay, clip_radius
        self.batch_size = batch_size if hess_approx == "gradsq" else None
        self.debias = debias
        self.m = {name: m.clone() for name, m in mean.items()}
        self.g = {name: torch.zeros_like(m) for name, m in mean.items()}
        self.h = {name: torch.full_like(m, hess_init) for name, m in mean.items()}
        self.t = dict.fromkeys(mean, 0)

    def sigma(self, name: str) -> Tensor:
        return 1 / torch.sqrt(self.ess * (self.h[name] + self.delta))

    def draw(self, noise: Tensors) -> dict[str, Tensor]:
        return {name: m + self.sigma(name) * noise[name] for name, m in self.m.items()}

    def step(self, gradients: Sequence[Tensors], noises: Sequence[Tensors]) -> None:
        """One step from the gradients at each draw, averaged; a parameter that is missing in them stays as it is."""
        for name in gradients[0]:
            m, h, sigma = self.m[name], self.h[name], self.sigma(name)
            ghat, hhat = torch.zeros_like(m), torch.zeros_like(m)
            for gradient, noise in zip(gradients, noises):
                theta = m + sigma * noise[name]
                if self.batch_size is None:
                    curvature = gradient[name] * (theta - m) / sigma**2
                else:
                    curvature = self.batch_size * gradient[name] ** 2
                ghat = ghat + gradient[name] / len(gradients)
                hhat = hhat + curvature / len(gradients)
            self.t[name] += 1
            g = self.beta1 * self.g[name] + (1 - self.beta1) * ghat
            correction = 0.5 * (1 - self.beta2) ** 2 * (h - hhat) ** 2 / (h + self.delta)
            h = self.beta2 * h + (1 - self.beta2) * hhat + correction
            gbar = g / (1 - self.beta1 ** self.t[name]) if self.debias else g
            direction = (gbar + self.delta * m) / (h + self.delta)
            self.m[name] = m - self.lr * torch.clamp(direction, -self.xi, self.xi)
            self.g[name], self.h[name] = g, h
