"""The generalised Gauss-Newton matrix H of a classifier's loss: its diagonal or Kronecker factors, and the evidence.

    H = Σₙ JₙᵀΛₙJₙ,  Λₙ = diag(pₙ) − pₙpₙᵀ = LₙLₙᵀ

with Jₙ (C, P) the gradients of row n's class logits. A backward pass for each column of L gives all that is needed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from varlora.drawing import normal
from varlora.errors import VarloraError
from varlora.params import flat
from varlora.posterior import DiagonalGaussian, KroneckerGaussian
from varlora.posterior.base import Gaussian

__all__ = ["RANGE", "Curvature", "Diagonal", "Factor", "Kronecker", "best_evidence", "root", "sampled_root"]

RANGE = (1e-4, 1e8)
"""Between these the prior precision is looked for."""
WHOLE = 256
"""Up to this size a matrix's smaller side, which is the adapter's rank, is not cut to fewer eigenvectors."""


class Curvature(Protocol):
    """What a pass over the training rows collects of H."""

    def add(
        self, inputs: Mapping[str, Tensor], gradients: Sequence[Mapping[str, Tensor]], tokens: Mapping[str, int]
    ) -> None:
        """Add a batch.

        Args:
            inputs: (B, T, in) by the name of the layer's weight, 0 at padding.
            gradients: (B, T, out) by name, for each column of a root of Λ.
            tokens: positions that are no padding, by name: an output layer may see but one of each row.
        """

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues of H that differ from zero, (n,) float64."""
        ...

    def gaussian(self, mean: Mapping[str, Tensor], precision: float) -> Gaussian:
        """Return N(mean, (H + precision I)⁻¹)."""
        ...


def root(probs: Tensor) -> list[Tensor]:
    """Return the C − 1 columns, (B, C) each, of a root L of Λ = diag(p) − ppᵀ = LLᵀ, with L its Cholesky factor.

    References:
        Tanabe and Sagae 1992, An Exact Cholesky Decomposition and the Generalized Inverse of the Variance-Covariance
        Matrix of the Multinomial Distribution.

    Example:
        >>> p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
        >>> L = torch.stack(root(p), -1)
        >>> torch.allclose(L @ L.mT, torch.diag_embed(p) - p[:, :, None] * p[:, None])
        True
    """
    after = probs.flip(-1).cumsum(-1).flip(-1)  # q_{i-1} = p_i + q_i: the mass from i on
    columns = []
    for i in range(probs.shape[1] - 1):
        p, q, both = probs[:, i], after[:, i + 1], after[:, i]
        column = torch.zeros_like(probs)
        column[:, i] = (p * q / both).nan_to_num(nan=0.0).sqrt()
        column[:, i + 1 :] = -(probs[:, i + 1 :] / q[:, None]).nan_to_num(nan=0.0) * column[:, i : i + 1]
        columns.append(column)
    return columns


