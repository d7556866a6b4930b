"""Fit: train an adapter with a method on `transformers.Trainer`, and conclude its posterior.

`fit` exists once; methods differ in their optimizer, in what they watch after each step, and in what they conclude.
Every field of `TrainingArguments` can be set, so mixed precision, accumulation, logging and checkpoints are the
Trainer's. What is added: the loss over the possible answers, σ in the logs, a step that is not finite left out,
checkpoints without pickles, and a checkpoint on Ctrl-C.
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from varlora.checkpoint import CheckpointTrainer, latest_checkpoint, restore, save_adapter, step_of
from varlora.data import Batch, collate
from varlora.errors import ConfigError, Interrupted, VarloraError, did_you_mean
from varlora.methods import Method
from varlora.model import class_logits
from varlora.params import trainable
from varlora.posterior import Posterior
from varlora.prompt import Encoded

__all__ = ["NotFiniteError", "check_training_arguments", "class_loss", "fit"]

OURS = {
    "output_dir": "run_dir",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "seed": "seed",
    "data_seed": "seed",
    "learning_rate": "method.lr",
    "optim": "method",
    "weight_decay": "method.weight_decay",
    "save_steps": "checkpoint_every",
    "num_train_epochs": "steps",
    "adam_beta1": "method.beta1",
    "adam_beta2": "method.beta2",
    "adam_epsilon": "method.eps",
    "optim_args": "method",
    "resume_from_checkpoint": "resume",
    "label_smoothing_factor": "nothing: the loss is the cross-entropy over the answers",
    "remove_unused_columns": "nothing: the batches need every column",
    "load_best_model_at_end": "nothing: the posterior belongs to the last step",
}
"""Fields of `TrainingArguments` that a setting of ours (or nothing) stands for."""


class NotFiniteError(VarloraError):
    """Training was stopped because loss or gradient stayed infinite or NaN."""


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the batch of the cross-entropy over the possible answers.

    Args:
        logits: (B, C), -inf where a row does not have the answer.
        labels: (B,), index of the right answer.
    """
    return F.cross_entropy(logits, labels, reduction="sum")


