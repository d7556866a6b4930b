"""IVON: variational learning of a diagonal Gaussian over the adapter, at AdamW's cost.

The optimizer (`varlora.IVON`) does the work; the posterior is read from its state. At β₂ = 1 − 1e-5 the Hessian hardly
leaves its initial value, so the posterior's scale is σ₀ = 1/√(λ h₀). Learning rate, λ and h₀ are found by a short look
at model and rows (`varlora.scale`), unless they are given; where λ is found, the noise grows to its full size while
training, and is cooled where it costs more than it may.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from varlora import scale
from varlora.errors import VarloraError
from varlora.methods.base import Comparison, Method, Plan, Prepared, Start, Trained
from varlora.optim.ivon import IVON
from varlora.params import copied, flat, trainable
from varlora.posterior import DiagonalGaussian
from varlora.prompt import Encoded

__all__ = ["PAPER", "Ivon"]

PAPER = {"lr": 0.03, "ess": 1e6, "hess_init": 1e-3}
"""The settings that are found by default, as in the paper's Table 3 (its ARC and OBQA columns): σ₀ = 0.03."""
PROBE = 0.025
"""Share of training that a look at model and rows may cost, and again that the comparisons may."""
ROWS, DRAWS = (4, 32), (4, 64)
"""Rows that noise is tried on, and draws of each scale that is tried, at the least and at the most."""
DRAWS_PER_ROW = 2
"""Draws over rows, between these: a draw may shift all rows alike, so few draws tell little, on however many rows."""
BATCHES = 8
"""Batches that gradients are taken of, at the most."""
KNOWN = 0.5
"""Share of the loss of chance below which rows are known: their gradients say nothing of those to come."""
BEARABLE = 0.5
"""Share of what training has gained on chance that noise may take back."""
PROGRESS = 0.2
"""Share of the loss of chance that training has to have gained for that; before, noise may take as much less."""
SLIGHT = 0.003
"""Rise that is borne in any case, as a share of the loss of chance."""
MEMORY = 10
"""Comparisons that are averaged."""
GAIN = 0.1
"""By how much σ changes at a comparison, in its logarithm."""
COLDEST = 0.2
"""Share of σ that is drawn at the least."""
FIRST = 20
"""Steps that h₀ counts for, where the Hessian is the run's average."""
EARLY, STEADY = 10, (0.8, 1.25)
"""Steps over which the Hessian has to stay near h₀, and how near, for σ to be what it was set to: the paper's test."""
EVIDENCE = 10
"""Steps between two choices of the prior's precision."""
OPTIMIZER = (
    *("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius", "mc_samples", "hess_approx"),
    *("rescale_lr", "debias"),
)
"""The settings that are IVON's own."""

LAYER = re.compile(r"\.(?:layers|h|blocks|layer)\.(\d+)\.")
MATRIX = re.compile(r"([^.]+)\.(lora_[AB])\.")

Auto = Literal["auto"]


