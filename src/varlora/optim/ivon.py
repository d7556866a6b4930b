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

The state lies in buckets (`bucket.py`), which do this arithmetic; the noise is a function of the seed (`noise.py`).
This folder needs torch and the standard library only, and may be copied alone into another project; `posterior()` is
the one method that then goes without its return type.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .bucket import EVAL, Bucket, capturing, holds, kernels_for, make_buckets, place_of, plain, version_of
from .noise import mix
from .shards import as_sharded, local, ranks, whole
from .zero import partitions_of

if TYPE_CHECKING:
    from varlora.posterior import DiagonalGaussian

    from .zero import Partitions

__all__ = ["IVON"]

# What is saved only between a draw and the step that uses it.
_TRANSIENT = ("grad_sum", "hess_sum")

_Gradients = tuple[list[tuple[Tensor, Tensor, int]], Tensor | None]


@dataclass
class _Open:
    """What contexts are open: a copy of the optimizer has none."""

    eval_key: int | None = None
    """Key of the evaluation draw that the parameters hold, if they hold one."""
    adds: bool = False
    """Whether one of several draws of a step is open, whose gradient is added to the others' at its end."""


class IVON(torch.optim.Optimizer):
    r"""Variational learning as a drop-in replacement for AdamW.

    Gradients must be taken at a draw from the posterior. Three ways to do so give the same numbers:

    - `optimizer.train()`, backward, `optimizer.step()`, and `optimizer.eval()` before an evaluation. This is what
      `transformers.Trainer` calls already: pass it the optimizer instance and nothing else changes.
    - `with optimizer.sampled_params(train=True): loss.backward()`, then `optimizer.step()`.
    - `optimizer.step(closure)`.

    After `step()` the parameters hold the mean m.

    Gradients accumulate as with any optimizer: all micro-batches between two steps share one draw, and the loss of each
    is scaled by its share; under data parallelism ranks share the draw as well. With `mc_samples = S > 1`, a closure or
    a context is run S times and the S gradients are averaged; under `train()`, each of the first S micro-batches has a
    draw of its own and their (scaled) gradients add up. The gradient is read from `p.grad` when `step` is called, so
    clipping and unscaling act on the mean's and on the Hessian's update alike. A step whose gradient is not finite is
    skipped and counted in `skipped_steps`.

    Noise is a function of the seed, the number of the draw, the parameter's position and the element's, and of nothing
    else: not of device, threads or neighbours.

    Args:
        params: parameters, named parameters (`model.named_parameters()`, needed for a posterior by name) or groups.
            Those that do not require a gradient are left alone.
        lr: learning rate α, a number or a tensor of one; a weight moves by at most `lr * clip_radius` a step.
        ess: effective sample size λ, in training examples; the number of examples approximates Bayes' posterior, a
            larger one gives a colder (narrower) posterior.
        hess_init: initial Hessian h₀ > 0; the initial posterior standard deviation is 1/√(λ(h₀ + δ)).
        beta1: decay β₁ of the gradient's momentum.
        beta2: decay β₂ of the Hessian's average.
        weight_decay: δ ≥ 0; the prior is a zero-mean Gaussian of variance v₀ = 1/(λδ), flat (v₀ = ∞) at 0. The
            paper's Table 3 lists no δ.
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
        fused: whether sampling and step are one compiled kernel each. None: where there are such kernels, which is on a
            CPU if there was a C compiler when the package was installed, and on a GPU of CUDA or ROCm with Triton. Off,
            torch does both operation by operation; results agree to float32 rounding.
        capturable: whether `train` and `step` shall work in a CUDA graph. With the kernels for a GPU and one draw a
            step they do in any case, as nothing is read back, and with `lr` a tensor on the device a schedule acts on
            what is captured; true raises where they do not. Make one step before the capture, capture both, and
            capture anew after loading a state or adding parameters.
        noise_per_rank: under data parallelism, whether each rank draws noise of its own, which divides the variance of
            the curvature estimate by their number. Each rank's ĝε (or ĝ²) is then averaged over ranks beside the
            gradient, which costs a second reduction, twice as large as the parameters, and three more buffers of their
            size. Off, all ranks draw the same.
        process_group: the ranks that average their gradients; all by default. Their seed becomes the first one's.
        generator: where the seed is drawn from when `seed` is not given; the global generator by default.
        seed: the seed of all noise.

    Raises:
        ValueError: an argument is out of its range; the message says what was expected.
        RuntimeError: `fused` is true and there are no kernels.

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
    # The ranks that average their gradients, and whether they have the same seed for sure. A copy begins anew.
    _process_group: Any = None
    _agreed = False
    # Whether the last draw for training was captured in a CUDA graph.
    _captures = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
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
        fused: bool | None = None,
        capturable: bool = False,
        noise_per_rank: bool = False,
        process_group: Any = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> None:
        if seed is None:
            device = generator.device if generator is not None else "cpu"
            seed = int(torch.randint(2**62, (1,), generator=generator, device=device).item())
        # All changed in place: wrappers like Lightning's copy no more than the reference.
        self._buckets: list[Bucket] = []
        # Of parameters with a state but no bucket, as frozen ones: the type and version that they had.
        self._released: dict[Tensor, tuple[torch.dtype, tuple[int, int]]] = {}
        self._open = _Open()
        self._given: list[list[weakref.ref[Tensor]]] = []  # the groups as they were given; some may be no more
        self._process_group = process_group
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
            "fused": fused,
            "capturable": capturable,
            "noise_per_rank": noise_per_rank,
        }
        # Counters lie in the groups, so that whatever saves an optimizer's groups saves them. All but `used`
        # and `strayed` are the same in each.
        counters = {
            "seed": seed,
            "draws": 0,  # training draws so far
            "eval_draws": 0,
            "skipped": 0,
            "drawn": 0,  # training draws since the last step
            "used": False,  # whether a gradient was taken at the last draw (with several draws, under `train`)
            "strayed": False,  # whether a gradient was taken at the mean since, as far as the first parameter tells
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
            for name in ("mc_samples", "noise_per_rank"):
                if group[name] != first[name]:
                    raise ValueError(
                        f"Expected `{name}` to be the same in all groups, but got {group[name]} after {first[name]}. "
                        "Pass it to the optimizer, not to a group."
                    )
            _check_names(self.param_groups)
            _check_real(group["params"])
        except Exception:
            self.param_groups.pop()
            raise
        for name in ("seed", "draws", "eval_draws", "skipped", "drawn", "used", "strayed", "perturbed", "averages"):
            group[name] = first[name]
        self._given.append(list(map(weakref.ref, group["params"])))

    # --- the posterior -----------------------------------------------------------------------------------------------

    def posterior(self) -> DiagonalGaussian:
        """Return N(m, diag(σ²)) with σ = 1/√(λ(h + δ)), by parameter name, as copies.

        Parameters that are sharded over ranks are put together: call it on all of them.

        Raises:
            ValueError: the optimizer was made without names.
        """
        from varlora.posterior import DiagonalGaussian  # the one import that this file can do without

        moments = self._by_name(lambda mean, std: (whole(mean.clone()), whole(std)))
        return DiagonalGaussian({n: m for n, (m, _) in moments.items()}, {n: std for n, (_, std) in moments.items()})

    def mean_sigma(self) -> dict[str, float]:
        """Return the posterior standard deviation of each parameter, averaged over its entries, by parameter name.

        Of parameters that are sharded over ranks as well: call it on all of them.

        Raises:
            ValueError: the optimizer was made without names.
        """
        return self._by_name(lambda _, std: whole(std.mean()).item())

    @property
    def skipped_steps(self) -> int:
        """Steps left out so far because a gradient was not finite; to ask waits for the device."""
        self._read_back()
        return self.param_groups[0]["skipped"]

    # --- draws -------------------------------------------------------------------------------------------------------

    @plain
    def train(self) -> None:
        """Put a draw from the posterior into the parameters: call it before the forward pass of each micro-batch."""
        buckets, now = self._to_train("train()"), self.param_groups[0]
        if now["mc_samples"] > 1 and any(bucket.sharded for bucket in buckets):
            raise RuntimeError(
                "Expected `mc_samples=1` under `train()` with sharded parameters, whose gradients nobody sees arrive, "
                f"but got {now['mc_samples']}. Use `with optimizer.sampled_params(train=True):` for each draw."
            )
        used = any(group["used"] for group in self.param_groups)
        if self._were_cleared(buckets) and used:  # begin again
            self._set(drawn=0)
        new = now["drawn"] == 0 or (used and now["drawn"] < now["mc_samples"])
        if new or not now["perturbed"]:
            self._set(averages=False)
            self._perturb(buckets, new)

    @plain
    def eval(self) -> None:
        """Put the mean into the parameters: call it before an evaluation."""
        if self.param_groups[0]["perturbed"]:
            self._show(perturbed=False)

    @contextmanager
    def sampled_params(self, train: bool = False) -> Iterator[None]:
        """Within the context the parameters are a draw from the posterior; after it they are what they were.

        Args:
            train: whether the gradient taken at this draw is for the next `step`; after it, the parameters are the
                mean. With several draws a step, each counts once its context has ended, whether or not `zero_grad` is
                called before the next. If not, the draw changes nothing in the optimizer, the noise of later training
                steps included.
        """
        with self._train_draw() if train else self._eval_draw():
            yield

    @contextmanager
    def _train_draw(self) -> Iterator[None]:
        buckets, now = self._to_train("sampled_params(train=True)"), self.param_groups[0]
        drawn, several = now["drawn"], now["mc_samples"] > 1
        self._were_cleared(buckets)
        self._set(averages=True)
        if several and drawn:
            for bucket in buckets:
                bucket.set_gradients_aside()
        try:
            self._open.adds = several
            self._perturb(buckets, new=drawn < now["mc_samples"])
            yield
        except BaseException:
            self._show(perturbed=False)
            self._set(drawn=drawn)
            if several and drawn:
                for bucket in self._ready():
                    bucket.take_gradients_back(drawn)
            raise
        finally:
            self._open.adds = False
        if several:
            for bucket in self._ready():
                bucket.fold_gradients(self.param_groups[0]["drawn"])
        self._show(perturbed=False)

    @contextmanager
    def _eval_draw(self) -> Iterator[None]:
        if capturing():
            raise RuntimeError(
                "Expected draws for an evaluation outside of the CUDA graph, which would repeat one draw for ever, but "
                "its capture is under way. Capture the forward pass alone and replay it within `sampled_params()`."
            )
        self._ready()
        outer, now = self._open.eval_key, self.param_groups[0]
        self._set(eval_draws=now["eval_draws"] + 1)
        try:
            self._open.eval_key = mix(now["seed"], EVAL, now["eval_draws"])
            self._show(now["perturbed"])
            yield
        finally:
            self._ready(adopt=False)  # while the key is there: of a parameter that was frozen meanwhile, the mean is
            self._open.eval_key = outer
            self._show(self.param_groups[0]["perturbed"])  # not `now`: loading a state makes new groups

    def _to_train(self, call: str) -> list[Bucket]:
        """Return the buckets, for a draw that trains or a step; raise if this is no time for it."""
        if self._open.eval_key is not None:
            raise RuntimeError(
                f"Expected `optimizer.{call}` outside of draws for an evaluation, but one is under way. Leave "
                "`with optimizer.sampled_params():` first."
            )
        if self._open.adds:
            raise RuntimeError(
                f"Expected `optimizer.{call}` outside of the draw whose gradient is to be added to those of the others "
                "of this step. Leave `with optimizer.sampled_params(train=True):` first."
            )
        buckets = self._ready()
        if self.param_groups[0]["capturable"] or capturing():
            for bucket in buckets:
                bucket.check_capturable()
        return buckets

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and with them what is known of where they were taken."""
        super().zero_grad(set_to_none)
        self._set(strayed=False)

    def _were_cleared(self, buckets: Sequence[Bucket]) -> bool:
        """Return whether there are no gradients any more, so that it does not matter where they were taken.

        Partitions have theirs within a step of DeepSpeed's only: of those it is never known.
        """
        taken = any(group["used"] or group["strayed"] for group in self.param_groups)  # else nobody has to look
        if not taken or self._partitions is not None or any(bucket.has_gradients for bucket in buckets):
            return False
        self._set(strayed=False)
        return True

    def _perturb(self, buckets: Sequence[Bucket], new: bool) -> None:
        """θ = m + σε, with new noise or that of the current draw."""
        now = self.param_groups[0]
        if new:
            self._agree()
            self._set(draws=now["draws"] + 1, drawn=now["drawn"] + 1, used=False)
            if now["drawn"] == 1:
                for bucket in buckets:
                    bucket.begin_step()
            for bucket in buckets:
                bucket.next_draw()
        self._captures = capturing()
        self._set(perturbed=True)  # before it is so: if this is interrupted, `eval` still has something to do
        for bucket in buckets:
            bucket.to_draw()
        self._show_partitions()

    @plain
    def _agree(self) -> None:
        """Take the first rank's seed, once, before anything is drawn with it.

        Ranks seldom seed their global generators alike, and noise that differs without `noise_per_rank` would shrink
        the curvature estimate and let the ranks' posteriors drift apart.
        """
        if not self._agreed and ranks(self._process_group)[1] > 1:
            device = self._told_on(next(p.device for group in self.param_groups for p in group["params"]))
            seed = torch.tensor(self.param_groups[0]["seed"] & (1 << 63) - 1, device=device)
            dist.broadcast(seed, group=self._process_group, group_src=0)
            self._set(seed=int(seed.item()))
            self._agreed = True

    def _told_on(self, device: torch.device) -> torch.device:
        """Return where ranks tell one another what is on a device: DeepSpeed may have its partitions on the CPU."""
        first = None if self._partitions is None else self._partitions.first
        return device if first is None else first.device

    def _show(self, perturbed: bool) -> None:
        """Put into the parameters what belongs there: an evaluation draw, else the training draw, else the mean."""
        for bucket in self._ready(adopt=False):
            if self._open.eval_key is not None:
                bucket.to_draw(self._open.eval_key)
            elif perturbed:
                bucket.to_draw()
            else:
                bucket.to_mean()
        self._set(perturbed=perturbed)
        self._show_partitions()

    def _show_partitions(self) -> None:
        if self._partitions is not None:
            self._partitions.show()

    # --- the step ----------------------------------------------------------------------------------------------------

    @plain
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the posterior by one step of Algorithm 1 and put its mean into the parameters.

        Args:
            closure: clears the gradients, computes the loss, runs backward and returns the loss; called once for each
                Monte Carlo sample, at a draw of its own. Where something was drawn since the last step, by `train()` or
                contexts, it is called once as things are, and may do nothing: Lightning gives every step a closure.

        Returns:
            The closure's loss, averaged over the samples and without a graph; None without a closure.

        Raises:
            RuntimeError: there are gradients, but none was taken at a draw, or one was taken at the mean after it, or
                the closure adds to such ones, or the parameters hold a draw for an evaluation.
        """
        now, losses = self.param_groups[0], []
        if closure is not None and now["drawn"]:  # after `train` or contexts: Lightning passes a closure all the same
            with torch.enable_grad():
                losses.append(closure())
        elif closure is not None:
            before = self._gradients()
            try:
                for sample in range(now["mc_samples"]):
                    with torch.enable_grad(), self.sampled_params(train=True):
                        losses.append(closure())
                        if sample == 0:
                            _check_cleared(before)
            except BaseException:
                self._set(drawn=0)
                raise
        buckets = self._to_train("step()")
        if (scale := getattr(self, "grad_scale", None)) is not None:  # of a GradScaler
            for bucket in buckets:
                bucket.unscale_gradients(scale)
        if any(bucket.has_gradients for bucket in buckets):
            if not now["drawn"] and self._partitions is None and self._makes_state():
                return None
            if not now["drawn"]:
                raise RuntimeError(
                    "Expected gradients taken at a draw from the posterior, but nothing was drawn since the last step. "
                    "Call `optimizer.train()` before the forward pass, or use "
                    "`with optimizer.sampled_params(train=True):`, or pass a closure to `step`."
                )
            if any(group["strayed"] for group in self.param_groups):
                raise RuntimeError(
                    "Expected all gradients taken at a draw from the posterior, but one was taken at the mean since "
                    "the draw, after `eval()` or the end of its context. Clear the gradients, and call "
                    "`optimizer.train()` before each forward pass."
                )
            if self._captures != capturing():
                raise RuntimeError(
                    "Expected `train` and `step` both in CUDA graphs or both outside, but one of them is captured "
                    "and the other is not. Capture both, or leave both out."
                )
            self._look_at_gradients(buckets)
            for bucket in buckets:
                bucket.reduce()
                bucket.update(draws=now["drawn"] if now["averages"] else 1)
            self._set(perturbed=False)
        self.eval()
        self._set(drawn=0, strayed=False)
        return sum(losses) / len(losses) if losses and losses[0] is not None else None

    @plain
    def _makes_state(self) -> bool:
        """Whether this is no step: a checkpoint's reader makes one with gradients of zero, so that there is a state."""
        groups = self.param_groups
        first = not any(self.state[p]["step"] for group in groups for p in group["params"] if p in self.state)
        return first and not any(
            whole(p.grad.any()).item() for group in groups for p in group["params"] if p.grad is not None
        )

    @plain
    def _look_at_gradients(self, buckets: Sequence[Bucket]) -> None:
        """Note in all buckets whether a gradient is not finite, of other ranks' shards too, without reading it back."""
        notes = [bucket.look_at_gradients() for bucket in buckets]
        for note in notes[1:]:
            torch.maximum(notes[0], _on(notes[0].device, note), out=notes[0])
        if any(bucket.sharded for bucket in buckets):
            told = _on(self._told_on(notes[0].device), notes[0])
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._process_group)
            notes[0].copy_(_on(notes[0].device, told))
        for note in notes[1:]:
            note.copy_(_on(note.device, notes[0]))

    # --- storage -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that an exact continuation needs; between a draw and its step, of the draw as well."""
        self._adopt_outside_changes()
        self._read_back()
        saved = super().state_dict()
        in_flight = self.param_groups[0]["drawn"] > 0
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, state in saved["state"].items():
            kept = {key: value for key, value in state.items() if in_flight or key not in _TRANSIENT}
            if in_flight and parameters[index].grad is not None:
                kept["grad"] = parameters[index].grad
            saved["state"][index] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
            saved["state"][index]["step"] = int(state["step"])  # of which count is kept on the device
        for group in saved["param_groups"]:
            group["lr"] = group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"]
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state and put its mean (or, in the middle of a step, its draw) into the parameters.

        Args:
            state_dict: what `state_dict` returned, for parameters of the same shapes in the same order.

        Raises:
            ValueError: groups or shapes are those of another model, or the same names are in another order.
        """
        _check_order(state_dict["param_groups"], self.param_groups)
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
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})  # torch would round the state to the parameters' type
        for group, rate in zip(self.param_groups, rates):
            if isinstance(rate, Tensor):  # which stays on its device
                group["lr"] = rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])
        now = self.param_groups[0]
        for parameter, index in zip(parameters, indices):
            if index in state_dict["state"]:
                self.state[parameter] = state = dict(state_dict["state"][index])
                gradient = state.pop("grad", None)
                if now["drawn"]:
                    parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
        self._note_released()
        if self.state:
            self._show(now["perturbed"])

    def __getstate__(self) -> dict[str, Any]:
        self._adopt_outside_changes()
        self._read_back()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a state that was saved before these were there
            group.setdefault("fused", None)
            group.setdefault("capturable", False)
            group.setdefault("noise_per_rank", False)
            group.setdefault("strayed", False)
        self.__dict__.setdefault("_buckets", []).clear()
        self.__dict__.setdefault("_released", {})
        self.__dict__.setdefault("_open", _Open())
        self.__dict__.setdefault("_given", [list(map(weakref.ref, group["params"])) for group in self.param_groups])
        self._note_released()
        if self.state and (self.param_groups[0]["drawn"] or self.param_groups[0]["perturbed"]):
            self._ready()  # a backward pass may come next, which the buckets watch

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _set(self, **counters: Any) -> None:
        for group in self.param_groups:
            group.update(counters)

    def _read_back(self) -> None:
        """Note here what is known on a device alone."""
        for bucket in self._buckets:
            bucket.read_back()
        for counter in ("draws", "skipped"):
            self._set(**{counter: max(group[counter] for group in self.param_groups)})

    def _gradients(self) -> _Gradients:
        """Return the parameters that have a gradient, with it and its version, and whether it is not zero.

        That is looked at in the smallest gradient, and stays on its device.
        """
        parameters = (p for group in self.param_groups for p in group["params"])
        found = [(p, p.grad, p.grad._version) for p in parameters if p.grad is not None]
        smallest = min((gradient for _, gradient, _ in found), key=Tensor.numel, default=None)
        return found, None if smallest is None else smallest.any()

    def _by_name(self, value: Callable[[Tensor, Tensor], Any]) -> dict[str, Any]:
        """Return a value of each parameter's mean (a view) and standard deviation by name, in the order as given."""
        if any("param_names" not in group for group in self.param_groups):
            raise ValueError(
                "Expected an optimizer that knows its parameters' names, but it was made without. "
                "Pass named parameters: `IVON(model.named_parameters(), ...)`."
            )
        names = [name for group in self.param_groups for name in group["param_names"]]
        buckets = self._ready()
        if self._partitions is None:
            found = {at: value(*x) for bucket in buckets for at, x in zip(bucket.positions, bucket.moments())}
        else:
            moments = [x for bucket in buckets for x in bucket.moments()]
            means, stds = (self._partitions.whole(x) for x in zip(*moments))
            found = {at: value(mean, stds[at]) for at, mean in means.items()}
        return {name: found[at] for at, name in enumerate(names) if at in found}

    @property
    def _partitions(self) -> Partitions | None:
        """What DeepSpeed's ZeRO has put in the place of the parameters, if it has."""
        return self._buckets[0].partitions if self._buckets else None

    def _ready(self, adopt: bool = True) -> list[Bucket]:
        """Return the buckets, made anew where parameters were added, unfrozen, moved or laid out anew.

        With `adopt`, values that others put into the parameters since our last write (a loaded checkpoint) become the
        mean.
        """
        wanted = {place_of(p) for group in self.param_groups for p in group["params"] if p.requires_grad}
        known = {place for bucket in self._buckets for place in bucket.places}
        buckets = self._buckets
        if self._partitions is not None and wanted < known:  # DeepSpeed's ZeRO steps with one group after the other
            buckets = [bucket for bucket in buckets if wanted.issuperset(bucket.places)]
        elif wanted != known or not known:
            perturbed = self.param_groups[0]["perturbed"]
            partitions = self._find_partitions()
            if capturing():
                raise RuntimeError(
                    "Expected a state that was there before the capture of a CUDA graph, but it has to be made. "
                    "Make one step before the capture."
                )
            for bucket in buckets:
                bucket.follow_weight_decay()
            self._adopt_into_released()
            self._release()
            buckets[:] = make_buckets(self.param_groups, self.state, self._process_group, partitions)
            self._note_released()
            if perturbed or self._open.eval_key is not None:
                for bucket in buckets:
                    bucket.to_draw(self._open.eval_key)
        elif adopt:
            self._adopt_outside_changes()
        for bucket in buckets:
            bucket.follow_weight_decay()
        return buckets

    def _find_partitions(self) -> Partitions | None:
        """Return what DeepSpeed's ZeRO has put in the place of the parameters; raise if it comes too late for that."""
        given = [[reference() for reference in group] for group in self._given]
        found = partitions_of(given, [p for group in self.param_groups for p in group["params"]])
        if found is not None:
            before = [p for group in given for p in group if p is not None and p in self.state]
            if before and (self.param_groups[0]["draws"] or self._open.eval_key is not None):
                raise RuntimeError(
                    "Expected an optimizer that had drawn nothing and loaded no state before DeepSpeed took its "
                    "parameters, but it had. Pass a new one to `deepspeed.initialize`, and load a checkpoint after it."
                )
            for p in before:  # what is known without a draw is known of the partitions too
                del self.state[p]
        return found

    def _adopt_outside_changes(self) -> None:
        """Make values that others wrote into the parameters the mean, unless those hold a draw of training."""
        if not self.param_groups[0]["perturbed"] and (self._partitions is None or self._open.eval_key is None):
            for bucket in self._buckets:
                bucket.adopt_outside_changes()
        if self._released:
            self._adopt_into_released()

    @plain
    def _note_released(self) -> None:
        """Note what parameters without a bucket hold: what others write to them later is their mean from then on."""
        ours = {p for bucket in self._buckets for p in bucket.parameters}
        rest = [p for group in self.param_groups for p in group["params"] if p in self.state and p not in ours]
        self._released.clear()
        self._released.update((p, (p.dtype, version_of(local(p)))) for p in rest)

    @plain
    def _adopt_into_released(self) -> None:
        """Make values that others wrote into parameters without a bucket, which hold no draw, the mean in the state."""
        for p, (dtype, version) in self._released.items():
            shard, mean = local(p), local(self.state.get(p, {}).get("mean"))
            now = version_of(shard)
            if now != version and mean is not None and shard.shape == mean.shape:
                if not holds(shard, mean, dtype):  # a new tensor, as the old one may be a checkpoint's
                    self.state[p]["mean"] = as_sharded(shard.to(mean.dtype, copy=True), p)
                self._released[p] = dtype, now

    def _release(self) -> None:
        """Let go of the buckets and leave the mean in the parameters, some of which may not be ours from now on."""
        self._read_back()
        for bucket in self._buckets:
            if self.param_groups[0]["perturbed"] or self._open.eval_key is not None:
                bucket.to_mean()
            else:
                bucket.adopt_outside_changes()
            bucket.release()
        self._buckets.clear()


