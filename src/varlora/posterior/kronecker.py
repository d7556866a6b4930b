"""A Gaussian whose precision is a Kronecker product plus a multiple of the identity: KFAC-Laplace's posterior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from varlora.drawing import Source, normal
from varlora.errors import VarloraError
from varlora.posterior.base import WeightPosterior, check_fits, check_tau, prefixed, without_prefix

__all__ = ["KroneckerGaussian"]


@dataclass(frozen=True, repr=False)
class KroneckerGaussian(WeightPosterior):
    r"""For each weight matrix W (out, in) a Gaussian whose covariance has eigenvectors `uⱼ vᵢᵀ`.

    With U (out, k) and V (in, l) orthonormal, the component of W along `uⱼ vᵢᵀ` has variance sⱼᵢ, and whatever is
    orthogonal to all of these has variance r. So a draw is, with E ~ N(0, I) of W's shape,
    `W + √r E + U ((√s − √r) ∘ (Uᵀ E V)) Vᵀ`: a factor's large side may be of low rank, and no covariance is formed.

    Example:
        >>> import torch
        >>> e1 = torch.eye(2)[:, :1]
        >>> posterior = KroneckerGaussian(
        ...     {"w": torch.zeros(2, 2)}, {"w": e1}, {"w": e1}, {"w": torch.full((1, 1), 4.0)}, torch.tensor(1.0)
        ... )
        >>> posterior.quadratic("w", torch.eye(4).view(1, 4, 2, 2)).diagonal(dim1=1, dim2=2).tolist()
        [[4.0, 1.0, 1.0, 1.0]]

    References:
        Ritter et al. 2018, A Scalable Laplace Approximation for Neural Networks; Yang et al. 2024, Bayesian Low-rank
        Adaptation for Large Language Models (the low rank of the large sides).
    """

    kind: ClassVar[str] = "kronecker_gaussian"

    mean: Mapping[str, Tensor]
    """W by parameter name, (out, in)."""
    left: Mapping[str, Tensor]
    """U by parameter name, (out, k) with orthonormal columns, k <= out."""
    right: Mapping[str, Tensor]
    """V by parameter name, (in, l) with orthonormal columns, l <= in."""
    variance: Mapping[str, Tensor]
    """s by parameter name, (k, l)."""
    rest: Tensor
    """r, the variance of what is orthogonal to all `uⱼ vᵢᵀ`; without dimensions."""

    def __post_init__(self) -> None:
        for side, (what, vectors) in enumerate({"left": self.left, "right": self.right}.items()):
            shapes = {n: (m.shape[side], vectors[n].shape[-1]) for n, m in self.mean.items() if n in vectors}
            check_fits(self.mean, what, shapes, vectors)
        ranks = {n: (self.left[n].shape[1], self.right[n].shape[1]) for n in self.mean}
        check_fits(self.mean, "variance", ranks, self.variance)
        for what, value in {"rest": self.rest, **self.variance}.items():
            if (value < 0).any() or (what == "rest" and value.dim()):
                raise VarloraError(
                    f"Expected variances >= 0, and `rest` to be one, but got {value.min().item()} of shape "
                    f"{tuple(value.shape)} in `{what}`."
                )

    def draw(self, generator: Source) -> dict[str, Tensor]:
        """Return one draw of the weights by parameter name."""
        drawn = {}
        for name in sorted(self.mean):
            mean, left, right = self.mean[name], self.left[name], self.right[name]
            noise, rest = normal(mean, generator), self.rest.to(mean.device).sqrt()
            within = (self.variance[name].sqrt() - rest) * (left.T @ noise @ right)  # (k, l)
            drawn[name] = mean + rest * noise + left @ within @ right.T
        return drawn

    def quadratic(self, name: str, gradients: Tensor) -> Tensor:
        """Return the covariance that one parameter gives to linear functions of it, (B, C, C) float64."""
        gradients, left, right = (part.double() for part in (gradients, self.left[name], self.right[name]))
        along = left.T @ gradients @ right  # (B, C, k, l)
        beyond = (gradients - left @ along @ right.T).flatten(2)  # r - s times all would leave rounding errors of r
        along = along.flatten(2)
        rest = self.rest.to(beyond)
        return rest * (beyond @ beyond.mT) + (along * self.variance[name].flatten().double()) @ along.mT

    def marginal_std(self) -> dict[str, Tensor]:
        """Return the root of the covariance's diagonal, r (1 − Σⱼᵢ uⱼ² vᵢ²) + Σⱼᵢ sⱼᵢ uⱼ² vᵢ², by parameter name."""
        found = {}
        for name, variance in self.variance.items():
            # r may be millions of times s, and eigenvectors of 32 bits are orthonormal to a ten-millionth
            left, right = (torch.linalg.qr(side[name].double())[0].square() for side in (self.left, self.right))
            beyond = (1 - left.sum(1)[:, None] * right.sum(1)).clamp_min(0)
            diagonal = self.rest.to(beyond) * beyond + left @ variance.double() @ right.T
            found[name] = diagonal.sqrt().to(variance.dtype)
        return found

    def scale(self, tau: float) -> KroneckerGaussian:
        """Return the Gaussian with `tau` times the covariance."""
        check_tau(tau)
        variance = {name: value * tau for name, value in self.variance.items()}
        return KroneckerGaussian(self.mean, self.left, self.right, variance, self.rest * tau)

    def tensors(self) -> dict[str, Tensor]:
        """Mean, eigenvectors and variances, as `mean.`, `left.`, `right.` and `variance.<parameter>`, and `rest`."""
        fields = {name: prefixed(name, getattr(self, name)) for name in ("mean", "left", "right", "variance")}
        return {key: value for field in fields.values() for key, value in field.items()} | {"rest": self.rest}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> KroneckerGaussian:
        """Rebuild from `tensors()`."""
        mean, left, right, variance = (without_prefix(name, tensors) for name in ("mean", "left", "right", "variance"))
        return cls(mean, left, right, variance, tensors["rest"])
