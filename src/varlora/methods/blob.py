"""BLoB: a Gaussian over A learned along with its mean by backpropagation (Wang et al. 2024, arXiv:2406.11675).

The posterior of each A is N(M, diag(σ²)) with σ = G∘G; B is a point. A training pass sees A through flipout: with
E ~ N(0, 1) of A's shape, one for each step, and random signs s (inputs) and t (rank) for each row of the batch,

    x Aᵀ  becomes  x Mᵀ + ((x∘s) (σ∘E)ᵀ)∘t

One step minimises NLL + πᵢ KL(N(M, σ²) || N(0, σₚ²)), i counting the steps of a cycle of C, with three updates:

    M, B ← AdamW(∇NLL);   M ← M − κ πᵢ M/σₚ²;   G ← G − κ (∂NLL/∂G + πᵢ (2Gσ/σₚ² − 2G/σ))
    πᵢ = 2ⁱ/(2ᶜ⁺¹ − 1),   C = 100 N^(π/γ)/batch size

Order, weights and defaults are those of the authors' code (Wang-ML-Lab/bayesian-peft). It draws signs for each row and
token. Here they are a row's, as the tokens of a row depend on the padding, and so on the rows that share its batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LambdaLR

from varlora.adapter import check_no_dora
from varlora.errors import VarloraError
from varlora.methods.base import Method, Plan, Trained
from varlora.optim.shards import ranks
from varlora.params import flat
from varlora.posterior import DiagonalGaussian

__all__ = ["Blob"]

WARMUP = 0.06
"""Share of the steps in which the learning rates rise."""
TINY = 1e-6
"""Added to σ where it is divided by or its logarithm taken: G may pass through 0. The authors' value."""