def fit(
    model: nn.Module,
    method: Method,
    rows: Sequence[Encoded],
    run_dir: Path,
    *,
    pad_token_id: int,
    steps: int,
    batch_size: int = 4,
    accumulation: int = 1,
    seed: int = 0,
    checkpoint_every: int = 500,
    max_not_finite: int = 25,
    training_arguments: Mapping[str, Any] | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    warn: Callable[[str], None] = print,
) -> Posterior:
    """Train `model` and write `adapter/` (with its posterior), `training.jsonl` and checkpoints to `run_dir`.

    Args:
        model: a `peft` model from `load_model`; afterwards it is at the posterior mean.
        method: how to reach the posterior.
        rows: training rows, all with a label.
        run_dir: the run directory, which exists.
        pad_token_id: token to pad with.
        steps: optimizer steps.
        batch_size: rows a micro-batch.
        accumulation: micro-batches a step.
        seed: seed of the order of rows, of dropout and of the method's own noise.
        checkpoint_every: steps between checkpoints.
        max_not_finite: stop after so many steps in a row whose gradient is not finite.
        training_arguments: any other fields of `TrainingArguments`.
        resume: go on from the newest complete checkpoint, if there is one.
        callbacks: more callbacks for the Trainer.
        warn: told in words what a user should know.

    Returns:
        The posterior.

    Raises:
        Interrupted: stopped by SIGINT or SIGTERM; a checkpoint was written.
        NotFiniteError: stopped after `max_not_finite` bad steps; a checkpoint of the last good state was written.
        ConfigError: `training_arguments` has unknown fields, or fields that a setting of ours stands for.
        VarloraError: there are no rows, or a row has no label.
    """
    rows = list(rows)
    if not rows:
        raise VarloraError("Expected `rows` to hold training rows, but got none. Check the task's files and filters.")
    unlabelled = sum(row.label is None for row in rows)
    if unlabelled:
        raise VarloraError(f"Expected a label in each training row, but {unlabelled} of {len(rows)} have none.")
    if problems := check_training_arguments(training_arguments or {}):
        raise ConfigError(problems)
    draws = getattr(method, "mc_samples", 1)
    if draws > accumulation:
        raise VarloraError(
            f"Expected `accumulation` to be at least `method.mc_samples`, but got {accumulation} for {draws} draws a "
            f"step: each draw takes a micro-batch of its own. Pass `accumulation={draws}`."
        )
    start = latest_checkpoint(run_dir, warn) if resume else None
    if not resume and (old := next(run_dir.glob("checkpoint-[0-9]*"), None)):
        raise VarloraError(f"{old} is of an earlier run. Pass `resume=True` to go on with it, or another `run_dir`.")
    params = trainable(model)
    optimizer = method.optimizer(params, len(rows), batch_size * accumulation, seed)
    watch = _Watch(method, params, max_not_finite)
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "linear",
        "logging_steps": max(1, min(50, steps // 20)),
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": next(iter(params.values())).device.type == "cpu",
    }
    arguments = _arguments(
        output_dir=str(run_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        seed=seed,
        data_seed=seed,
        save_steps=checkpoint_every,
        remove_unused_columns=False,
        **{**defaults, **(training_arguments or {})},
    )
    collator = partial(collate, pad_token_id=pad_token_id)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        optimizers=(optimizer, None),
        callbacks=[watch, *callbacks],
    )
    trainer.varlora_method, trainer.varlora_optimizer = method, optimizer
    trainer.varlora_watch, trainer.varlora_run_dir = watch, run_dir
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    try:
        if start and step_of(start) >= steps:
            restore(model, optimizer, start)  # cut off after the last step; the Trainer would take one more
            step = steps
        else:
            with _stop_on_signals(watch):
                trainer.train(resume_from_checkpoint=str(start) if start else None)
            step = trainer.state.global_step
    finally:
        if hasattr(optimizer, "eval"):
            optimizer.eval()  # the mean, also when a batch failed in the middle of a draw
        model.eval()
    if watch.not_finite_run >= max_not_finite:
        raise NotFiniteError(
            f"Loss or gradient was not finite in {watch.not_finite_run} steps in a row; stopped at step {step}. "
            f"The last good state is in {run_dir}/checkpoint-{step}. "
            "Lower the learning rate or the posterior's scale, or train in float32 or bfloat16."
        )
    if watch.stop and step < steps:
        raise Interrupted(f"Stopped at step {step} of {steps}; {run_dir}/checkpoint-{step} is written.")
    if watch.not_finite:
        warn(f"{watch.not_finite} of {steps} steps were left out because loss or gradient was not finite.")
    loader: Iterable[Batch] = DataLoader(rows, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]
    posterior = method.posterior(model, optimizer, loader)
    save_adapter(model, posterior, run_dir / "adapter")
    return posterior


def check_training_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with fields meant for `TrainingArguments`, one sentence each.

    Example:
        >>> check_training_arguments({"learning_rate": 1e-3, "logging_steps": 5})
        ['`training_arguments.learning_rate` is set by `method.lr`. Set that and leave this out.']
    """
    known = set(TrainingArguments.__dataclass_fields__)
    problems = []
    for name in map(str, arguments):
        if name in OURS:
            problems.append(f"`training_arguments.{name}` is set by `{OURS[name]}`. Set that and leave this out.")
        elif name not in known:
            near = did_you_mean(name, known)
            hint = near if near.startswith("Did") else "See `transformers.TrainingArguments`."
            problems.append(f"Unknown field `training_arguments.{name}`. {hint}")
    return problems


def _arguments(**values: Any) -> TrainingArguments:
    try:
        return TrainingArguments(**values)
    except (ImportError, TypeError, ValueError) as error:  # transformers' message says which field and why
        raise ConfigError([f"`training_arguments` are refused: {error}"]) from error


class _Trainer(CheckpointTrainer):
    """The Trainer with a loss over the possible answers; set `varlora_*` before `train`."""

    varlora_method: Method
    varlora_optimizer: torch.optim.Optimizer
    varlora_watch: _Watch
    varlora_run_dir: Path
    varlora_logged = 0
    # The loss is divided by the rows of all micro-batches of a step, so that accumulation equals the large batch.
    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator)]
        rows = sum(len(batch["labels"]) for batch in batches)
        for group in self.varlora_optimizer.param_groups:
            if group.get("batch_size"):  # IVON's squared gradient scales with it; an epoch's last batch may be smaller
                group["batch_size"] = rows
        return batches, rows

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits = class_logits(model, inputs)  # (B, C)
        loss = class_loss(logits, inputs["labels"]) / (num_items_in_batch or len(logits))
        self.varlora_watch.losses.append(loss.detach())
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs |= self.varlora_method.log(self.varlora_optimizer)
        if self.varlora_watch.not_finite:
            logs["not_finite_steps"] = self.varlora_watch.not_finite
        super().log(logs, start_time)
        # The first time, what a resumed run had logged before its checkpoint is written again, and no more than that.
        with (self.varlora_run_dir / "training.jsonl").open("w" if self.varlora_logged == 0 else "a") as file:
            for entry in self.state.log_history[self.varlora_logged :]:
                file.write(json.dumps(entry) + "\n")
        self.varlora_logged = len(self.state.log_history)


class _Watch(TrainerCallback):
    """Leaves out steps that are not finite, tells the method about each step, and stops when asked to."""

    def __init__(self, method: Method, params: Mapping[str, nn.Parameter], max_not_finite: int) -> None:
        self.method, self.params, self.max_not_finite = method, params, max_not_finite
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.not_finite = 0
        self.not_finite_run = 0
        self.stop = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.not_finite = state.stateful_callbacks.get("varlora", {}).get("not_finite", 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float32)) if gradients else []
        finite = math.isfinite(torch.stack([*norms, *(loss.float() for loss in self.losses)]).sum().item())
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
        self.method.after_step(self.params, state.global_step, state.max_steps)
        if self.stop or self.not_finite_run >= self.max_not_finite:
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def _stop_on_signals(watch: _Watch) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM finish the step and write a checkpoint; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: Any) -> None:
        if watch.stop:
            raise KeyboardInterrupt
        watch.stop = True

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
