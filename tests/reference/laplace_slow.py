"""A slow twin of Laplace: the matrices of its equations, row by row, token by token and class by class, in float64.

Nothing is batched or padded, no root of Λ is taken and no eigenvalue is left out. A row is a batch of one, without the
answers that it lacks. Of a weight matrix (out, in) the weight (o, i) is number `o in + i`, so that the Kronecker
product of G and A is `np.kron(G, A)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Tensor]
Array = np.ndarray


def fisher(logits: Tensor) -> Array:
    """Λ = diag(p) − ppᵀ, (C, C)."""
    p = torch.softmax(logits.detach().double(), -1).numpy()
    return np.diag(p) - np.outer(p, p)


def wide(model: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return a copy in float64, and its parameters that train."""
    model = copy.deepcopy(model).double()
    return model, {name: p for name, p in model.named_parameters() if p.requires_grad}


def jacobian(model: nn.Module, batch: Any, forward: Forward) -> tuple[Array, Tensor]:
    """Return the gradients of one row's logits with respect to all weights, one class at a time, and the logits."""
    model, params = wide(model)
    logits = forward(model, batch)[0]
    J = []
    for logit in logits:
        gradients = torch.autograd.grad(logit, list(params.values()), retain_graph=True)
        J.append(np.concatenate([g.numpy().ravel() for g in gradients]))
    return np.stack(J), logits


def gauss_newton(model: nn.Module, rows: Sequence[Any], forward: Forward) -> Array:
    """H = Σₙ JₙᵀΛₙJₙ over all weights, (P, P)."""
    H: Any = 0.0
    for batch in rows:
        J, logits = jacobian(model, batch, forward)
        H = H + J.T @ fisher(logits) @ J
    return H


def blocks(model: nn.Module, whole: Array) -> dict[str, Array]:
    """Return the part of a matrix (P, P) that belongs to each weight matrix."""
    found, at = {}, 0
    for name, p in wide(model)[1].items():
        found[name] = whole[at : at + p.numel(), at : at + p.numel()]
        at += p.numel()
    return found


def kronecker_factors(
    model: nn.Module, rows: Sequence[Any], forward: Forward
) -> tuple[dict[str, Array], dict[str, Array], int]:
    """A = Σ aaᵀ and G = Σ_cd Λ_cd g_c g_dᵀ, both over all tokens of all rows, by weight; and the number of tokens M.

    g_c is the gradient of logit c with respect to what the layer puts out at a token, found by adding a zero to it.
    """
    A: dict[str, Any] = {}
    G: dict[str, Any] = {}
    tokens = 0
    for batch in rows:
        wide_model, params = wide(model)
        inputs: dict[str, Tensor] = {}
        zeros: dict[str, Tensor] = {}

        def hook(name: str, inputs: dict[str, Tensor] = inputs, zeros: dict[str, Tensor] = zeros) -> Any:
            def add_zero(layer: nn.Module, arguments: Any, output: Tensor) -> Tensor:
                inputs[name], zeros[name] = arguments[0].detach(), torch.zeros_like(output, requires_grad=True)
                return output + zeros[name]

            return add_zero

        for name in params:
            wide_model.get_submodule(name.rpartition(".")[0]).register_forward_hook(hook(name))
        logits = forward(wide_model, batch)[0]
        length = batch["input_ids"].shape[1]
        tokens += length
        for name in params:
            g = [torch.autograd.grad(logit, zeros[name], retain_graph=True)[0][0].numpy() for logit in logits]
            for t in range(length):
                a = inputs[name][0, t].numpy()
                A[name] = A.get(name, 0.0) + np.outer(a, a)
                for c, row in enumerate(fisher(logits)):
                    for d, weight in enumerate(row):
                        G[name] = G.get(name, 0.0) + weight * np.outer(g[c][t], g[d][t])
    return A, G, tokens


def kronecker(model: nn.Module, rows: Sequence[Any], forward: Forward) -> dict[str, Array]:
    """G ⊗ A/M by weight."""
    A, G, tokens = kronecker_factors(model, rows, forward)
    return {name: np.kron(G[name], A[name]) / tokens for name in A}


def truncated(S: Array, rank: int) -> Array:
    """Return the best approximation of a symmetric matrix that has this rank."""
    values, vectors = np.linalg.eigh(S)
    return (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T


def log_evidence(delta: float, eigenvalues: Array, square: float) -> float:
    """½ (P log δ − Σᵢ log(hᵢ + δ) − δ‖θ*‖²), with all P eigenvalues, but for what does not depend on δ."""
    return 0.5 * (len(eigenvalues) * np.log(delta) - np.log(eigenvalues + delta).sum() - delta * square)


def nll(logits: Tensor, labels: Sequence[int] | Tensor) -> float:
    """Return the mean of −log of the label's probability, averaged over draws; logits (S, N, C)."""
    exponentials = np.exp(logits.double().numpy() - logits.double().numpy().max(-1, keepdims=True))
    probs = (exponentials / exponentials.sum(-1, keepdims=True)).mean(0)
    return float(-np.mean([np.log(row[label]) for row, label in zip(probs, labels)]))


def square_norm(weights: Mapping[str, Tensor]) -> float:
    """‖θ‖²."""
    return float(sum((w.detach().double().numpy() ** 2).sum() for w in weights.values()))