@dataclass(frozen=True)
class Blob(Method):
    """Train a Gaussian over A, and a point B, by backpropagation.

    Example:
        >>> params = {f"q.lora_{side}.default.weight": nn.Parameter(torch.ones(1, 1)) for side in "AB"}
        >>> method = Blob(sigma_init=0.05)
        >>> optimizer = method.optimizer(params, num_examples=100, batch_size=4, seed=0)
        >>> end = Trained(None, rows=(), draw=None, forward=None, optimizer=optimizer)
        >>> [0.00125 <= std.item() <= 0.0025 for std in method.posterior(end).std.values()]  # B's is 0
        [True, False]

    References:
        Wang et al. 2024, BLoB: Bayesian Low-Rank Adaptation by Backpropagation for Large Language Models; flipout is of
        Wen et al. 2018, Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches.
    """

    name: ClassVar[str] = "blob"
    title: ClassVar[str] = "BLoB"

    lr: float = 1e-4
    """Learning rate of AdamW, for M and B, after the warm-up."""
    kl_lr: float = 0.01
    """Learning rate κ of gradient descent, for G and for the prior's pull on M, after the warm-up."""
    prior_std: float = 0.2
    """Standard deviation σₚ of the prior of each weight of A."""
    sigma_init: float = 0.05
    """The largest initial G: G ~ U(sigma_init/√2, sigma_init), so σ starts between half its square and its square."""
    gamma: float = 8.0
    """γ: the larger, the shorter the cycle in which the KL's weights add up to one, and the more the prior counts."""
    beta1: float = 0.9
    """Decay of the gradient's average."""
    beta2: float = 0.999
    """Decay of the squared gradient's average."""
    eps: float = 1e-6
    """Added to the root of the squared gradient's average."""
    weight_decay: float = 0.0
    """Decoupled weight decay of M and B."""

    def problems(self, plan: Plan) -> list[str]:
        """Settings out of their range."""
        bounds: dict[str, tuple[Callable[[float], bool], str]] = {
            "lr": (lambda x: x >= 0, "a learning rate >= 0"),
            "kl_lr": (lambda x: x >= 0, "a learning rate >= 0"),
            "prior_std": (lambda x: x > 0, "a number > 0"),
            "sigma_init": (lambda x: x > 0, "a number > 0"),
            "gamma": (lambda x: x >= 1, "a number >= 1"),
            "beta1": (lambda x: 0 <= x < 1, "a decay within [0, 1)"),
            "beta2": (lambda x: 0 <= x < 1, "a decay within [0, 1)"),
            "eps": (lambda x: x >= 0, "a number >= 0"),
            "weight_decay": (lambda x: x >= 0, "a number >= 0"),
        }
        return [
            f"Expected `{name}` to be {expected}, but got {value!r}. Set e.g. `method.{name}={getattr(Blob, name)}`."
            for name, (in_range, expected) in bounds.items()
            if not (math.isfinite(value := getattr(self, name)) and in_range(value))
        ]

    def check_model(self, model: nn.Module) -> None:
        """Flipout adds noise to what A gives, of which DoRA takes the norm as well."""
        check_no_dora(model)

    def optimizer(
        self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int
    ) -> _BlobOptimizer:
        """Return the optimizer, which owns G.

        Raises:
            VarloraError: several processes train together.
        """
        if ranks()[1] > 1:
            raise VarloraError(
                f"Expected one process for `blob`, as G's gradient is not averaged over several, but {ranks()[1]} "
                "train together. Start it without torchrun or `accelerate launch`."
            )
        return _BlobOptimizer(params, self, num_examples, batch_size, seed)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
        """Both learning rates rise from 0 for 6 % of the steps, then fall to 0, linearly."""
        warmup = WARMUP * total_steps

        def factor(step: int) -> float:  # of the learning rates, at the step numbered from 0
            if step < warmup:
                return step / max(1, warmup)
            return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

        return LambdaLR(optimizer, factor)

    @contextmanager
    def training(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within the context, each A in training mode adds its flipout noise."""
        assert isinstance(optimizer, _BlobOptimizer)
        names: dict[Tensor, str] = {optimizer.params[name]: name for name in optimizer.G}

        def hook(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return output + optimizer.noise(names[layer.weight], inputs[0]) if layer.training else None

        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight in names]
        handles = [layer.register_forward_hook(hook) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def posterior(self, trained: Trained) -> DiagonalGaussian:
        """Read M, B and σ from the optimizer; B's σ is 0."""
        optimizer = trained.optimizer
        assert isinstance(optimizer, _BlobOptimizer)
        mean = {name: optimizer.mean(name).clone() for name in optimizer.params}
        sigma = {name: G.detach().square() for name, G in optimizer.G.items()}
        return DiagonalGaussian(mean, {name: sigma.get(name, torch.zeros_like(mean[name])) for name in mean})

    @torch.no_grad()
    def log(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, float]:
        """Mean σ over all weights of A, and the KL divergence from the prior, in nats."""
        assert isinstance(optimizer, _BlobOptimizer)
        sigma = flat(G.square() for G in optimizer.G.values())
        kl = sum(_kl(optimizer.mean(name), G, self.prior_std).item() for name, G in optimizer.G.items())
        return {"sigma": sigma.mean().item(), "kl": kl}


class _BlobOptimizer(torch.optim.Optimizer):
    """The three updates, and the noise: a function of the seed, the step and the layer, and for signs of the row.

    The first group holds M and B, the second G: a schedule scales both learning rates, and a GradScaler both gradients.
    The means are kept in float32, as a 16-bit weight does not move by a rate of 1e-4.
    """

    def __init__(
        self, params: Mapping[str, nn.Parameter], method: Blob, num_examples: int, batch_size: int, seed: int
    ) -> None:
        self.params, self.method, self.batch_size, self.seed = dict(params), method, batch_size, seed
        self.cycle = max(1, int(100 * num_examples ** (math.pi / method.gamma) / batch_size))
        self.G: dict[str, Tensor] = {}
        for name, p in self.params.items():
            if ".lora_A." in name:
                G, low = torch.empty_like(p, dtype=torch.float32, requires_grad=False), method.sigma_init / math.sqrt(2)
                G.uniform_(low, method.sigma_init, generator=self._generator(p, "G", name))
                self.G[name] = G.requires_grad_()
        means = {"params": list(self.params.values()), "lr": method.lr, "steps": 0}
        super().__init__([means, {"params": list(self.G.values()), "lr": method.kl_lr}], {})
        for p in self.params.values():
            mean = p.detach().to(torch.float32, copy=True)
            self.state[p] = {"mean": mean, "m": torch.zeros_like(mean), "v": torch.zeros_like(mean)}
        for G in self.G.values():
            self.state[G] = {"G": G.detach()}  # the same memory
        self._begin()

    def mean(self, name: str) -> Tensor:
        """Return the mean of a parameter, float32."""
        return self.state[self.params[name]]["mean"]

    def _begin(self) -> None:
        """Begin a step: new noise, the first row, and no gradient of G."""
        self.drawn: dict[str, tuple[Tensor, Tensor]] = {}  # E, and the signs of all rows of the step, by layer
        self.row = self.rows = 0  # where the micro-batch begins in the step, and its rows once they are known
        for G in self.G.values():
            G.grad = None

    def train(self) -> None:
        """Call this before the forward pass of each micro-batch: its rows follow those of the one before."""
        if all(p.grad is None for p in self.params.values()):  # the first, also after a step that a GradScaler left out
            self._begin()
        self.row, self.rows = self.row + self.rows, 0

    def noise(self, name: str, x: Tensor) -> Tensor:
        """Return the flipout noise of a layer's output, the same each time that a micro-batch runs through it.

        Args:
            name: the layer's A.
            x: its input, (B, ..., in).
        """
        G = self.G[name]
        if name not in self.drawn:
            generator, size = self._generator(G, self.param_groups[0]["steps"], name), (self.batch_size, sum(G.shape))
            E = torch.empty_like(G, requires_grad=False).normal_(generator=generator)
            signs = torch.randint(2, size, generator=generator, device=G.device, dtype=torch.int8).mul_(2).sub_(1)
            self.drawn[name] = E, signs
        E, signs = self.drawn[name]
        self.rows = len(x)
        mine = signs[self.row : self.row + len(x)].view(len(x), *[1] * (x.dim() - 2), -1)  # (B, 1, in + rank)
        s, t = mine.split([G.shape[1], G.shape[0]], dim=-1)
        return F.linear(x * s, (G.square() * E).to(x.dtype)) * t

    def _generator(self, like: Tensor, *key: Any) -> torch.Generator:
        """Return a generator whose seed hashes the run's seed and a key."""
        return torch.Generator(like.device).manual_seed(random.Random(repr((self.seed, *key))).getrandbits(63))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the three updates; without any gradient of M or B, nothing moves and G's gradient is dropped."""
        loss = torch.enable_grad()(closure)() if closure is not None else None
        if moved := [p for p in self.params.values() if p.grad is not None]:
            self._descend_nll(moved)
            self._descend_elbo()
            for name, p in self.params.items():
                p.copy_(self.mean(name))
            self.param_groups[0]["steps"] += 1
        self._begin()
        return loss

    def _descend_nll(self, moved: list[nn.Parameter]) -> None:
        """M, B ← AdamW(∇NLL)."""
        of, group = self.method, self.param_groups[0]
        mean, m, v = ([self.state[p][key] for p in moved] for key in ("mean", "m", "v"))
        gradients = [p.grad.float() for p in moved if p.grad is not None]
        steps = [torch.tensor(float(group["steps"])) for _ in moved]  # `adamw` adds one to each
        settings: dict[str, Any] = {
            "beta1": of.beta1,
            "beta2": of.beta2,
            "eps": of.eps,
            "weight_decay": of.weight_decay,
        }
        adamw(mean, gradients, m, v, [], steps, amsgrad=False, maximize=False, lr=group["lr"], **settings)

    def _descend_elbo(self) -> None:
        """M ← M − κ πᵢ ∂KL/∂M;  G ← G − κ (∂NLL/∂G + πᵢ ∂KL/∂G), the KL's gradient at the M that AdamW left."""
        lr, weight = self.param_groups[1]["lr"], _kl_weight(self.param_groups[0]["steps"], self.cycle)
        for name, G in self.G.items():
            to_M, to_G = _kl_gradient(self.mean(name), G, self.method.prior_std)
            self.mean(name).sub_(to_M, alpha=lr * weight)
            G.sub_(to_G * weight + (0 if G.grad is None else G.grad), alpha=lr)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore means, moments, G and the count of steps in the types they have here."""
        state = self.state
        super().load_state_dict(state_dict)  # the groups; torch rounds the state to the parameters' type
        self.state = state
        for index, tensor in enumerate([*self.params.values(), *self.G.values()]):
            for key, value in state_dict["state"][index].items():
                state[tensor][key].copy_(value)


def _kl(M: Tensor, G: Tensor, prior_std: float) -> Tensor:
    """Return KL(N(M, σ²) || N(0, σₚ²)) = Σ log σₚ − log σ + (σ² + M²)/(2σₚ²) − ½ with σ = G∘G."""
    M, sigma = M.double(), G.double().square()
    return (math.log(prior_std) - (sigma + TINY).log() + (sigma**2 + M**2) / (2 * prior_std**2) - 0.5).sum()


def _kl_gradient(M: Tensor, G: Tensor, prior_std: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of `_kl`, M/σₚ² and 2Gσ/σₚ² − 2G/σ."""
    sigma = G.square()
    return M / prior_std**2, 2 * G * (sigma / prior_std**2 - 1 / (sigma + TINY))


def _kl_weight(step: int, cycle: int) -> float:
    """Return πᵢ of the step numbered from 0: it doubles each step of a cycle, and adds up to almost 1 over it."""
    i = step % cycle + 1
    return 2.0 ** (i - cycle - 1) / (1 - 2.0 ** (-cycle - 1))