def _on(device: torch.device, note: Tensor) -> Tensor:
    """Return a note as it is on a device, without waiting where that can be."""
    return note.to(device, non_blocking=device.type != "cpu")


def _check_names(groups: Sequence[dict[str, Any]]) -> None:
    """Raise if two parameters have the same name, by which the posterior could not tell them apart."""
    counts = Counter(name for group in groups for name in group.get("param_names", ()))
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            f"Expected each parameter to have a name of its own, but {twice[0]!r} is there {counts[twice[0]]} times. "
            "Take the names from the whole model: `[(name, p) for name, p in model.named_parameters() if ...]`."
        )


def _check_real(parameters: Sequence[Tensor]) -> None:
    """Raise if a parameter that is to be trained is complex: the posterior is over real numbers."""
    found = next((p.dtype for p in parameters if p.requires_grad and p.is_complex()), None)
    if found is not None:
        raise ValueError(
            f"Expected real parameters, but got one of {found}. Make it of real and imaginary parts: "
            "`nn.Parameter(torch.view_as_real(values))`, and `torch.view_as_complex` where it is used."
        )


def _check_order(saved: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> None:
    """Raise if the saved names are ours, but in another order: state and noise are a parameter's by its position."""
    theirs, mine = ([name for group in groups for name in group.get("param_names", ())] for groups in (saved, ours))
    if theirs != mine and sorted(theirs) == sorted(mine):
        at = next(i for i, (a, b) in enumerate(zip(theirs, mine)) if a != b)
        raise ValueError(
            f"Expected the parameters in the order in which they were saved, but number {at} is {mine[at]!r} and was "
            f"{theirs[at]!r}. Make the optimizer with them in the saved order: `param_names` of its `param_groups`."
        )


def _check_cleared(before: _Gradients) -> None:
    """Raise if a closure added to gradients from before it, which were taken without a draw."""
    found, not_zero = before
    # Clearing in place and adding would be two changes.
    added = any(p.grad is gradient and gradient._version == version + 1 for p, gradient, version in found)
    if added and not_zero is not None and whole(not_zero):
        raise RuntimeError(
            "Expected the closure to clear the gradients, but it added to some for which nothing was drawn since the "
            "last step. When gradients accumulate, call `optimizer.train()` before each forward pass."
        )


def _check_settings(group: dict[str, Any]) -> None:
    """Raise for the first setting that is out of its range."""
    checks: dict[str, tuple[Callable[[Any], bool], str, str]] = {
        "lr": (lambda x: x >= 0, "a learning rate >= 0", "e.g. `lr=0.03`"),
        "ess": (lambda x: x > 0, "a number of training examples > 0", "`ess=len(dataset)` or more"),
        "hess_init": (lambda x: x > 0, "an initial Hessian > 0", "e.g. `hess_init=1e-3`"),
        "beta1": (lambda x: 0 <= x < 1, "a decay within [0, 1)", "e.g. `beta1=0.9`"),
        "beta2": (lambda x: 0 <= x < 1, "a decay within [0, 1)", "e.g. `beta2=1 - 1e-5`"),
        "weight_decay": (lambda x: x >= 0, "a prior precision (divided by `ess`) >= 0", "e.g. `weight_decay=0.0`"),
        "clip_radius": (lambda x: x > 0, "a bound > 0 on the step", "e.g. `clip_radius=1e-3`, or `math.inf`"),
        "mc_samples": (lambda x: isinstance(x, int) and x >= 1, "a number of draws >= 1", "e.g. `mc_samples=1`"),
        "batch_size": (lambda x: x > 0, "the number of examples a gradient averages over, > 0", "e.g. `batch_size=4`"),
    }
    for name, (in_range, expected, instead) in checks.items():
        value = group[name]
        if name == "batch_size" and value is None:
            continue
        if name == "lr" and isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else value
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not number or not (math.isfinite(value) or name == "clip_radius") or not in_range(value):
            raise ValueError(f"Expected `{name}` to be {expected}, but got {value!r}. Pass {instead}.")
    if group["fused"] not in (True, False, None):
        raise ValueError(
            f"Expected `fused` to be True, False or None, but got {group['fused']!r}. Leave it out to have kernels "
            "where there are some."
        )
    fused = group["fused"]
    without = next((p.device for p in group["params"] if fused and kernels_for(p.device) is None), None)
    if without is not None:
        remedy = "Install a C compiler and then varlora again" if without.type == "cpu" else "Install triton"
        raise RuntimeError(
            f"Expected compiled kernels with `fused=True`, but there are none for {without}. {remedy}, or leave "
            "`fused` out."
        )
    if group["hess_approx"] not in ("price", "gradsq"):
        raise ValueError(
            f"Expected `hess_approx` to be 'price' or 'gradsq', but got {group['hess_approx']!r}. Leave it out for "
            "'price'."
        )
    if group["hess_approx"] == "gradsq" and group["batch_size"] is None:
        raise ValueError(
            "Expected `batch_size` with `hess_approx='gradsq'`, which scales with it, but got None. "
            "Pass the number of examples that one step's gradient averages over."
        )
