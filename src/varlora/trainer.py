"""The Trainer of `fit`: the loss over the possible answers, and what a method is told while training.

A step that is not finite is left out, σ and losses are logged, the mean is compared with draws, and the first Ctrl-C
finishes the step and writes a checkpoint.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

from varlora.checkpoint import CheckpointTrainer
from varlora.data import Batch
from varlora.files import told_if_unwritten, write_text
from varlora.methods import Comparison, Method, Start
from varlora.model import class_logits
from varlora.optim.native import clip
from varlora.optim.shards import ranks

__all__ = [
    "MethodTrainer",
    "Watch",
    "class_loss",
    "left_to_parent",
    "of_first_rank",
    "short_walks",
    "stop_on_signals",
    "wait_for_ranks",
]

T = TypeVar("T")


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the batch of the cross-entropy over the possible answers.

    Args:
        logits: (B, C), -inf where a row does not have the answer.
        labels: (B,), index of the right answer.
    """
    return F.cross_entropy(logits, labels, reduction="sum")


class MethodTrainer(CheckpointTrainer):
    """The Trainer with a loss over the possible answers; set `varlora_*` before `train`."""

    varlora_method: Method
    varlora_optimizer: torch.optim.Optimizer
    varlora_watch: Watch
    varlora_run_dir: Path
    varlora_logged = 0
    varlora_flops_per_token: float | None = None
    # The loss is divided by the rows of all micro-batches of a step, so that accumulation equals the large batch.
    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        """Return the micro-batches of a step, and their rows in the place of their labels."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator)]
        rows = sum(len(batch["labels"]) for batch in batches)
        for group in self.varlora_optimizer.param_groups:
            if group.get("batch_size"):  # IVON's squared gradient scales with it; an epoch's last batch may be smaller
                group["batch_size"] = rows * ranks()[1]
        return batches, rows

    def floating_point_ops(self, inputs: Batch) -> int:
        """Return the operations that a batch takes, in proportion to its tokens."""
        tokens = inputs["input_ids"].numel()
        if self.varlora_flops_per_token is None:  # for which the Trainer would count all parameters at every step
            self.varlora_flops_per_token = super().floating_point_ops(inputs) / tokens
        return int(self.varlora_flops_per_token * tokens)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """In one process, clip without a walk over the base's parameters, and show the watch the norm."""
        if self.accelerator.distributed_type is not DistributedType.NO:  # gradients may be sharded
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        parameters, bound = self.varlora_watch.params.values(), self.args.max_grad_norm
        norm: float | Tensor | None = None
        if self.varlora_watch.on_cpu:
            norm = clip([gradient for p in parameters if (gradient := p.grad) is not None], bound)
        if norm is None:
            norm = nn.utils.clip_grad_norm_(parameters, bound).float()
        self.varlora_watch.norm = norm
        return norm

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss over the possible answers; where it is time, that of the same rows at the mean is noted."""
        watch, compares = self.varlora_watch, False
        if not watch.losses and watch.is_to_compare(self.state.global_step + 1):
            compares, at_mean = True, self._loss_at_mean(model, inputs)
        logits = class_logits(model, inputs)  # (B, C)
        loss = class_loss(logits, inputs["labels"]) / (num_items_in_batch or len(logits))
        watch.losses.append(loss.detach().float())
        if compares:
            under_noise = class_loss(logits.detach(), inputs["labels"]) / len(logits)
            watch.comparison = torch.stack([at_mean, under_noise])
        return (loss, {"logits": logits}) if return_outputs else loss

    def _loss_at_mean(self, model: nn.Module, inputs: Batch) -> Tensor:
        """Return the loss of rows at the mean, with the dropout masks that they get under noise."""
        optimizer: Any = self.varlora_optimizer
        device = inputs["labels"].device
        optimizer.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                return class_loss(class_logits(model, inputs), inputs["labels"]) / len(inputs["labels"])
        finally:
            optimizer.train()  # the draw of this step again

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the method logs, and write the new lines to `training.jsonl`."""
        logs |= self.varlora_method.log(self.varlora_optimizer, self.varlora_watch.state)
        if self.varlora_watch.not_finite:
            logs["not_finite_steps"] = self.varlora_watch.not_finite
        super().log(logs, start_time)
        if not self.is_world_process_zero():
            return
        path = self.varlora_run_dir / "training.jsonl"
        lines = "".join(json.dumps(entry) + "\n" for entry in self.state.log_history[self.varlora_logged :])
        with told_if_unwritten(path):
            if self.varlora_logged:
                with path.open("a") as file:
                    file.write(lines)
            else:  # what a resumed run had logged before its checkpoint is written again, and no more than that
                write_text(path, lines)
        self.varlora_logged = len(self.state.log_history)