@dataclass(frozen=True)
class Ivon(Method):
    """Train with IVON and keep its Gaussian.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> method = Ivon(lr=0.03, ess=1e6, hess_init=1e-3)
        >>> optimizer = method.optimizer(dict(layer.named_parameters()), num_examples=100, batch_size=4, seed=0)
        >>> end = Trained(layer, rows=(), draw=None, forward=None, optimizer=optimizer)
        >>> round(method.posterior(end).std["bias"].item(), 4)  # before the first step 1/√(λ h₀)
        0.0316

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON; Shen et al. 2024, Algorithm 1.
    """

    name: ClassVar[str] = "ivon"
    title: ClassVar[str] = "IVON"

    lr: float | Auto = "auto"
    """Learning rate α at the first step; a weight moves by at most `lr * clip_radius` a step."""
    lr_like_adamw: float | None = None
    """In place of `lr`: the AdamW learning rate with which weights that follow noise move as far, on the same schedule.
    """
    lr_decay: float | Auto = "auto"
    """Share of training, at its end, over which the learning rate falls to 0, linearly; before it is constant. auto:
    0.3 where `lr` is found; else, with `lr_like_adamw` too, the Trainer's schedule, which by default falls from the
    start."""
    ess: float | Auto = "auto"
    """Effective sample size λ; the number of training rows approximates Bayes' posterior, more is colder."""
    hess_init: float | Auto = "auto"
    """Initial Hessian h₀."""
    sigma_by_layer: Mapping[str, float] | Auto = "auto"
    """σ in each layer, over that of all, by the layer's number; a layer's steps are as much longer, its h₀ that squared
    smaller (exact without weight decay). Layers that are not named: 1. auto: by the layers' gradients where σ is found,
    else 1."""
    ess_per_root_row: float | None = None
    """In place of `ess`: γ, for λ = γ√N with N training rows (the paper's follow-up: 5000)."""
    beta1: float = 0.9
    """Decay β₁ of the gradient's average."""
    beta2: float = 1 - 1e-5
    """Decay β₂ of the Hessian's average."""
    weight_decay: float | Auto = 0.0
    """Prior precision divided by λ, δ: the prior's variance is v₀ = 1/(λδ), so 0 is a flat prior (the paper's Table 3
    lists no δ). auto: for each matrix the one of most evidence, v₀ = mean(m² + v), chosen every tenth step."""
    clip_radius: float = 1e-3
    """Bound ξ on each entry of the preconditioned step."""
    mc_samples: int = 1
    """Draws a step; more than one needs as many micro-batches a step (`accumulation`)."""
    hess_approx: str = "price"
    """Estimator of the Hessian: price or gradsq."""
    hess_average: Literal["decay", "run"] = "decay"
    """Whether the Hessian is an average with decay β₂, or at first that of the run so far, until β₂ is reached."""
    noise_warmup: float | Auto = "auto"
    """Share of training over which the noise grows to its full size; 0: none; auto: where `ess` is found, by epochs."""
    cooling: bool | Auto = "auto"
    """Whether σ is lowered while noise takes back too much of what training has gained; auto: where the noise grows."""
    recheck: float = 0.0
    """Share of training after which σ is tried again, with the adapter as it is by then; 0: never."""
    rescale_lr: bool = False
    """Whether to multiply the learning rate by h₀ + δ."""
    debias: bool = True
    """Whether to divide the momentum by 1 − β₁ᵗ."""

    def problems(self, plan: Plan) -> list[str]:
        """Each draw of a step takes a micro-batch of its own; and what excludes each other."""
        found = []
        if self.mc_samples > plan.accumulation:
            found.append(
                f"Expected `accumulation` to be at least `method.mc_samples`, but got {plan.accumulation} for "
                f"{self.mc_samples} draws a step: each draw takes a micro-batch of its own. "
                f"Set `accumulation={self.mc_samples}`."
            )
        if self.noise_warmup != "auto" and not 0 <= self.noise_warmup <= 1:
            found.append(
                f"Expected `noise_warmup` to be a share of training within 0 and 1, but got {self.noise_warmup}. "
                "Leave it out to have it chosen."
            )
        if self.lr_decay != "auto" and not 0 < self.lr_decay <= 1:
            found.append(
                f"Expected `lr_decay` to be a share of training above 0 and up to 1, but got {self.lr_decay}. "
                "Leave it out to have it chosen."
            )
        if not 0 <= self.recheck < 1:
            found.append(
                f"Expected `recheck` to be a share of training, 0 to below 1, but got {self.recheck}. "
                f"Set e.g. `method.recheck={Ivon.recheck}`."
            )
        for name, other in (("lr_like_adamw", "lr"), ("ess_per_root_row", "ess")):
            value = getattr(self, name)
            if value is not None and getattr(self, other) != "auto":
                found.append(f"Expected `{other}` or `{name}`, but got both. Leave one of them out.")
            if value is not None and not 0 < value < math.inf:
                found.append(f"Expected `{name}` to be a number > 0, but got {value}. Leave it out to have it found.")
        if self.sigma_by_layer != "auto":
            found += [
                f"Expected `sigma_by_layer` to have a number > 0 for layer {layer}, but got {value!r}. "
                "Leave the layer out for 1."
                for layer, value in self.sigma_by_layer.items()
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf
            ]
        if self.clip_radius == math.inf and self.lr == "auto":
            found.append("Expected `lr` with `clip_radius` inf: steps of no fixed size cannot be foreseen. Give it.")
        return found

    # --- before training ---

    def prepare(self, start: Start) -> Prepared | None:
        """Find learning rate, λ and h₀, as far as they are not given, by a look at some of the training rows."""
        if "auto" not in (self.lr, self.ess, self.hess_init):
            return None
        given = {name: getattr(self, name) for name in PAPER if getattr(self, name) != "auto"}
        if self.ess_per_root_row is not None:
            given["ess"] = self.ess_per_root_row * math.sqrt(len(start.rows))
        growth = self.noise_warmup
        if growth == "auto":
            growth = 0.0 if "ess" in given else scale.growth(start.epochs)
        cooling = growth > 0 if self.cooling == "auto" else self.cooling
        found: dict[str, Any] = {"epochs": start.epochs}
        delta, cost = 0.0 if self.weight_decay == "auto" else self.weight_decay, 0.0
        decay = self._own_decay or 1.0
        by_layer = self._given_by_layer()
        if {"ess", "hess_init"} <= given.keys():
            sigma = reach = 1 / math.sqrt(given["ess"] * (given["hess_init"] + delta))
        else:
            mean = {name: p.float() for name, p in copied(start.model).items()}
            first = flat(mean.values()).square().mean().sqrt().item() or 1.0
            sigma, seen, cost = _probe(start, partial(_noisy, mean), first)
            gradient, gradients, passes = _gradient(start, sigma)
            cost += passes
            if not math.isfinite(gradient) or (not gradient and not {"ess", "hess_init"} & given.keys()):
                raise VarloraError(
                    f"Expected a gradient that is finite and not 0 on the training rows, under noise of sigma "
                    f"{sigma:.3g}, but got {gradient:g}: the adapter changes nothing of what the base says of the rows "
                    "that were looked at, or the base overflows. Load the base in float32 (`dtype=float32`), or give "
                    "`lr`, `ess` and `hess_init`."
                )
            reach = seen["reach"]
            if reach > sigma:
                most = max(trial["kl"] for trial in seen["trials"] if trial["kl"] is not None)
                start.say(
                    f"Noise changes the predictions by {most:.2g} nats at most, and may by {seen['bound']:.2g}: this "
                    "base answers much the same whatever its adapter is. So noise is small, and steps, where they are "
                    "to be found, are as long as for noise that changes so much."
                )
            found |= seen | {"gradient": gradient}
            if self.sigma_by_layer == "auto":
                by_layer = {layer: scale.layer_share(of, gradient) for layer, of in gradients.items()}
        if "hess_init" not in given:
            given["hess_init"] = (
                _hessian_of(sigma, given["ess"], delta)
                if "ess" in given
                else start.rows_per_step * gradient**2
                if self.hess_approx == "gradsq"
                else scale.first_hessian(gradient, sigma, start.steps, self.beta2, growth)
            )
        given.setdefault("ess", 1 / (sigma**2 * (given["hess_init"] + delta)))
        if "lr" not in given:
            step = (
                scale.like_adamw(self.lr_like_adamw, self.beta1)
                if self.lr_like_adamw is not None
                else scale.step_size(reach, start.epochs, start.steps, self.beta1, decay)
            )
            given["lr"] = step / self.clip_radius / self._rescaled(given["hess_init"], delta)
        step = given["lr"] * self.clip_radius * self._rescaled(given["hess_init"], delta)
        found |= {"sigma": sigma, "step": step}
        course = "" if self._own_decay is None else f" until the last {self._own_decay:.0%} of training"
        shares = by_layer.values()
        apart = f" (from {min(shares):.2g} to {max(shares):.2g} times that in a layer)" if shares else ""
        start.say(
            f"Found by a look at the training rows (worth {cost:.0f} steps): sigma {sigma:.3g}{apart}, learning rate "
            f"{given['lr']:.3g}{course} (a weight moves by {step:.2g} a step at the most), "
            f"ess {given['ess']:.3g}, hess_init {given['hess_init']:.3g}."
        )
        rest = {"noise_warmup": growth, "cooling": cooling, "lr_like_adamw": None, "ess_per_root_row": None}
        if self._own_decay is not None:
            rest["lr_decay"] = self._own_decay
        return Prepared({**given, **rest, "sigma_by_layer": by_layer}, found, cost)

    @property
    def _own_decay(self) -> float | None:
        """Share of training over which the learning rate falls, where that is not left to the Trainer."""
        if self.lr_decay != "auto":
            return self.lr_decay
        return scale.DECAY if self.lr == "auto" and self.lr_like_adamw is None else None

    def _rescaled(self, hess_init: float, delta: float) -> float:
        """Return what `rescale_lr` has the optimizer multiply a learning rate by."""
        return hess_init + delta if self.rescale_lr else 1.0

    def _given_by_layer(self) -> dict[str, float]:
        """Return σ of the layers over that of all, as far as it is given; in Python by numbers, if one likes."""
        given = {} if self.sigma_by_layer == "auto" else self.sigma_by_layer
        return {str(layer): share for layer, share in given.items()}

    # --- training ---

    def optimizer(self, params: Mapping[str, nn.Parameter], num_examples: int, batch_size: int, seed: int) -> IVON:
        """Return IVON over the named parameters; what is to be found and was not is the paper's."""
        settings = {name: getattr(self, name) for name in OPTIMIZER}
        settings |= {name: value for name, value in PAPER.items() if settings[name] == "auto"}
        alone = self.weight_decay == "auto"  # each matrix has its own
        if alone:
            settings["weight_decay"] = 0.0
        shares = self._given_by_layer()
        lots: dict[tuple[str, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
        for name, parameter in params.items():
            lots[name if alone else "", shares.get(_layer(name), 1.0)].append((name, parameter))
        first, delta = settings["hess_init"], settings["weight_decay"]
        groups = [
            {
                "params": named,
                "lr": settings["lr"] * share * self._rescaled(first, delta) / self._rescaled(first / share**2, delta),
                "hess_init": first / share**2,
            }
            for (_, share), named in lots.items()
        ]
        return IVON(groups, batch_size=batch_size, seed=seed, **settings)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR | None:
        """Constant, and at the end linearly down to 0, where the learning rate is found; else the Trainer's."""
        decay, steps = self._own_decay, max(total_steps, 1)
        return None if decay is None else LambdaLR(optimizer, lambda step: scale.fall(step / steps, decay))

    def schedule_remedy(self) -> str:
        """Return how to have the Trainer's schedule."""
        return "Leave it out, or give `lr` and leave out `lr_decay`."

    def before_step(self, optimizer: torch.optim.Optimizer, step: int, total_steps: int, state: dict[str, Any]) -> None:
        """Let the noise grow, as far as it was not cooled; and what else changes while training."""
        assert isinstance(optimizer, IVON)
        growth = 0.0 if self.noise_warmup == "auto" else self.noise_warmup
        if self.ess != "auto" and (growth or self._cools or "rechecked" in state):
            share = scale.ramp(step / total_steps, growth) * state.get("held_back", 1.0) * state.get("rechecked", 1.0)
            for group in optimizer.param_groups:
                group["ess"] = self.ess / share**2
        if self.hess_average == "run":
            for group in optimizer.param_groups:
                group["beta2"] = min(self.beta2, 1 - 1 / (step + FIRST))
        elif step == EARLY + 1:
            state["hessian_early"] = self.log(optimizer, {})["hessian_over_first"]
        if self.weight_decay == "auto" and step % EVIDENCE == 1:
            posterior = optimizer.posterior()
            for group in optimizer.param_groups:
                (name,) = group["param_names"]
                second = posterior.mean[name].square().mean() + posterior.std[name].square().mean()
                group["weight_decay"] = 1 / (group["ess"] * second.item())

    @property
    def _cools(self) -> bool:
        """Whether the noise is held back where it takes too much; left to itself, where it grows."""
        return self.noise_warmup not in ("auto", 0.0) if self.cooling == "auto" else self.cooling

    def look_again_at(self, total_steps: int) -> int:
        """Once a share of training is done, if asked to."""
        return min(1 + math.ceil(self.recheck * total_steps), total_steps) if self.recheck else 0

    def look_again(self, start: Start, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
        """Try σ at its full size once more, and take another where that is far off.

        Around a B of zero noise is not what it is later. What was held back for that is not held back a second time.
        """
        assert isinstance(optimizer, IVON)
        assert self.ess != "auto"
        posterior = optimizer.posterior()
        drawn = math.sqrt(self.ess / optimizer.param_groups[0]["ess"])  # share of σ at the step before
        factor, _, cost = _probe(start, lambda factor: posterior.scale((factor / drawn) ** 2), 1.0, least=1)
        if 1 / scale.FAR < factor < scale.FAR:
            return {"rechecked": 1.0}
        factor = min(max(factor, 1 / scale.FURTHEST), scale.FURTHEST)
        start.say(
            f"Tried sigma again, as the adapter has moved by now (worth {cost:.0f} steps): it is {factor:.2g} times "
            "what it was. The learning rate stays."
        )
        held = {"held_back": min(state["held_back"] / factor, 1.0)} if "held_back" in state else {}
        return {"rechecked": factor, **held}

    def compare_every(self, total_steps: int) -> int:
        """A comparison takes one forward pass, a third of a step."""
        return math.ceil(1 / (3 * PROBE))

    def compared(self, comparison: Comparison, state: dict[str, Any]) -> str | None:
        """Say where noise takes too much of what was gained; else, as it is the first chance to, if h₀ did not last."""
        said, moved = self._weighed(comparison, state), state.get("hessian_early", 1.0)
        if said or STEADY[0] <= moved <= STEADY[1] or state.get("told"):
            return said
        state["told"] = True
        return (
            f"Within {EARLY} steps the Hessian has moved to {moved:.3g} times its first value, so that sigma is not "
            "what it was set to: raise `hess_init`, and lower `ess` as much to keep it."
        )

    def _weighed(self, comparison: Comparison, state: dict[str, Any]) -> str | None:
        """Average the losses; say, and if asked to hold the noise back, where it takes too much of what was gained.

        Until the loss at the mean is below that of chance there is no gain, and noise would only hide where to go; and
        while the gain is small, a rise that is half of it hides as much. A rise counts as too much if it is so by a
        standard error.
        """
        if not comparison.chance:  # all rows have the same answer, so there is nothing to gain
            return None
        count = state["comparisons"] = state.get("comparisons", 0) + 1
        weight = max(1 / count, 1 / MEMORY)
        # The variance of the average over that of one comparison: the sum of the squares of their weights.
        share = state["share"] = state.get("share", 0.0) * (1 - weight) ** 2 + weight**2
        state["chance"] = comparison.chance
        seen = {"at_mean": comparison.at_mean, "under_noise": comparison.under_noise}
        seen["square"] = (comparison.under_noise - comparison.at_mean) ** 2
        for name, value in seen.items():
            state[name] = state.get(name, 0.0) * (1 - weight) + value * weight
        rise = state["under_noise"] - state["at_mean"]
        spread = max(state["square"] - rise**2, 0.0)
        error = math.sqrt(spread * share / (1 - share)) if count > 1 else math.inf
        gain = max(comparison.chance - state["at_mean"], 0.0)
        progress = min(gain / (PROGRESS * comparison.chance), 1.0)
        borne = max(BEARABLE * progress * gain, SLIGHT * comparison.chance)
        too_much = rise - error > borne
        if self._cools:
            change = GAIN * ((rise < borne) - too_much)
            state["held_back"] = min(max(state.get("held_back", 1.0) * math.exp(change), COLDEST), 1.0)
            too_much = state["held_back"] <= 0.5
        if state.get("said") or not too_much or 2 * comparison.step < comparison.total_steps:
            return None
        state["said"] = True
        words = (
            f"At step {comparison.step} the loss under noise is {state['under_noise']:.3f}, that at the mean "
            f"{state['at_mean']:.3f} and chance's {comparison.chance:.3f}: noise takes back too much of "
            "what training has gained"
        )
        if not self._cools:
            return f"{words}. Lower sigma (a larger `ess`), or let it be held back (`method.cooling=true`)."
        return (
            f"{words}, so sigma is held back, now to {state['held_back']:.0%} of what was found. If little is "
            "learned, train longer; `method.cooling=false` leaves sigma as it was found."
        )

    # --- after training ---

    def posterior(self, trained: Trained) -> DiagonalGaussian:
        """Read mean and variance from the optimizer."""
        assert isinstance(trained.optimizer, IVON)
        return trained.optimizer.posterior()

    def log(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, float]:
        """What tells whether the scale is right.

        Mean σ over all weights, by layer and by matrix; the share of weights whose signal |m| exceeds their noise; the
        mean Hessian over h₀; and, where they are compared, the loss at the mean and under noise.
        """
        assert isinstance(optimizer, IVON)
        posterior = optimizer.posterior()
        lots: dict[str, list[str]] = defaultdict(list)
        for name in posterior.std:
            lots["sigma"].append(name)
            if layer := _layer(name):
                lots[f"sigma/layer_{int(layer):02d}"].append(name)
            if matrix := MATRIX.search(name):
                lots[f"sigma/{matrix[1]}.{matrix[2]}"].append(name)
        sums = {name: std.sum().item() for name, std in posterior.std.items()}
        sizes = {name: std.numel() for name, std in posterior.std.items()}
        logged = {
            lot: sum(sums[name] for name in names) / sum(sizes[name] for name in names) for lot, names in lots.items()
        }
        size = sum(sizes.values())
        heard = sum(int((posterior.mean[name].abs() > std).sum()) for name, std in posterior.std.items())
        of_group = {name: group for group in optimizer.param_groups for name in group["param_names"]}
        moved = sum(
            (std.double() ** -2 / group["ess"] - group["weight_decay"]).sum().item() / group["hess_init"]
            for name, std in posterior.std.items()
            for group in (of_group[name],)
        )
        logged |= {"signal_above_noise": heard / size, "hessian_over_first": moved / size}
        if self.hess_average == "run":
            logged["hessian_of_run"] = 1.0  # it is meant to move
        losses = {"at_mean": "loss_at_mean", "under_noise": "loss_under_noise", "chance": "loss_of_chance"}
        logged |= {name: state[key] for key, name in losses.items() if key in state}
        return logged | {name: state[name] for name in ("hessian_early", "held_back", "rechecked") if name in state}


def _hessian_of(sigma: float, ess: float, delta: float) -> float:
    """Return the h₀ with which σ = 1/√(λ(h₀ + δ))."""
    precision = 1 / (ess * sigma**2)
    if precision <= delta:
        raise VarloraError(
            f"Expected `weight_decay` below {precision:.3g}, as with `ess` {ess:.3g} more leaves less noise than a "
            f"look at the rows found best (sigma {sigma:.3g}), but got {delta:.3g}. Lower it or `ess`, or give "
            "`hess_init`."
        )
    return precision - delta


def _probe(
    start: Start, noisy: Callable[[float], DiagonalGaussian], first: float, least: int = scale.TRIALS
) -> tuple[float, dict[str, Any], float]:
    """Return the σ at which noise changes the predictions by a bound, what was seen, and its cost in training steps.

    Args:
        start: model and rows.
        noisy: σ -> the posterior around the model as it is; or a factor of the σ that there is -> the posterior.
        first: what to begin with.
        least: trials at the least.
    """
    a_step = 3 * start.batch_size * start.accumulation  # passes of a row; the backward pass counts as two
    most = PROBE * start.steps * a_step
    count = min(max(int(math.sqrt(most / (scale.TRIALS * DRAWS_PER_ROW))), ROWS[0]), ROWS[1], len(start.rows))
    draws = min(max(int((most / count - 1) / scale.TRIALS), DRAWS[0]), DRAWS[1])
    rows = start.some_rows(count)
    at_mean = start.draw(noisy(0.0), rows, 0)[0][0]
    bound = scale.bound([len(row.label_tokens) for row in start.rows], start.epochs)

    def kl(sigma: float) -> float:
        return scale.kl_under_noise(start.draw(noisy(sigma), rows, draws)[0], at_mean)

    sigma, trials = scale.largest_sigma(kl, bound, first, least)
    seen = {
        "reach": scale.reach(sigma, trials, bound),
        "bound": bound,
        "rows": count,
        "draws": draws,
        "trials": [  # JSON has no infinity
            {"sigma": trial.sigma, "kl": trial.kl if math.isfinite(trial.kl) else None} for trial in trials
        ],
    }
    return sigma, seen, (len(trials) * draws + 1) * count / a_step


def _noisy(mean: Mapping[str, Tensor], sigma: float) -> DiagonalGaussian:
    return DiagonalGaussian(mean, {name: torch.full_like(value, sigma) for name, value in mean.items()})


def _layer(name: str) -> str:
    """Return the number of the layer that a parameter is in; empty if it is in none."""
    found = LAYER.search(name)
    return found[1] if found else ""


def _gradient(start: Start, sigma: float) -> tuple[float, dict[str, float], float]:
    """Return the root mean square of a mini-batch's gradient at draws, over some batches: of all and of each layer's.

    Last comes the cost in steps. Where the rows are known already their gradients are tiny, and grow as soon as noise
    has one forgotten: beside an h₀ for tiny ones, what chance adds to the Hessian would be all that there is. There
    they are taken for answers that are drawn at random, which nobody knows.
    """
    size = start.rows_per_step
    batches = min(max(round(PROBE * start.steps / 2 / start.ranks), 1), BATCHES, math.ceil(len(start.rows) / size))
    rows = start.some_rows(batches * size)
    posterior = _noisy({name: p.float() for name, p in copied(start.model).items()}, sigma)
    whole, by_layer, loss = _gradient_of(start, posterior, rows)
    passes = batches * start.ranks  # one process looks, for all
    chance = statistics.fmean(math.log(len(row.label_tokens)) for row in rows)
    if loss < KNOWN * chance:
        start.say(
            f"The training rows are known already: their loss under noise is {loss:.2g}, and that of chance "
            f"{chance:.2g}. So the gradients that `hess_init` goes with are those of answers drawn at random."
        )
        source = torch.Generator().manual_seed(start.seed)
        rows = [replace(row, label=_one_of(len(row.label_tokens), source)) for row in rows]
        whole, by_layer, _ = _gradient_of(start, posterior, rows)
        passes *= 2
    return whole, by_layer, float(passes)


def _one_of(count: int, source: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=source).item())


def _gradient_of(
    start: Start, posterior: DiagonalGaussian, rows: Sequence[Encoded]
) -> tuple[float, dict[str, float], float]:
    """Return the root mean square of mini-batches' gradients, of all and of each layer's, and the mean loss."""
    source, params, size = start.generator(), trainable(start.model), start.rows_per_step
    squares, sizes, losses = defaultdict[str, float](float), defaultdict[str, int](int), 0.0
    for at in range(0, len(rows), size):
        mini_batch = rows[at : at + size]
        with posterior.sampled(start.model, source), torch.enable_grad():
            total = [torch.zeros_like(p) for p in params.values()]
            for i in range(0, len(mini_batch), start.batch_size):
                batch = start.batch(mini_batch[i : i + start.batch_size])
                batch = {name: value.to(total[0].device) for name, value in batch.items()}
                logits = start.forward(start.model, batch)
                loss = nn.functional.cross_entropy(logits, batch["labels"].to(logits.device), reduction="sum")
                parts = torch.autograd.grad(loss / len(mini_batch), list(params.values()), allow_unused=True)
                total = [whole if part is None else whole + part for whole, part in zip(total, parts)]
                losses += loss.item()
        for name, part in zip(params, total):
            squares[_layer(name)] += part.float().square().sum().item()
            sizes[_layer(name)] += part.numel()
    by_layer = {layer: math.sqrt(square / sizes[layer]) for layer, square in squares.items()}
    return math.sqrt(sum(squares.values()) / sum(sizes.values())), by_layer, losses / len(rows)
