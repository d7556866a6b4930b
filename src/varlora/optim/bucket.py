"""The state of IVON as flat buffers, and the arithmetic of Algorithm 1 on them.

Parameters of one group, device and type lie side by side, so that a draw or a step is a few operations on long tensors,
however many parameters there are. The kernels of `native.c` on a CPU and of `gpu.py` on a GPU do each in one pass over
memory, with the noise made where it is used. Elsewhere, or without kernels, torch does it operation by operation.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import native
from .noise import Layout, mix
from .shards import as_sharded, is_sharded, local, pieces, ranks, shard_as

if TYPE_CHECKING:
    from . import gpu
    from .zero import Partitions

__all__ = [
    "EVAL",
    "TRAIN",
    "Bucket",
    "capturing",
    "holds",
    "kernels_for",
    "make_buckets",
    "place_of",
    "plain",
    "version_of",
]

P = ParamSpec("P")
R = TypeVar("R")

# A bucket holds at most this many elements (a larger parameter has its own).
_BUCKET = 1 << 24
# On a CPU, torch's operations are worked off in chunks that fit the cache: an update then moves each buffer through
# memory once instead of once an operation.
_CHUNK = 1 << 20
# Streams of random numbers: the noise of training steps and that of evaluation draws.
TRAIN, EVAL = 0, 1


def plain(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function work with neither a graph nor inference tensors, whatever its caller is in the middle of."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return inner


def capturing() -> bool:
    """Whether what a GPU is given to do is being captured in a CUDA graph, instead of done."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def kernels_for(device: torch.device) -> str | None:
    """Return which compiled kernels there are for a device: `"native"`, `"triton"` or none."""
    if device.type == "cpu" and native.library() is not None:
        return "native"
    return "triton" if device.type == "cuda" and _triton_works(device) else None


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether a small kernel runs: Triton may be too old, or lack the C compiler that it starts with."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import gpu

        gpu.try_out(device)
    except Exception as error:
        warnings.warn(f"IVON's kernels for {device} cannot be used, and torch does their work: {error}", stacklevel=2)
        return False
    return True


def place_of(p: Tensor) -> tuple[Any, ...]:
    """Return what must not change about a parameter while a bucket writes to its memory."""
    return id(p), p.device, p.dtype, p.shape, p.is_contiguous()


def version_of(p: Tensor) -> tuple[int, int]:
    """Return what changes when someone writes to a parameter's memory, or gives it another."""
    return p.data_ptr(), -1 if p.is_inference() else p._version


def holds(p: Tensor, mean: Tensor, dtype: torch.dtype) -> bool:
    """Whether a parameter holds the mean as it was put into it when it was of type `dtype`; it may have another now."""
    return torch.equal(p, mean.to(dtype).to(p))


def make_buckets(
    groups: Sequence[dict[str, Any]], state: Any, process_group: Any = None, partitions: Partitions | None = None
) -> list[Bucket]:
    """Distribute the parameters over buckets, in order."""
    lots: list[tuple[dict[str, Any], list[Tensor], list[int]]] = []
    position = 0
    for group in groups:
        lot_of: dict[tuple[torch.device, torch.dtype], tuple[dict[str, Any], list[Tensor], list[int]]] = {}
        for p in group["params"]:
            if p.requires_grad:
                key = (p.device, p.dtype)
                lot = lot_of.get(key)
                if lot is None or sum(local(q).numel() for q in lot[1]) + local(p).numel() > _BUCKET:
                    lot = lot_of[key] = (group, [], [])
                    lots.append(lot)
                lot[1].append(p)
                lot[2].append(position)
            position += 1
    return [
        Bucket(group, parameters, positions, state, process_group, partitions) for group, parameters, positions in lots
    ]


class _Run(NamedTuple):
    """Neighbouring parameters of a chunk that have a gradient and have made the same steps."""

    chunk: int  # where the chunk starts in the flat buffers
    lo: int
    hi: int
    indices: list[int]