class Watch(TrainerCallback):
    """Leaves out steps that are not finite, tells the method about each step, and stops when asked to."""

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        params: Mapping[str, nn.Parameter],
        state: dict[str, Any],
        max_not_finite: int,
        chance: float,
        start: Start,
    ) -> None:
        self.method, self.optimizer, self.params, self.state = method, optimizer, params, state
        self.on_cpu = False
        self.max_not_finite, self.chance, self.start = max_not_finite, chance, start
        self.every = 0
        """Steps between comparisons of the mean with a draw."""
        self.comparison: Tensor | None = None
        """Loss at the mean and under noise of rows of this step, (2,), where they were compared."""
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.norm: float | Tensor | None = None  # of this step's gradients, where it is known
        self.not_finite = 0
        self.not_finite_run = 0
        self.asked = False
        """Whether this process was asked to stop."""
        self.stop = False
        """Whether all ranks know it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on counting, in a resumed run; the parameters are where they stay by now."""
        self.on_cpu = all(p.device.type == "cpu" for p in self.params.values())
        self.not_finite = state.stateful_callbacks.get("varlora", {}).get("not_finite", 0)
        self.every = self.method.compare_every(state.max_steps)

    def is_to_compare(self, step: int) -> bool:
        """Whether the mean is to be compared with a draw at this step."""
        return bool(self.every) and step % self.every == 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the method look once more, where it is time, and change what it will."""
        step = state.global_step + 1
        if step == self.method.look_again_at(state.max_steps):
            self.start.model.eval()  # until the Trainer begins the step
            self.state |= of_first_rank(lambda: self.method.look_again(self.start, self.optimizer, self.state))
        self.method.before_step(self.optimizer, step, state.max_steps, self.state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a step out whose losses or gradients are not finite."""
        norm, self.norm = self.norm, None
        if norm is None:
            gradients = [p.grad for p in self.params.values() if p.grad is not None]
            norms = torch._foreach_norm(gradients, 2, dtype=torch.float32) if gradients else ()
            norm = sum(one.to(norms[0].device) for one in norms)
        where = getattr(norm, "device", None)  # the loss may be on another
        # NaN for a norm that is not finite; one beyond float32 is, if clipped
        total: Any = sum((loss.to(device=where) for loss in self.losses), 0 * norm)
        if ranks()[1] > 1:  # which have losses and signals of their own, and act together
            told = torch.stack([total, torch.full_like(total, self.asked)])
            dist.all_reduce(told)
            total, self.stop = told[0], bool(told[1])
        finite = math.isfinite(total.item())
        self.losses.clear()
        if not finite:
            if not args.fp16:  # with loss scaling, the scaler has to see the overflow; it leaves the step out itself
                for p in self.params.values():
                    p.grad = None
            self.not_finite += 1
            self.not_finite_run += 1
            state.stateful_callbacks["varlora"] = {"not_finite": self.not_finite}  # for a resumed run
        else:
            self.not_finite_run = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the method, and stop where that was asked for, or too many steps were left out."""
        self._compare(state.global_step, state.max_steps)
        self.method.after_step(self.params, state.global_step, state.max_steps, self.state)
        if ranks()[1] == 1:
            self.stop = self.asked
        if self.stop or self.not_finite_run >= self.max_not_finite:
            control.should_save = True
            control.should_training_stop = True

    def _compare(self, step: int, total_steps: int) -> None:
        """Tell the method of a comparison, all ranks of their average."""
        losses, self.comparison = self.comparison, None
        if losses is None:
            return
        if ranks()[1] > 1:
            dist.all_reduce(losses)
            losses /= ranks()[1]
        at_mean, under_noise = losses.tolist()
        if math.isfinite(at_mean) and math.isfinite(under_noise):
            words = self.method.compared(Comparison(step, total_steps, at_mean, under_noise, self.chance), self.state)
            if words and ranks()[0] == 0:
                self.start.say(words)


MODELESS = {nn.Embedding, nn.Identity, nn.Linear, nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.Sequential}
"""Types of modules, most of a model's, that do the same in training mode and in evaluation mode."""