def sampled_root(probs: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return one column, `e_y − p` with y drawn from p: its outer product is Λ on average (the Fisher matrix)."""
    drawn = torch.multinomial(probs.to(generator.device), 1, generator=generator).to(probs.device)
    return [torch.zeros_like(probs).scatter_(1, drawn, 1.0) - probs]


def best_evidence(eigenvalues: Tensor, square: float) -> float:
    """Return the δ that maximises the evidence: where `Σᵢ hᵢ/(hᵢ + δ) = δ‖θ*‖²`, its derivative's only root.

    Args:
        eigenvalues: those of H that differ from zero, (n,) float64; others do not matter.
        square: ‖θ*‖².

    Returns:
        δ, within `RANGE`.

    References:
        MacKay 1992, A Practical Bayesian Framework for Backpropagation Networks, section 4 (γ = δ‖θ‖²).
    """
    low, high = (math.log(end) for end in RANGE)
    for _ in range(60):  # the left side falls with δ and the right side rises
        middle = (low + high) / 2
        delta = math.exp(middle)
        if (eigenvalues / (eigenvalues + delta)).sum().item() > delta * square:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


class Diagonal:
    """The diagonal of H."""

    def __init__(self) -> None:
        self.h: dict[str, Tensor] = {}

    def add(
        self, inputs: Mapping[str, Tensor], gradients: Sequence[Mapping[str, Tensor]], tokens: Mapping[str, int]
    ) -> None:
        """Add the squared gradients of each row."""
        for g in gradients:
            for name, a in inputs.items():
                squares = (g[name].mT @ a).square().sum(0)  # (B, out, in) -> (out, in)
                self.h[name] = self.h[name] + squares if name in self.h else squares

    def eigenvalues(self) -> Tensor:
        """Return the diagonal."""
        return flat(h.double() for h in self.h.values())

    def gaussian(self, mean: Mapping[str, Tensor], precision: float) -> DiagonalGaussian:
        """Return N(mean, diag(1/(h + precision)))."""
        return DiagonalGaussian(mean, {name: (self.h[name] + precision).rsqrt() for name in mean})


class Kronecker:
    """For each weight matrix `H ≈ G ⊗ A/M`: A = Σ aaᵀ of the layer's inputs, G = Σ ggᵀ of its outputs' gradients.

    Both sums go over all M tokens of all rows (KFAC-expand of Eschenhagen et al. 2023). Dividing by the number of rows
    instead, as Laplace-LoRA's code does, makes H as many times larger as a row has tokens.
    """

    def __init__(self, rank: int, generator: torch.Generator, say: Callable[[str], None]) -> None:
        self.rank, self.generator, self.say = rank, generator, say
        self.tokens = defaultdict[str, int](int)
        self.a: dict[str, Factor] = {}
        self.g: dict[str, Factor] = {}
        self._omegas = defaultdict[tuple[int, int], dict[torch.device, Tensor]](dict)
        self._eigen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(
        self, inputs: Mapping[str, Tensor], gradients: Sequence[Mapping[str, Tensor]], tokens: Mapping[str, int]
    ) -> None:
        """Add each token's outer products."""
        for name, a in inputs.items():
            self.tokens[name] += tokens[name]
            if name not in self.a:
                out = gradients[0][name]
                wide = a.shape[-1] >= out.shape[-1]
                self.a[name] = Factor(self.rank, self._omega(a, smaller=not wide))
                self.g[name] = Factor(self.rank, self._omega(out, smaller=wide))
            self.a[name].add(a)
            for g in gradients:
                self.g[name].add(g[name])

    def eigenvalues(self) -> Tensor:
        """Return the products of the factors' eigenvalues."""
        return flat(values for _, _, values in self._decomposed().values())

    def gaussian(self, mean: Mapping[str, Tensor], precision: float) -> KroneckerGaussian:
        """Return N(mean, (G ⊗ A/M + precision I)⁻¹) for each matrix."""
        left, right, variance = {}, {}, {}
        for name, (u, v, values) in self._decomposed().items():
            left[name], right[name] = u.float().contiguous(), v.float().contiguous()
            variance[name] = (1 / (values + precision)).float()
        return KroneckerGaussian(mean, left, right, variance, torch.tensor(1 / precision, device=values.device))

    def numbers(self) -> int:
        """Return how many numbers the factors and what sketches them hold."""
        factors = [*self.a.values(), *self.g.values()]
        omegas = [omega for on_devices in self._omegas.values() for omega in on_devices.values()]
        return sum(factor.y.numel() for factor in factors) + sum(omega.numel() for omega in omegas)

    def _decomposed(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return for each matrix U (out, k), V (in, l) and the eigenvalues of G ⊗ A/M, (k, l); float64."""
        if not self._eigen:
            damped = 0
            for name in self.a:
                (gammas, u, worse), (alphas, v, bad) = self.g[name].eigen(), self.a[name].eigen()
                self._eigen[name] = u, v, gammas[:, None] * alphas / self.tokens[name]
                damped += worse + bad
            if damped:
                self.say(f"{damped} of {2 * len(self.a)} curvature factors were not positive definite: damped.")
        return self._eigen

    def _omega(self, vectors: Tensor, smaller: bool) -> Tensor:
        """Return the test matrix of factors of this size, the same for all of them; the identity for small ones.

        Args:
            vectors: (..., size).
            smaller: whether this is the smaller side of its matrix.
        """
        size = vectors.shape[-1]
        width = min(size, 2 * self.rank) if size > WHOLE or not smaller else size
        on_devices = self._omegas[size, width]
        if not on_devices:
            whole = torch.eye(size, device=vectors.device)
            on_devices[whole.device] = normal(whole, self.generator, size, width) if width < size else whole
        elif vectors.device not in on_devices:
            on_devices[vectors.device] = next(iter(on_devices.values())).to(vectors.device)
        return on_devices[vectors.device]


class Factor:
    """`S = Σ xxᵀ` of a stream of vectors (d,): its first eigenvectors, from the sketch SΩ (d, 2 rank).

    The sketch is exact where Ω is the identity, which small factors have. Unlike an incremental singular value
    decomposition it does not depend on the order of the vectors, and costs 4 d rank operations for each.

    References:
        Tropp et al. 2017, Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming Data, algorithm 3.
    """

    def __init__(self, rank: int, omega: Tensor) -> None:
        self.rank, self.omega = rank, omega
        self.y = torch.zeros_like(omega)

    def add(self, vectors: Tensor) -> None:
        """Add vectors, (..., d)."""
        x = vectors.flatten(0, -2)
        self.y += x.mT @ (x @ self.omega)

    def eigen(self) -> tuple[Tensor, Tensor, bool]:
        """Return eigenvalues (k,), eigenvectors (d, k), float64, largest first, and whether S had to be damped.

        k is the rank where S is sketched, else d.
        """
        y, omega = self.y.double(), self.omega.double()
        size, width = y.shape
        if not y.isfinite().all():
            raise VarloraError("Expected finite curvature, but it overflows. Load the base in float32 or bfloat16.")
        if size == width:
            values, vectors = torch.linalg.eigh((y + y.mT) / 2)
            damped = bool(values[0] < -1e-5 * values[-1].abs())
            return values.clamp(min=0).flip(0), vectors.flip(1), damped
        # sums in float32 leave rounding of this size; a shift that has to be larger is damping
        rounding = size**0.5 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(y).clamp(min=1e-300)
        shift = rounding
        while True:
            shifted = y + shift * omega
            lower, failed = torch.linalg.cholesky_ex(omega.mT @ shifted)
            if not failed:
                break
            shift = 10 * shift
        damped = bool(shift > 1e3 * rounding)
        left = torch.linalg.solve_triangular(lower, shifted.mT, upper=False).mT  # (d, width): S ≈ left leftᵀ
        vectors, roots, _ = torch.linalg.svd(left, full_matrices=False)
        return (roots.square() - shift).clamp(min=0)[: self.rank], vectors[:, : self.rank], damped