class Bucket:
    """Parameters of one group, device and type, with their state side by side in flat buffers.

    Memory for each element: mean, momentum and Hessian, 4 bytes each in float32; with several Monte Carlo samples or
    noise of each rank three more. Where torch does the arithmetic also the noise, with a quarter of a byte to say where
    it comes from, and three scratch buffers of a chunk's size, which on a GPU is up to the whole bucket; a CPU's
    kernels need two of them for parameters of 16 bits, and none for others.
    """

    @plain
    def __init__(
        self,
        group: dict[str, Any],
        parameters: list[Tensor],
        positions: list[int],
        state: Any,
        process_group: Any = None,
        partitions: Partitions | None = None,
    ) -> None:
        self.group, self.parameters, self.positions = group, parameters, positions
        self.process_group, self.partitions = process_group, partitions
        self.sharded = partitions is not None or any(map(is_sharded, parameters))
        if self.sharded and group["noise_per_rank"]:
            raise ValueError(
                "Expected `noise_per_rank` with parameters that each rank has whole, but some are sharded, and their "
                "ranks never see a gradient of their own. Leave it out."
            )
        if partitions is not None and group["mc_samples"] > 1:
            raise ValueError(
                "Expected `mc_samples=1` with DeepSpeed's ZeRO, which shows gradients in the step only, all together, "
                f"but got {group['mc_samples']}. Leave it out, and accumulate gradients."
            )
        self.states = [state[p] for p in parameters]
        shards = self.shards
        ends = list(itertools.accumulate(p.numel() for p in shards))
        self.spans = list(zip([0, *ends], ends))
        self.places = [place_of(p) for p in parameters]
        # At β₂ = 1 − 1e-5 a 16-bit Hessian never moves, nor does a 16-bit mean by 3e-5.
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        self.like: dict[str, Any] = {"device": parameters[0].device, "dtype": dtype}
        self.mean, self.momentum = torch.zeros(2, ends[-1], **self.like)
        self.hess = torch.full((ends[-1],), group["hess_init"], **self.like)
        self.delta: float = group["weight_decay"]  # as it was when h + δ was last known to be above 0
        flats = {"mean": self.mean, "momentum": self.momentum, "hess": self.hess}
        # Whether gradients are looked at as they arrive, before they are added up, averaged over ranks or clipped.
        self.watches = group["mc_samples"] > 1 or group["noise_per_rank"]
        if self.watches:
            self.sums = torch.zeros(2, ends[-1], **self.like)
            self.grad_sum, self.hess_sum = self.sums
            flats |= {"grad_sum": self.grad_sum, "hess_sum": self.hess_sum}
        self.views: dict[str, list[Tensor]] = {name: [] for name in flats}
        for p, shard, state_p, (lo, hi) in zip(parameters, shards, self.states, self.spans):
            state_p.setdefault("step", 0)
            state_p.setdefault("mean", p)
            for name, flat in flats.items():
                view = flat[lo:hi].view(shard.shape)
                if name in state_p:
                    view.copy_(local(state_p[name]))
                self.views[name].append(view)
                state_p[name] = as_sharded(view, p)

        self.pieces = [
            pieces(p, position, lo) if partitions is None else partitions.pieces(p, lo)
            for p, position, (lo, _) in zip(parameters, positions, self.spans)
        ]
        self.layouts: dict[int, Layout] = {}  # of each chunk's noise, by its first parameter
        steps = [int(state_p["step"]) for state_p in self.states]
        self.kernels: native.Kernels | None = None
        self.gpu: gpu.Kernels | None = None
        contiguous = all(p.is_contiguous() and not native.lazy(p) for p in shards)
        wanted = group["fused"] is not False and dtype == torch.float32
        kind = kernels_for(self.mean.device) if wanted else None
        flat = native.Flat(self.mean, self.momentum, self.hess, self.pieces)
        if kind == "native":
            self.kernels = native.Kernels(flat)
        elif kind == "triton" and contiguous:
            from . import gpu  # which needs triton

            self.gpu = gpu.Kernels(flat, shards, steps, group["draws"], group["skipped"])
            self.gpu.set_key(self.train_key)
        # Which kernels make the step too: none where gradients are watched.
        self.cpu_step = None if self.watches else self.kernels
        self.gpu_step = None if self.watches else self.gpu
        # Whether a step is left out, and so how many were made, is known on the device alone: to read it is to wait.
        # `bad` is 1 where a gradient of this step is not finite, its own or another's.
        if self.gpu_step is not None:
            self.bad, self.steps, self.skipped = self.gpu_step.bad, self.gpu_step.steps, self.gpu_step.counters[1:]
        else:
            device = self.mean.device
            self.bad = torch.zeros(1, dtype=torch.int32, device=device)
            self.steps = torch.tensor(steps, dtype=torch.int32, device=device)
            self.skipped = torch.tensor([group["skipped"]], device=device)
        for i, state_p in enumerate(self.states):
            state_p["step"] = self.steps[i]
        self.alike = steps  # the same number for parameters that have made the same steps
        # Whether a CPU's kernels write to the parameters themselves.
        self.direct = self.kernels is not None and contiguous and parameters[0].dtype == dtype
        self.chunks = self._make_chunks()
        self.noise_key: int | None = None  # of what `noise` holds

        self.looked_at: list[Tensor | None] = []
        self.versions = [version_of(p) for p in shards]
        self.aside: list[Tensor | None] = [None] * len(parameters)
        self.hess_aside: Tensor | None = None
        self.arriving: list[Tensor | None] = [None] * len(parameters)
        self.hooks: list[Any] = []
        watched = parameters if self.watches else parameters[:1]
        if partitions is not None:  # which see nothing arrive themselves
            watched = [] if partitions.first is None else [partitions.first]
        for i, p in enumerate(watched):
            if self.watches:
                self.hooks.append(p.register_hook(_weakly(self._arrives, i)))
            self.hooks.append(p.register_post_accumulate_grad_hook(_weakly(self._has_arrived, i)))

    @property
    def shards(self) -> list[Tensor]:
        """This rank's part of each parameter: the parameter, where it is not sharded."""
        return list(map(local, self.parameters)) if self.sharded else self.parameters

    def gradients(self, indices: Iterable[int]) -> list[Any]:
        """Return this rank's part of the gradients of some parameters, as they are sharded."""
        found = [self.parameters[i].grad for i in indices]
        return (
            [shard_as(gradient, self.parameters[i]) for gradient, i in zip(found, indices)] if self.sharded else found
        )

    def _make_chunks(self) -> list[list[int]]:
        size = _CHUNK if self.mean.device.type == "cpu" and not self.direct else _BUCKET
        chunks: list[list[int]] = []
        for i, (_, hi) in enumerate(self.spans):
            if not chunks or hi - self.spans[chunks[-1][0]][0] > size:
                chunks.append([])
            chunks[-1].append(i)
        return chunks

    @functools.cached_property
    def scratch(self) -> Tensor:
        """Three buffers as long as the longest chunk, for what is in between while one is being worked on."""
        length = max(self.spans[chunk[-1]][1] - self.spans[chunk[0]][0] for chunk in self.chunks)
        return torch.empty(3, length, **self.like)

    @functools.cached_property
    def work_views(self) -> list[list[Tensor]]:
        """Each parameter's part of each scratch buffer, while its chunk is being worked on."""
        return [
            [
                row[self.spans[i][0] - self.spans[chunk[0]][0] :][: self.views["mean"][i].numel()].view_as(
                    self.views["mean"][i]
                )
                for chunk in self.chunks
                for i in chunk
            ]
            for row in self.scratch
        ]

    # --- noise ---

    @functools.cached_property
    def noise(self) -> Tensor:
        """ε of a training draw: of the one with `noise_key`."""
        return torch.empty_like(self.mean)

    def noise_of(self, key: int) -> Tensor:
        """Return ε of a training draw, for all parameters."""
        if self.noise_key != key:
            out = [self.noise[lo:hi] for lo, hi in self.spans]
            if self.gpu is not None:
                self.gpu.normal(key, out)
            else:
                for chunk in self.chunks:
                    self._fill(key, chunk, [out[i] for i in chunk])
            self.noise_key = key
        return self.noise

    @property
    def train_key(self) -> int:
        """Of the last training draw."""
        own = [ranks(self.process_group)[0]] if self.group["noise_per_rank"] else []
        return mix(self.group["seed"], TRAIN, self.group["draws"] - 1, *own)

    @plain
    def next_draw(self) -> None:
        """Go on to the next training draw, which the group has counted."""
        if self.gpu_step is not None:  # counts for itself, in a CUDA graph as well
            self.gpu_step.next_draw(self.group["seed"], TRAIN)
        elif self.gpu is not None:
            self.gpu.set_key(self.train_key)

    def _fill(self, key: int, chunk: Sequence[int], out: Sequence[Tensor]) -> None:
        if self.kernels is not None:
            self.kernels.normal(key, chunk, out)
            return
        if chunk[0] not in self.layouts:
            self.layouts[chunk[0]] = Layout([piece for i in chunk for piece in self.pieces[i]], self.mean.device)
        parts = []
        for x, i in zip(out, chunk):
            parts += [x.view(-1)[piece.at - self.spans[i][0] :][: piece.numel] for piece in self.pieces[i]]
        self.layouts[chunk[0]].fill(key, parts)

    # --- parameters ---

    @plain
    def to_mean(self, indices: Iterable[int] | None = None) -> None:
        """Put the mean into all parameters, or into some."""
        chosen = range(len(self.parameters)) if indices is None else list(indices)
        if chosen:
            shards = self.shards
            torch._foreach_copy_([shards[i] for i in chosen], [self.views["mean"][i] for i in chosen])
        self._written(chosen)

    @plain
    def to_draw(self, key: int | None = None) -> None:
        """Put θ = m + σε into the parameters, with the ε of the training draw or of a key."""
        shards = self.shards
        if self.gpu is not None:
            self.gpu.draw(shards, self.group["ess"], self.group["weight_decay"], key)
            torch.autograd.graph.increment_version(shards)
            self._written(range(len(shards)))
            return
        for chunk in self.chunks:
            targets = [shards[i] for i in chunk]
            if self.direct and self.kernels is not None:
                self.kernels.draw(self.train_key if key is None else key, chunk, targets, self._settings())
                torch.autograd.graph.increment_version(targets)
            else:
                views = [self.work_views[2][i] for i in chunk]
                self._draw_into(views, key, chunk)
                torch._foreach_copy_(targets, views)
            self._written(chunk)

    def _draw_into(self, views: Sequence[Tensor], key: int | None, chunk: Sequence[int]) -> None:
        """Write θ of a chunk into the third scratch buffer, whose views these are."""
        if self.kernels is not None:
            self.kernels.draw(self.train_key if key is None else key, chunk, views, self._settings())
            return
        lo, hi = self.spans[chunk[0]][0], self.spans[chunk[-1]][1]
        theta = self.scratch[2, : hi - lo]
        if key is None:
            eps = self.noise_of(self.train_key)[lo:hi]
        else:
            self._fill(key, chunk, views)
            eps = theta
        sigma = self._precision(lo, hi, self.scratch[0, : hi - lo]).rsqrt_()
        torch.addcmul(self.mean[lo:hi], sigma, eps, out=theta)

    def _written(self, indices: Iterable[int]) -> None:
        torch.clear_autocast_cache()  # in whose context the next pass would else be that of the values before
        shards = self.shards
        for i in indices:
            self.versions[i] = version_of(shards[i])

    @plain
    def adopt_outside_changes(self) -> None:
        """Make values that others wrote into the parameters, a loaded checkpoint, the mean.

        Into partitions DeepSpeed writes by way of `.data`, which no version counts: they have to hold the mean.
        """
        for i, (p, mean) in enumerate(zip(self.shards, self.views["mean"])):
            version = version_of(p)
            if version != self.versions[i] or self.partitions is not None:
                if not holds(p, mean, self.places[i][2]):
                    mean.copy_(p)
                self.versions[i] = version

    @plain
    def follow_weight_decay(self) -> None:
        """Where δ was lowered and h is below 0, let h + δ fall to its half at the most, as in a step, and not to 0."""
        delta = self.group["weight_decay"]
        if delta < self.delta:
            least = (self.hess + self.delta) / 2 - delta
            self.hess.copy_(torch.where(self.hess > 0, self.hess, torch.maximum(self.hess, least)))
        self.delta = delta

    def _precision(self, lo: int, hi: int, out: Tensor) -> Tensor:
        """1/σ² = λ(h + δ)."""
        h, ess, delta = self.hess[lo:hi], self.group["ess"], self.group["weight_decay"]
        return torch.add(h, delta, out=out).mul_(ess) if delta else torch.mul(h, ess, out=out)

    @plain
    def moments(self) -> list[tuple[Tensor, Tensor]]:
        """Return mean (a view) and standard deviation (a new tensor) of each parameter, sharded as it is."""
        found = []
        for p, state, mean, (lo, hi) in zip(self.parameters, self.states, self.views["mean"], self.spans):
            std = self._precision(lo, hi, torch.empty_like(self.hess[lo:hi])).rsqrt_().view_as(mean)
            found.append((state["mean"], as_sharded(std, p)))
        return found

    # --- gradients ---

    def runs(self) -> Iterator[_Run]:
        """Yield what is updated together."""
        for chunk in self.chunks:
            indices: list[int] = []
            for i in chunk:
                if self.parameters[i].grad is None:
                    continue
                if indices and not self._follows(i, indices[-1]):
                    yield self._run(chunk, indices)
                    indices = []
                indices.append(i)
            if indices:
                yield self._run(chunk, indices)

    def _follows(self, i: int, before: int) -> bool:
        return self.spans[before][1] == self.spans[i][0] and self.alike[before] == self.alike[i]

    def _run(self, chunk: Sequence[int], indices: list[int]) -> _Run:
        return _Run(self.spans[chunk[0]][0], self.spans[indices[0]][0], self.spans[indices[-1]][1], indices)

    def _gather(self, run: _Run) -> Tensor:
        """Return ĝ of a run, in the third scratch buffer."""
        torch._foreach_copy_([self.work_views[2][i] for i in run.indices], self.gradients(run.indices))
        return self.scratch[2, run.lo - run.chunk : run.hi - run.chunk]

    @property
    def has_gradients(self) -> bool:
        """Whether a parameter has a gradient."""
        return any(p.grad is not None for p in self.parameters)

    def check_capturable(self) -> None:
        """Raise if a step could not be captured in a CUDA graph."""
        if self.gpu_step is None:
            raise RuntimeError(
                "Expected steps that can be captured in a CUDA graph, which takes contiguous parameters of at most 32 "
                "bits on a GPU, Triton, `mc_samples=1` and neither `fused=False` nor `noise_per_rank`, but got "
                f"{self.parameters[0].dtype} parameters on {self.mean.device}, mc_samples={self.group['mc_samples']}, "
                f"fused={self.group['fused']} and noise_per_rank={self.group['noise_per_rank']}. Change that, or leave "
                "`capturable` and the graph out."
            )

    @plain
    def look_at_gradients(self) -> Tensor:
        """Return, on the device, whether a gradient is not finite: what `update` will ask."""
        there = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        gradients = self.gradients(there)
        if self.kernels is not None and all(native.readable(gradient) for gradient in gradients):
            return self.bad.fill_(not self.kernels.finite(there, gradients))
        _check_dense(gradients)
        if self.gpu_step is not None:
            # Of a gradient that kernels cannot read, a copy that they can; in use until the step.
            self.looked_at = [None] * len(self.parameters)
            for i, x in zip(there, gradients):
                self.looked_at[i] = (x.clone() if native.lazy(x) else x).to(self.parameters[i].dtype).contiguous()
            self.gpu_step.look(self.looked_at)
        elif gradients:
            narrow = any(gradient.dtype == torch.float16 for gradient in gradients)  # finite, but their norm may not be
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float32 if narrow else None)
            self.bad.copy_(torch.stack(norms).isfinite().all().logical_not_())
        else:
            self.bad.zero_()
        return self.bad

    @plain
    def read_back(self) -> None:
        """Wait for the device, and note here how many draws it has made and how many steps it has left out."""
        if self.gpu_step is not None:
            self.group["draws"] = self.gpu_step.counters[0].item()
        self.group["skipped"] = self.skipped.item()

    @plain
    def begin_step(self) -> None:
        """Forget the gradients of earlier draws."""
        if self.watches:
            self.sums.zero_()

    @plain
    def unscale_gradients(self, scale: Tensor) -> None:
        """Divide the gradients by a GradScaler's scale."""
        for p in self.parameters:
            if p.grad is not None:
                p.grad.div_(scale.to(p.device))

    @plain
    def set_gradients_aside(self) -> None:
        """Before another of several draws: clear the gradients, and keep them in case that draw has none, or fails."""
        self.aside = [p.grad for p in self.parameters]
        self.hess_aside = self.hess_sum.clone() if self.group["noise_per_rank"] else None  # it grows as they arrive
        for gradient in self.aside:
            if gradient is not None:
                gradient.zero_()

    @plain
    def fold_gradients(self, draws: int) -> None:
        """After one of several draws: add its gradient and curvature up, and show the average gradient so far."""
        for run in self.runs():
            at, ghat = slice(run.lo, run.hi), self._gather(run)
            self.grad_sum[at] += ghat
            if not self.group["noise_per_rank"]:  # whose share was added up when it arrived
                self.hess_sum[at] += self._to_curvature(ghat, at)
        for p, gradient in zip(self.parameters, self.aside):
            if p.grad is None:
                p.grad = gradient
        self._show_average(draws)

    @plain
    def take_gradients_back(self, draws: int) -> None:
        """After a draw that failed: show the average gradient of those before it."""
        for p, gradient in zip(self.parameters, self.aside):
            p.grad = gradient
        if self.hess_aside is not None:
            self.hess_sum.copy_(self.hess_aside)
        self._show_average(draws)

    def _show_average(self, draws: int) -> None:
        self.aside, self.hess_aside = [None] * len(self.parameters), None
        for run in self.runs():
            torch.div(
                self.grad_sum[run.lo : run.hi], draws, out=self.scratch[2, run.lo - run.chunk : run.hi - run.chunk]
            )
            torch._foreach_copy_(self.gradients(run.indices), [self.work_views[2][i] for i in run.indices])

    def _arrives(self, i: int, gradient: Tensor) -> None:
        _check_dense([gradient])
        self.arriving[i] = gradient.detach()

    @plain
    def _has_arrived(self, i: int, p: Tensor) -> None:
        """Add up a micro-batch's own gradient and curvature, now that it is sure to count, where that is asked for.

        A gradient that is only looked at (`torch.autograd.grad`) arrives, but is not accumulated.
        """
        self.group["strayed"] |= self.group["drawn"] > 0 and not self.group["perturbed"]
        gradient, self.arriving[i] = self.arriving[i], None
        folded = self.group["averages"] and self.group["mc_samples"] > 1  # the whole draw's, when its context ends
        if gradient is None or not self.group["perturbed"] or (folded and not self.group["noise_per_rank"]):
            return
        ghat = self.work_views[2][i].copy_(shard_as(gradient, p)).view(-1)
        lo, hi = self.spans[i]
        if not folded:
            self.grad_sum[lo:hi] += ghat
        self.hess_sum[lo:hi] += self._to_curvature(ghat, slice(lo, hi))
        self.group["used"] = True

    @plain
    def reduce(self) -> None:
        """Average over ranks what was added up on each, as their gradients were."""
        count = ranks(self.process_group)[1]
        folded = self.group["averages"] and self.group["mc_samples"] > 1
        if not self.watches or count == 1 or (folded and not self.group["noise_per_rank"]):
            return
        sums = self.hess_sum if folded else self.sums
        dist.all_reduce(sums, group=self.process_group)
        sums /= count
        if self.group["hess_approx"] == "gradsq":  # a rank's gradient is of so much fewer examples
            self.hess_sum /= count

    def release(self) -> None:
        """Let go of the parameters' hooks, and of what is on the device alone."""
        for state in self.states:
            state["step"] = int(state["step"])
        for hook in self.hooks:
            hook.remove()

    def _to_curvature(self, ghat: Tensor, at: slice) -> Tensor:
        """Turn ĝ, in place, into what one draw adds to the curvature estimate, before its factor: ĝε or ĝ²."""
        return ghat.mul_(self.noise_of(self.train_key)[at] if self.group["hess_approx"] == "price" else ghat)

    def _change(self, ghat: Tensor, before: Tensor, run: _Run) -> Tensor:
        """Return, in the place of what a run's gradients were when they arrived, by what they were multiplied since.

        By one number for each parameter of 16 bits: where micro-batches cancel, an entry of their sum is of rounding.
        """
        if self.parameters[0].dtype != self.mean.dtype:
            for i in run.indices:
                lo, hi = (end - run.lo for end in self.spans[i])
                before[lo:hi] = ghat[lo:hi].norm() / before[lo:hi].norm()
        else:
            torch.div(ghat, before, out=before)
        return before.nan_to_num_(nan=1.0, posinf=1.0, neginf=1.0)

    # --- Algorithm 1 ---

    @plain
    def update(self, draws: int) -> None:
        """Move every parameter that has a gradient, and put the mean into all.

        Args:
            draws: by what the summed curvature estimates are to be divided.
        """
        if self.gpu_step is not None:
            shards = self.shards
            self.gpu_step.update(shards, self.group)
            self.looked_at = []
            torch.autograd.graph.increment_version(shards)
            self._written(range(len(shards)))
            return
        moved: set[int] = set()
        if self.cpu_step is None or not self.bad.item():
            for run in self.runs():
                if self.cpu_step is not None:
                    self._update_by_kernel(self.cpu_step, run)
                else:
                    self._update_by_torch(run, draws)
                    self.to_mean(run.indices)
                moved.update(run.indices)
        self.to_mean(set(range(len(self.parameters))) - moved)
        self._count(moved)

    def _count(self, moved: set[int]) -> None:
        """Count the step for each parameter that has made it, or that it was left out."""
        steps = [self.steps] if len(moved) == len(self.steps) else [self.steps[i : i + 1] for i in sorted(moved)]
        if steps:
            torch._foreach_add_(steps, [1 - self.bad] * len(steps))
        self.skipped += self.bad
        numbers: dict[tuple[int, bool], int] = {}
        self.alike = [numbers.setdefault((n, i in moved), len(numbers)) for i, n in enumerate(self.alike)]

    def _settings(self, t: int = 1) -> native.Settings:
        """Return what the kernels need to know, of step t."""
        group = self.group
        beta1, beta2, delta = group["beta1"], group["beta2"], group["weight_decay"]
        bias = 1 - beta1**t if group["debias"] else 1.0
        lr = float(group["lr"]) * self._rescaling
        return native.Settings(
            ess=group["ess"],
            delta=delta,
            beta1_less=1 - beta1,
            beta2_less=1 - beta2,
            half_square=(1 - beta2) ** 2 / 2,
            lr_over_bias=lr / bias,
            clip_times_bias=group["clip_radius"] * bias,
            delta_times_bias=bias * delta,
            batch_size=group["batch_size"] if group["hess_approx"] == "gradsq" else 0,
        )

    @property
    def _rescaling(self) -> float:
        """By what the learning rate is multiplied."""
        return self.group["hess_init"] + self.group["weight_decay"] if self.group["rescale_lr"] else 1.0

    def _update_by_kernel(self, kernels: native.Kernels, run: _Run) -> None:
        shards = self.shards
        targets = [shards[i] for i in run.indices]
        out = targets if self.direct else [self.work_views[0][i] for i in run.indices]
        gradients = self.gradients(run.indices)
        if not all(native.readable(gradient) for gradient in gradients):
            self._gather(run)
            gradients = [self.work_views[2][i] for i in run.indices]
        t = int(self.steps[run.indices[0]]) + 1
        kernels.update(self.train_key, run.indices, gradients, out, self._settings(t))
        if self.direct:
            torch.autograd.graph.increment_version(targets)
        else:
            torch._foreach_copy_(targets, out)
        self._written(run.indices)

    def _update_by_torch(self, run: _Run, draws: int) -> None:
        """Make a step, or where a gradient is not finite one of nothing: with ĝ = ĥ = 0, at rates of 0."""
        group, at = self.group, slice(run.lo, run.hi)
        beta1, beta2, delta = group["beta1"], group["beta2"], group["weight_decay"]
        m, g, h, ghat = self.mean[at], self.momentum[at], self.hess[at], self._gather(run)
        a, b = self.scratch[:2, : len(m)]
        price = group["hess_approx"] == "price"
        bad = self.bad.bool()
        moves = bad.logical_not().to(m.dtype)  # 1 or 0
        ghat.masked_fill_(bad, 0.0)

        # ĥ = ĝ(θ − m)/σ² = ĝε/σ, or B ĝ²
        if not self.watches:
            hhat = torch.mul(ghat, self.noise_of(self.train_key)[at] if price else ghat, out=a)
        else:
            # The gradients of each draw and rank are gone; what clipping or unscaling did to their sum, it did to each.
            change = self._change(ghat, torch.div(self.grad_sum[at], draws, out=b), run)
            hhat = torch.div(self.hess_sum[at], draws, out=a).mul_(change if price else change.square_())
            hhat.masked_fill_(bad, 0.0)
        hhat.mul_(self._precision(run.lo, run.hi, b).sqrt_() if price else group["batch_size"])

        # g ← β₁g + (1 − β₁)ĝ
        g.lerp_(ghat, moves * (1 - beta1))

        # h ← β₂h + (1 − β₂)ĥ + ½(1 − β₂)²(h − ĥ)²/(h + δ)
        correction = torch.sub(h, hhat, out=b).square_().div_(torch.add(h, delta, out=ghat) if delta else h)
        h.lerp_(hhat, moves * (1 - beta2)).add_(correction.mul_(moves), alpha=(1 - beta2) ** 2 / 2)

        # m ← m − α clip((g/(1 − β₁ᵗ) + δm)/(h + δ), ±ξ), with 1 − β₁ᵗ taken out of the bracket
        bias = self._bias(run)
        if delta:
            direction = torch.addcmul(g, m, bias, value=delta, out=a).div_(torch.add(h, delta, out=b))
        else:
            direction = torch.div(g, h, out=a)
        bound, rate = group["clip_radius"] * bias, self._rate() * moves / bias
        m.sub_(direction.clamp_(-bound, bound).mul_(rate))

    def _bias(self, run: _Run) -> Tensor:
        """Return 1 − β₁ᵗ on the device, for the step that a run is about to make; or 1 without debiasing."""
        t = self.steps[run.indices[0], None] + 1
        if not self.group["debias"] or not self.group["beta1"]:
            return torch.ones_like(t, dtype=self.mean.dtype)
        return torch.expm1(t.to(self.mean.dtype) * math.log(self.group["beta1"])).neg_()

    def _rate(self) -> Any:
        """Return the learning rate α: a tensor on the device if it was given as a tensor, else a number."""
        lr = self.group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.to(**self.like, non_blocking=True).view(1)
        return lr * self._rescaling


def _weakly(method: Callable[..., None], i: int) -> Callable[..., None]:
    """Return a hook for parameter `i` that does not keep a bucket alive: Python's collector cannot see into hooks."""
    reference = weakref.WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        found = reference()
        if found is not None:
            found(i, tensor)

    return hook


def _check_dense(gradients: Sequence[Tensor]) -> None:
    sparse = next((gradient.layout for gradient in gradients if gradient.layout != torch.strided), None)
    if sparse is not None:
        raise RuntimeError(
            f"Expected dense gradients, but got one with layout {sparse}: noise is drawn for all entries, so all have "
            "a gradient. Make the module without sparse gradients, e.g. `nn.Embedding(..., sparse=False)`."
        )