class _Walks:
    """`train` and `zero_grad` of a model, over its modules and the parameters that train, looked up once.

    At the first call, as until then the Trainer may put others in their places (FSDP2 does). An object, and not two
    functions, so that a deep copy of the model has one of its own.

    Args:
        model: the model.
        trained: what the optimizer has; a callback may have frozen some of it for a while.
    """

    def __init__(self, model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        self.model, self.trained = model, trained
        self.modules: list[dict[str, Any]] = []
        """Their attributes, in which it takes half as long to look."""
        self.parameters: list[nn.Parameter] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> _Walks:
        return _Walks(copy.deepcopy(self.model, memo), copy.deepcopy(self.trained, memo))

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, where a module to which it matters is in the other one."""
        if not self.modules:
            having_modes = (module for module in self.model.modules() if type(module) not in MODELESS)
            found = [vars(module) for module in (self.model, *having_modes)]
            self.modules = [attributes for attributes in found if "training" in attributes]  # a compiled one's is below
        if (not mode) in map(itemgetter("training"), self.modules):
            type(self.model).train(self.model, mode)
        return self.model

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, of all parameters at the first call."""
        if not (set_to_none and self.parameters):
            found = [*self.trained, *(p for p in self.model.parameters() if p.requires_grad)]
            self.parameters = list({id(p): p for p in found}.values())
            return type(self.model).zero_grad(self.model, set_to_none)
        for p in self.parameters:
            p.grad = None


@contextmanager
def short_walks(model: nn.Module, trained: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Within the context, what the Trainer walks at each step costs little: the model's modules, and the import path.

    It calls the model's `train` and `zero_grad`, and accelerate looks twice for `lomo_optim`, an optimizer's package;
    where that is not installed, Python is told not to search for it again.
    """
    short: Any = model
    modules: dict[str, Any] = sys.modules
    if find_spec("lomo_optim") is None:
        modules["lomo_optim"] = None
    walks = _Walks(model, trained)
    short.train, short.zero_grad = walks.train, walks.zero_grad
    try:
        yield
    finally:
        del short.train, short.zero_grad
        if modules.get("lomo_optim") is None:
            modules.pop("lomo_optim", None)


def of_first_rank(find: Callable[[], T]) -> T:
    """Return on all ranks what the first one finds."""
    told: list[Any] = [find() if ranks()[0] == 0 else None]
    if ranks()[1] > 1:
        dist.broadcast_object_list(told)
    return cast(T, told[0])


def wait_for_ranks() -> None:
    """Go on where all ranks have come to here."""
    if ranks()[1] > 1:
        dist.barrier()


def left_to_parent(number: int, frame: Any) -> None:
    """Handle a signal by nothing: of a process whose parent gets it too, and says what to do; `fit` leaves it so."""


@contextmanager
def stop_on_signals(watch: Watch) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM finish the step and write a checkpoint; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        if watch.asked:
            raise KeyboardInterrupt
        watch.asked = True

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not left_to_parent]
    old = {number: signal.signal(number, on_signal) for number in heard}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
