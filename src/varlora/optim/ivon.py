r"""IVON, the Improved Variational Online Newton optimizer: AdamW's interface and cost, and a posterior at the end.

It minimises the variational objective `λ E_q[L(θ)] + KL(q || p)` over Gaussians `q = N(m, diag(σ²))`, where L is the
average loss over the data, λ the effective sample size and p a zero-mean Gaussian of precision λδ. Its state for each
weight is the mean m, a momentum g and the diagonal Hessian h of L, all float32 (or wider) whatever the weight's type.
One step (Shen et al. 2024, Algorithm 1), with ε ~ N(0, I) and ĝ the mini-batch gradient at θ:

    σ = 1 / √(λ(h + δ)),   θ = m + σε
    ĥ = ĝ (θ − m) / σ²                                                  (or B ĝ², see `hess_approx`)
    g ← β₁ g + (1 − β₁) ĝ
    h ← β₂ h + (1 − β₂) ĥ + ½ (1 − β₂)² (h − ĥ)² / (h + δ)
    m ← m − α clip((g / (1 − β₁ᵗ) + δm) / (h + δ), ±ξ)

This file needs torch and the standard library only, and may be copied alone into another project; `posterior()` is the
one method that then goes without its return type.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from varlora.posterior import DiagonalGaussian

__all__ = ["IVON"]

# Parameters of one group, device and type lie side by side in buffers of at most this many elements (a larger parameter
# has its own), so that a step is a few operations on long tensors, however many parameters there are.
_BUCKET = 1 << 24
# On a CPU the update is worked off in chunks that fit the cache: it then moves each buffer through memory once instead
# of once an operation.
_CHUNK = 1 << 20
# Streams of random numbers: the noise of training steps and that of evaluation draws.
_TRAIN, _EVAL = 0, 1
# What is saved only between a draw and the step that uses it.
_TRANSIENT = ("noise", "grad_sum", "hess_sum")


class IVON(torch.optim.Optimizer):
    r"""Variational learning as a drop-in replacement for AdamW.

    Gradients must be taken at a draw from the posterior. Three ways to do so give the same numbers:

    - `optimizer.train()`, backward, `optimizer.step()`, and `optimizer.eval()` before an evaluation. This is what
      `transformers.Trainer` calls already: pass it the optimizer instance and nothing else changes.
    - `with optimizer.sampled_params(train=True): loss.backward()`, then `optimizer.step()`.
    - `optimizer.step(closure)`.

    After `step()` the parameters hold the mean m.

    Gradients accumulate as with any optimizer: all micro-batches between two steps share one draw, and the loss of
    each is scaled by its share. With `mc_samples = S > 1`, a closure or a context is run S times and the S gradients
    are averaged; under `train()`, each of the first S micro-batches has a draw of its own and their (scaled) gradients
    add up. The gradient is read from `p.grad` when `step` is called, so clipping and unscaling act on the mean's and
    on the Hessian's update alike. A step whose gradient is not finite is skipped and counted in `skipped_steps`.

    Noise is a function of the seed, the number of the draw and the parameter's position, and of nothing else.

    Args:
        params: parameters, named parameters (`model.named_parameters()`, needed for a posterior by name) or groups.
            Those that do not require a gradient are left alone.
        lr: learning rate α; a weight moves by at most `lr * clip_radius` a step.
        ess: effective sample size λ, in training examples; the number of examples approximates Bayes' posterior, a
            larger one gives a colder (narrower) posterior.
        hess_init: initial Hessian h₀ > 0; the initial posterior standard deviation is 1/√(λ(h₀ + δ)).
        beta1: decay β₁ of the gradient's momentum.
        beta2: decay β₂ of the Hessian's average.
        weight_decay: δ ≥ 0; the prior is a zero-mean Gaussian of precision λδ.
        clip_radius: bound ξ on each entry of the preconditioned step; `math.inf` for none.
        mc_samples: draws a step, S; the same in all groups.
        hess_approx: estimator of the diagonal Hessian of the average loss. `"price"`: ĝ(θ − m)/σ² (Price's theorem),
            unbiased for the Hessian averaged over the posterior, hence exact on any quadratic, and indifferent to the
            batch size. `"gradsq"`: B ĝ² with B the batch size, which has less variance and is right where the model is
            well specified, so that the Fisher information is the Hessian and the gradient's mean is zero (a logistic
            or Gaussian likelihood near the optimum); elsewhere it is too large by (B − 1) times the squared mean.
        batch_size: examples that the gradient averages over, all micro-batches of a step together (with several draws
            by closure or contexts, all of one draw); only for `"gradsq"`.
        rescale_lr: multiply `lr` by h₀ + δ, as Shen et al. do; the paper's LoRA recipe does not.
        debias: divide the momentum by 1 − β₁ᵗ.
        generator: where the seed is drawn from when `seed` is not given; the global generator by default.
        seed: the seed of all noise.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = IVON(model.named_parameters(), lr=0.1, ess=1000, hess_init=1.0, clip_radius=math.inf, seed=0)
        >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(200):
        ...     with optimizer.sampled_params(train=True):
        ...         loss = (model(x) - x.sum(-1, keepdim=True)).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...     optimizer.step()
        >>> [round(weight, 1) for weight in model.weight[0].tolist()]
        [1.0, 1.0, 1.0]
        >>> sorted(optimizer.posterior().std)
        ['bias', 'weight']

    References:
        Shen et al. 2024, Variational Learning is Effective for Large Deep Networks (arXiv:2402.17641), Algorithm 1;
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON (arXiv:2411.04421), Table 3: the defaults.
    """

    # GradScaler then leaves unscaling and skipping to `step`, which ends the draw and counts the skip. On its own, it
    # would not call `step` after an overflow.
    _step_supports_amp_scaling = True
    # Key of the evaluation draw that the parameters hold, if they hold one.
    _eval_key: tuple[int, int, int] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        ess: float,
        hess_init: float,
        beta1: float = 0.9,
        beta2: float = 1 - 1e-5,
        weight_decay: float = 0.0,
        clip_radius: float = 1e-3,
        mc_samples: int = 1,
        hess_approx: str = "price",
        batch_size: int | None = None,
        rescale_lr: bool = False,
        debias: bool = True,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        if seed is None:
            device = generator.device if generator is not None else "cpu"
            seed = int(torch.randint(2**62, (1,), generator=generator, device=device).item())
        self._buckets: list[_Bucket] | None = None
        settings = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "clip_radius": clip_radius,
            "mc_samples": mc_samples,
            "hess_approx": hess_approx,
            "batch_size": batch_size,
            "rescale_lr": rescale_lr,
            "debias": debias,
        }
        # Counters lie in the groups, so that whatever saves an optimizer's groups saves them. All but `used` are the
        # same in each.
        counters = {
            "seed": seed,
            "draws": 0,  # training draws so far
            "eval_draws": 0,
            "skipped": 0,
            "drawn": 0,  # training draws since the last step
            "used": False,  # whether a gradient was taken at the last draw (with several draws, under `train`)
            "perturbed": False,  # whether the parameters hold a training draw
            "averages": False,  # whether the draws' gradients are averaged (contexts, closures) or added up (`train`)
        }
        super().__init__(params, settings | counters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with settings of its own where given."""
        super().add_param_group(param_group)
        first, group = self.param_groups[0], self.param_groups[-1]
        try:
            _check_settings(group)
            if group["mc_samples"] != first["mc_samples"]:
                raise ValueError(
                    f"Expected `mc_samples` to be the same in all groups, but got {group['mc_samples']} after "
                    f"{first['mc_samples']}. Pass it to the optimizer, not to a group."
                )
        except ValueError:
            self.param_groups.pop()
            raise
        for name in ("seed", "draws", "eval_draws", "skipped", "drawn", "used", "perturbed", "averages"):
            group[name] = first[name]

    # --- the posterior -----------------------------------------------------------------------------------------------

    def posterior(self) -> DiagonalGaussian:
        """Return N(m, diag(σ²)) with σ = 1/√(λ(h + δ)), by parameter name, as copies.

        Raises:
            ValueError: the optimizer was made without names.
        """
        from varlora.posterior import DiagonalGaussian  # the one import that this file can do without

        moments = self._by_name(lambda bucket: [(m.clone(), std) for m, std in bucket.moments()])
        return DiagonalGaussian({n: m for n, (m, _) in moments.items()}, {n: std for n, (_, std) in moments.items()})

    def mean_sigma(self) -> dict[str, float]:
        """Return the posterior standard deviation of each parameter, averaged over its entries, by parameter name.

        Raises:
            ValueError: the optimizer was made without names.
        """
        return self._by_name(lambda bucket: [std.mean().item() for _, std in bucket.moments()])

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far because a gradient was not finite."""
        return self.param_groups[0]["skipped"]

    # --- draws -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Put a draw from the posterior into the parameters: call it before the forward pass of each micro-batch."""
        buckets, now = self._ready(), self.param_groups[0]
        used = any(group["used"] for group in self.param_groups)
        if used and not any(bucket.has_gradients for bucket in buckets):  # `zero_grad` threw them away: begin again
            self._set(drawn=0)
        new = now["drawn"] == 0 or (used and now["drawn"] < now["mc_samples"])
        if new or not now["perturbed"]:
            self._set(averages=False)
            self._perturb(new)

    def eval(self) -> None:
        """Put the mean into the parameters: call it before an evaluation."""
        if self.param_groups[0]["perturbed"]:
            self._show(perturbed=False)

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Within the context the parameters are a draw from the posterior; after it they are what they were.

        Args:
            train: whether the gradient taken at this draw is for the next `step`; after it, the parameters are the
                mean. If not, the draw changes nothing in the optimizer, the noise of later training steps included.
        """
        with self._train_draw() if train else self._eval_draw():
            yield

    @contextmanager
    def _train_draw(self) -> Iterator[None]:
        buckets, now = self._ready(), self.param_groups[0]
        drawn, several = now["drawn"], now["mc_samples"] > 1
        self._set(averages=True)
        if several and drawn:
            for bucket in buckets:
                bucket.set_gradients_aside()
        try:
            self._perturb(new=drawn < now["mc_samples"])
            yield
        except BaseException:
            self._show(perturbed=False)
            self._set(drawn=drawn)
            if several and drawn:
                for bucket in self._ready():
                    bucket.take_gradients_back(drawn)
            raise
        if several:
            for bucket in self._ready():
                bucket.fold_gradients(now["drawn"])
        self._show(perturbed=False)

    @contextmanager
    def _eval_draw(self) -> Iterator[None]:
        self._ready()
        outer, now = self._eval_key, self.param_groups[0]
        self._set(eval_draws=now["eval_draws"] + 1)
        try:
            self._eval_key = (now["seed"], _EVAL, now["eval_draws"])
            self._show(now["perturbed"])
            yield
        finally:
            self._eval_key = outer
            self._show(now["perturbed"])

    def _perturb(self, new: bool) -> None:
        """θ = m + σε, with new noise or that of the current draw."""
        buckets, now = self._ready(), self.param_groups[0]
        if new:
            self._set(draws=now["draws"] + 1, drawn=now["drawn"] + 1, used=False)
            _fill_normal(
                [
                    (noise, _mix(now["seed"], _TRAIN, now["draws"], position))
                    for bucket in buckets
                    for noise, position in zip(bucket.noise_views, bucket.positions)
                ]
            )
            if now["drawn"] == 1:
                for bucket in buckets:
                    bucket.begin_step()
        self._set(perturbed=True)  # before it is so: if this is interrupted, `eval` still has something to do
        for bucket in buckets:
            bucket.to_draw()

    def _show(self, perturbed: bool) -> None:
        """Put into the parameters what belongs there: an evaluation draw, else the training draw, else the mean."""
        for bucket in self._ready(adopt=False):
            if perturbed or self._eval_key is not None:
                bucket.to_draw(self._eval_key)
            else:
                bucket.to_mean()
        self._set(perturbed=perturbed)

    # --- the step ----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the posterior by one step of Algorithm 1 and put its mean into the parameters.

        Args:
            closure: clears the gradients, computes the loss, runs backward and returns the loss; called once for each
                Monte Carlo sample, at a draw.

        Returns:
            The closure's loss, averaged over the samples; None without a closure.

        Raises:
            RuntimeError: there are gradients, but none was taken at a draw.
        """
        now, losses = self.param_groups[0], []
        if closure is not None:
            self._set(drawn=0)  # of an earlier call, should its closure have failed
            for _ in range(now["mc_samples"]):
                with torch.enable_grad(), self.sampled_params(train=True):
                    losses.append(closure())
        buckets = self._ready()
        if (scale := getattr(self, "grad_scale", None)) is not None:  # of a GradScaler
            for bucket in buckets:
                bucket.unscale_gradients(scale)
        if any(bucket.has_gradients for bucket in buckets):
            if not now["drawn"]:
                raise RuntimeError(
                    "Expected gradients taken at a draw from the posterior, but nothing was drawn since the last step. "
                    "Call `optimizer.train()` before the forward pass, or use "
                    "`with optimizer.sampled_params(train=True):`, or pass a closure to `step`."
                )
            if all(bucket.gradients_are_finite() for bucket in buckets):
                for bucket in buckets:
                    bucket.update(draws=now["drawn"] if now["averages"] else 1)
                self._set(perturbed=False)
            else:
                self._set(skipped=now["skipped"] + 1)
        self.eval()
        self._set(drawn=0)
        return sum(losses) / len(losses) if losses else None

    # --- storage -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that an exact continuation needs; between a draw and its step, of the draw as well."""
        saved = super().state_dict()
        in_flight = self.param_groups[0]["drawn"] > 0
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in saved["state"].items():
            kept = {key: value for key, value in state.items() if in_flight or key not in _TRANSIENT}
            if in_flight and parameters[index].grad is not None:
                kept["grad"] = parameters[index].grad
            saved["state"][index] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state and put its mean (or, in the middle of a step, its draw) into the parameters.

        Args:
            state_dict: what `state_dict` returned, for parameters of the same shapes in the same order.

        Raises:
            ValueError: groups or shapes are those of another model.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        for parameter, index in zip(parameters, indices):
            for name, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise ValueError(
                        f"Expected `{name}` of parameter {index} to have shape {tuple(parameter.shape)}, but got "
                        f"{tuple(value.shape)}. Load the state of an IVON optimizer of the same model."
                    )
        self._release()
        super().load_state_dict({**state_dict, "state": {}})  # torch would round the state to the parameters' type
        now = self.param_groups[0]
        for parameter, index in zip(parameters, indices):
            if index in state_dict["state"]:
                self.state[parameter] = state = dict(state_dict["state"][index])
                gradient = state.pop("grad", None)
                if now["drawn"]:
                    parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
        if self.state:
            self._show(now["perturbed"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = None
        if self.state and self.param_groups[0]["perturbed"]:
            self._ready()  # a backward pass may come next, which the buckets watch

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _set(self, **counters: Any) -> None:
        for group in self.param_groups:
            group.update(counters)

    def _by_name(self, values: Callable[[_Bucket], list[Any]]) -> dict[str, Any]:
        """Return one value for each parameter by name, in the order in which the parameters were given."""
        if any("param_names" not in group for group in self.param_groups):
            raise ValueError(
                "Expected an optimizer that knows its parameters' names, but it was made without. "
                "Pass named parameters: `IVON(model.named_parameters(), ...)`."
            )
        names = [name for group in self.param_groups for name in group["param_names"]]
        found = {at: value for bucket in self._ready() for at, value in zip(bucket.positions, values(bucket))}
        return {name: found[at] for at, name in enumerate(names) if at in found}

    def _ready(self, adopt: bool = True) -> list[_Bucket]:
        """Return the buckets, made anew where parameters were added, moved or unfrozen.

        With `adopt`, values that others put into the parameters since our last write (a loaded checkpoint) become the
        mean.
        """
        wanted = [(p, p.device) for group in self.param_groups for p in group["params"] if p.requires_grad]
        have = [(p, bucket.mean.device) for bucket in self._buckets or [] for p in bucket.parameters]
        if self._buckets is None or {(id(p), d) for p, d in wanted} != {(id(p), d) for p, d in have}:
            perturbed = self.param_groups[0]["perturbed"]
            self._release()
            self._buckets = _make_buckets(self.param_groups, self.state)
            if perturbed:
                for bucket in self._buckets:
                    bucket.to_draw()
        elif adopt and not self.param_groups[0]["perturbed"]:
            for bucket in self._buckets:
                bucket.adopt_outside_changes()
        return self._buckets

    def _release(self) -> None:
        """Let go of the buckets and leave the mean in the parameters, some of which may not be ours from now on."""
        for bucket in self._buckets or []:
            if self.param_groups[0]["perturbed"]:
                bucket.to_mean()
            else:
                bucket.adopt_outside_changes()
            bucket.release()
        self._buckets = None


@contextmanager
def _plain() -> Iterator[None]:
    """Neither a graph nor inference tensors, whatever the caller is in the middle of."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Run(NamedTuple):
    """Neighbouring parameters of a chunk that have a gradient and have made as many steps."""

    chunk: int  # where the chunk starts in the flat buffers
    lo: int
    hi: int
    indices: list[int]
    t: int  # the number of the step that they are about to make


class _Bucket:
    """Parameters of one group, device and type, with their state side by side in flat buffers.

    Memory for each element: mean, momentum, Hessian and noise, 4 bytes each in float32; with several Monte Carlo
    samples two more. Beside that three scratch buffers of a chunk's size, which on a GPU is up to the whole bucket.
    """

    @_plain()
    def __init__(self, group: dict[str, Any], parameters: list[Tensor], positions: list[int], state: Any) -> None:
        self.group, self.parameters, self.positions = group, parameters, positions
        self.states = [state[p] for p in parameters]
        ends = list(itertools.accumulate(p.numel() for p in parameters))
        self.spans = list(zip([0, *ends], ends))
        like: dict[str, Any] = {"device": parameters[0].device, "dtype": _state_dtype(parameters[0])}
        self.mean, self.momentum, self.noise = (torch.zeros(ends[-1], **like) for _ in range(3))
        self.hess = torch.full((ends[-1],), group["hess_init"], **like)
        flats = {"mean": self.mean, "momentum": self.momentum, "hess": self.hess, "noise": self.noise}
        if group["mc_samples"] > 1:
            self.grad_sum, self.hess_sum = torch.zeros(2, ends[-1], **like)
            flats |= {"grad_sum": self.grad_sum, "hess_sum": self.hess_sum}
        for p, state_p, (lo, hi) in zip(parameters, self.states, self.spans):
            state_p.setdefault("step", 0)
            state_p.setdefault("mean", p)
            for name, flat in flats.items():
                view = flat[lo:hi].view(p.shape)
                if name in state_p:
                    view.copy_(state_p[name])
                state_p[name] = view
        self.chunks = self._make_chunks()
        self.scratch = torch.empty(3, max(self.spans[c[-1]][1] - self.spans[c[0]][0] for c in self.chunks), **like)
        self.mean_views = [state_p["mean"] for state_p in self.states]
        self.noise_views = [state_p["noise"] for state_p in self.states]
        self.work_views = [  # of the third scratch buffer, as long as its chunk is being worked on
            self.scratch[2, self.spans[i][0] - self.spans[chunk[0]][0] :][: parameters[i].numel()].view_as(
                parameters[i]
            )
            for chunk in self.chunks
            for i in chunk
        ]
        self.versions = [p._version for p in parameters]
        self.aside: list[Tensor | None] = [None] * len(parameters)
        self.hooks = []
        if group["mc_samples"] > 1:  # under `train`, each micro-batch's own gradient is seen as soon as it is there
            for i, p in enumerate(parameters):
                self.hooks.append(p.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, i)))

    def _make_chunks(self) -> list[list[int]]:
        size = _CHUNK if self.mean.device.type == "cpu" else _BUCKET
        chunks: list[list[int]] = []
        for i, (_, hi) in enumerate(self.spans):
            if not chunks or hi - self.spans[chunks[-1][0]][0] > size:
                chunks.append([])
            chunks[-1].append(i)
        return chunks

    # --- parameters and noise ---

    @_plain()
    def to_mean(self, indices: Iterable[int] | None = None) -> None:
        """Put the mean into all parameters, or into some."""
        chosen = range(len(self.parameters)) if indices is None else list(indices)
        if chosen:
            torch._foreach_copy_([self.parameters[i] for i in chosen], [self.mean_views[i] for i in chosen])
        for i in chosen:
            self.versions[i] = self.parameters[i]._version

    @_plain()
    def to_draw(self, eval_key: tuple[int, ...] | None = None) -> None:
        """Put θ = m + σε into the parameters, with the ε of training or, given a key, with another."""
        for chunk in self.chunks:
            lo, hi = self.spans[chunk[0]][0], self.spans[chunk[-1]][1]
            eps, theta = self.noise[lo:hi], self.scratch[2, : hi - lo]
            if eval_key is not None:
                _fill_normal([(self.work_views[i], _mix(*eval_key, self.positions[i])) for i in chunk])
                eps = theta
            sigma = self._precision(lo, hi, self.scratch[0, : hi - lo]).rsqrt_()
            torch.addcmul(self.mean[lo:hi], sigma, eps, out=theta)
            torch._foreach_copy_([self.parameters[i] for i in chunk], [self.work_views[i] for i in chunk])
            for i in chunk:
                self.versions[i] = self.parameters[i]._version

    @_plain()
    def adopt_outside_changes(self) -> None:
        for i, (p, mean) in enumerate(zip(self.parameters, self.mean_views)):
            if p._version != self.versions[i]:
                if not torch.equal(p, mean.to(p)):
                    mean.copy_(p)
                self.versions[i] = p._version

    def _precision(self, lo: int, hi: int, out: Tensor) -> Tensor:
        """1/σ² = λ(h + δ)."""
        h, ess, delta = self.hess[lo:hi], self.group["ess"], self.group["weight_decay"]
        return torch.add(h, delta, out=out).mul_(ess) if delta else torch.mul(h, ess, out=out)

    @_plain()
    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Return mean (a view) and standard deviation (a new tensor) of each parameter."""
        return [
            (state["mean"], self._precision(lo, hi, torch.empty_like(self.hess[lo:hi])).rsqrt_().view_as(state["mean"]))
            for state, (lo, hi) in zip(self.states, self.spans)
        ]

    # --- gradients ---

    def runs(self) -> Iterator[_Run]:
        for chunk in self.chunks:
            start = self.spans[chunk[0]][0]
            run: _Run | None = None
            for i in chunk:
                if self.parameters[i].grad is None:
                    continue
                (lo, hi), t = self.spans[i], self.states[i]["step"] + 1
                if run and (run.hi, run.t) == (lo, t):
                    run = run._replace(hi=hi, indices=[*run.indices, i])
                else:
                    if run:
                        yield run
                    run = _Run(start, lo, hi, [i], t)
            if run:
                yield run

    def _gather(self, run: _Run) -> Tensor:
        """Return ĝ of a run, in scratch memory."""
        gradients: list[Any] = [self.parameters[i].grad for i in run.indices]
        torch._foreach_copy_([self.work_views[i] for i in run.indices], gradients)
        return self.scratch[2, run.lo - run.chunk : run.hi - run.chunk]

    @property
    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    @_plain()
    def gradients_are_finite(self) -> bool:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            return True
        narrow = any(gradient.dtype == torch.float16 for gradient in gradients)  # finite, but their norm may not be
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32 if narrow else None)
        return bool(torch.stack(norms).isfinite().all().item())

    @_plain()
    def begin_step(self) -> None:
        if self.group["mc_samples"] > 1:
            self.grad_sum.zero_()
            self.hess_sum.zero_()

    @_plain()
    def unscale_gradients(self, scale: Tensor) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.grad.div_(scale.to(p.device))

    @_plain()
    def set_gradients_aside(self) -> None:
        """Before another of several draws: clear the gradients, and keep them in case that draw has none."""
        self.aside = [p.grad for p in self.parameters]
        for gradient in self.aside:
            if gradient is not None:
                gradient.zero_()

    @_plain()
    def fold_gradients(self, draws: int) -> None:
        """After one of several draws: add its gradient and curvature up, and show the average gradient so far."""
        for run in self.runs():
            at, ghat = slice(run.lo, run.hi), self._gather(run)
            self.grad_sum[at] += ghat
            self.hess_sum[at] += self._to_curvature(ghat, self.noise[at])
        for p, gradient in zip(self.parameters, self.aside):
            if p.grad is None:
                p.grad = gradient
        self._show_average(draws)

    @_plain()
    def take_gradients_back(self, draws: int) -> None:
        """After a draw that failed: show the average gradient of those before it."""
        for p, gradient in zip(self.parameters, self.aside):
            p.grad = gradient
        self._show_average(draws)

    def _show_average(self, draws: int) -> None:
        self.aside = [None] * len(self.parameters)
        for run in self.runs():
            torch.div(
                self.grad_sum[run.lo : run.hi], draws, out=self.scratch[2, run.lo - run.chunk : run.hi - run.chunk]
            )
            gradients: list[Any] = [self.parameters[i].grad for i in run.indices]
            torch._foreach_copy_(gradients, [self.work_views[i] for i in run.indices])

    @_plain()
    def _on_gradient(self, i: int, p: Tensor) -> None:
        if self.group["perturbed"] and not self.group["averages"] and p.grad is not None:
            state = self.states[i]
            ghat = self.work_views[i].copy_(p.grad).sub_(state["grad_sum"])
            state["hess_sum"] += self._to_curvature(ghat, state["noise"])
            state["grad_sum"].copy_(p.grad)
            self.group["used"] = True

    def release(self) -> None:
        """Let go of the parameters' hooks."""
        for hook in self.hooks:
            hook.remove()

    def _to_curvature(self, ghat: Tensor, noise: Tensor) -> Tensor:
        """Turn ĝ, in place, into what one draw adds to the curvature estimate, before its factor: ĝε or ĝ²."""
        return ghat.mul_(noise if self.group["hess_approx"] == "price" else ghat)

    # --- Algorithm 1 ---

    @_plain()
    def update(self, draws: int) -> None:
        """Move every parameter that has a gradient, and put the mean into all.

        Args:
            draws: by what the summed curvature estimates are to be divided.
        """
        still = set(range(len(self.parameters)))
        for run in self.runs():
            self._update_run(run, draws)
            self.to_mean(run.indices)
            still.difference_update(run.indices)
            for i in run.indices:
                self.states[i]["step"] = run.t
        self.to_mean(still)

    def _update_run(self, run: _Run, draws: int) -> None:
        group, at = self.group, slice(run.lo, run.hi)
        beta1, beta2, delta, clip_radius = group["beta1"], group["beta2"], group["weight_decay"], group["clip_radius"]
        m, g, h, eps, ghat = self.mean[at], self.momentum[at], self.hess[at], self.noise[at], self._gather(run)
        a, b = self.scratch[:2, : len(m)]
        price = group["hess_approx"] == "price"

        # ĥ = ĝ(θ − m)/σ² = ĝε/σ, or B ĝ²
        if group["mc_samples"] == 1:
            hhat = torch.mul(ghat, eps if price else ghat, out=a)
        else:
            # The draws' own gradients are gone; what clipping or unscaling did to their sum, it did to each of them.
            change = torch.div(self.grad_sum[at], draws, out=b)
            change = torch.div(ghat, change, out=b).nan_to_num_(nan=1.0, posinf=1.0, neginf=1.0)
            hhat = torch.div(self.hess_sum[at], draws, out=a).mul_(change if price else change.square_())
        hhat.mul_(self._precision(run.lo, run.hi, b).sqrt_() if price else group["batch_size"])

        # g ← β₁g + (1 − β₁)ĝ
        g.lerp_(ghat, 1 - beta1)

        # h ← β₂h + (1 − β₂)ĥ + ½(1 − β₂)²(h − ĥ)²/(h + δ)
        correction = torch.sub(h, hhat, out=b).square_().div_(torch.add(h, delta, out=ghat) if delta else h)
        h.lerp_(hhat, 1 - beta2).add_(correction, alpha=(1 - beta2) ** 2 / 2)

        # m ← m − α clip((g/(1 − β₁ᵗ) + δm)/(h + δ), ±ξ), with 1 − β₁ᵗ taken out of the bracket
        bias = 1 - beta1**run.t if group["debias"] else 1.0
        lr = group["lr"] * (group["hess_init"] + delta if group["rescale_lr"] else 1.0)
        if delta:
            direction = torch.add(g, m, alpha=bias * delta, out=a).div_(torch.add(h, delta, out=b))
        else:
            direction = torch.div(g, h, out=a)
        m.sub_(direction.clamp_(-clip_radius * bias, clip_radius * bias), alpha=lr / bias)


def _make_buckets(groups: list[dict[str, Any]], state: Any) -> list[_Bucket]:
    """Distribute the parameters over buckets, in order."""
    lots: list[tuple[dict[str, Any], list[Tensor], list[int]]] = []
    position = 0
    for group in groups:
        lot_of: dict[tuple[torch.device, torch.dtype], tuple[dict[str, Any], list[Tensor], list[int]]] = {}
        for p in group["params"]:
            if p.requires_grad:
                key = (p.device, _state_dtype(p))
                lot = lot_of.get(key)
                if lot is None or sum(q.numel() for q in lot[1]) + p.numel() > _BUCKET:
                    lot = lot_of[key] = (group, [], [])
                    lots.append(lot)
                lot[1].append(p)
                lot[2].append(position)
            position += 1
    return [_Bucket(group, parameters, positions, state) for group, parameters, positions in lots]


def _state_dtype(p: Tensor) -> torch.dtype:
    """At β₂ = 1 − 1e-5 a 16-bit Hessian never moves, nor does a 16-bit mean by 3e-5: the state is float32 or wider."""
    return torch.promote_types(p.dtype, torch.float32)


# --- noise ---


def _fill_normal(jobs: list[tuple[Tensor, int]]) -> None:
    """Fill each tensor with N(0, 1) from a generator seeded with its key.

    On a CPU the tensors are shared out to as many threads as torch uses: drawing normal numbers is the costliest part
    of a step, and torch draws on one thread.
    """
    workers = torch.get_num_threads() if all(x.device.type == "cpu" for x, _ in jobs) else 1
    if workers == 1 or sum(x.numel() for x, _ in jobs) < 1 << 16:
        _fill_share(jobs)
    else:
        list(_threads(workers).map(_fill_share, [jobs[i::workers] for i in range(workers)]))


@_plain()
def _fill_share(jobs: list[tuple[Tensor, int]]) -> None:
    generators = {device: torch.Generator(device) for device in {x.device for x, _ in jobs}}
    for x, key in jobs:
        x.normal_(generator=generators[x.device].manual_seed(key))


@functools.cache
def _threads(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="ivon-noise")


if hasattr(os, "register_at_fork"):  # a forked child has the pool, but not its threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _mix(*numbers: int) -> int:
    """Hash integers to 63 bits (splitmix64, chained), so that neighbouring draws and positions get unrelated seeds."""
    mask, x = (1 << 64) - 1, 0
    for number in numbers:
        x = (x ^ (number & mask)) + 0x9E3779B97F4A7C15 & mask
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        x ^= x >> 31
    return x >> 1


def _check_settings(group: dict[str, Any]) -> None:
    """Raise for the first setting that is out of its range."""
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "lr": (lambda x: x >= 0, "a learning rate >= 0. Pass e.g. `lr=0.03`"),
        "ess": (lambda x: x > 0, "a number of training examples > 0. Pass `ess=len(dataset)` or more"),
        "hess_init": (lambda x: x > 0, "an initial Hessian > 0. Pass e.g. `hess_init=1e-3`"),
        "beta1": (lambda x: 0 <= x < 1, "a decay within [0, 1). Pass e.g. `beta1=0.9`"),
        "beta2": (lambda x: 0 <= x < 1, "a decay within [0, 1). Pass e.g. `beta2=1 - 1e-5`"),
        "weight_decay": (lambda x: x >= 0, "a prior precision (divided by `ess`) >= 0. Pass e.g. `weight_decay=0.0`"),
        "clip_radius": (lambda x: x > 0, "a bound > 0 on the step. Pass e.g. `clip_radius=1e-3`, or `math.inf`"),
        "mc_samples": (lambda x: isinstance(x, int) and x >= 1, "a number of draws >= 1. Pass e.g. `mc_samples=1`"),
        "batch_size": (lambda x: x > 0, "the number of examples a gradient averages over, > 0"),
    }
    for name, (in_range, expected) in checks.items():
        value = group[name]
        if name == "batch_size" and value is None:
            continue
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not (math.isfinite(value) or name == "clip_radius") or not in_range(value):
            raise ValueError(f"Expected `{name}` to be {expected}, but got {value!r}.")
    if group["hess_approx"] not in ("price", "gradsq"):
        raise ValueError(f"Expected `hess_approx` to be 'price' or 'gradsq', but got {group['hess_approx']!r}.")
    if group["hess_approx"] == "gradsq" and group["batch_size"] is None:
        raise ValueError(
            "Expected `batch_size` with `hess_approx='gradsq'`, which scales with it, but got None. "
            "Pass the number of examples that one step's gradient averages over."
        )
