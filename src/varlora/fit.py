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
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from varlora.adapter import dropout_rates, reset_adapter
from varlora.checkpoint import (
    CheckpointTrainer,
    latest_checkpoint,
    load_adapter,
    load_posterior,
    restore,
    save_adapter,
    step_of,
)
from varlora.data import Batch, collate
from varlora.errors import ConfigError, DamagedFileError, Interrupted, VarloraError, did_you_mean
from varlora.methods import Comparison, Method, Plan, Start, Trained
from varlora.model import class_logits
from varlora.optim.shards import ranks
from varlora.params import trainable
from varlora.posterior import Posterior
from varlora.predict import predict
from varlora.prompt import Encoded
from varlora.run import read_json, write_json, write_text

__all__ = [
    "NotFiniteError",
    "check_method",
    "check_training_arguments",
    "class_loss",
    "conclude",
    "fit",
    "left_to_parent",
    "start_of",
]

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


TUNED = "tuned.json"
"""File of a run directory: the settings that were left to the method, and what it saw when it looked for them."""
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
"""Fields of `TrainingArguments` that a method with a schedule of its own leaves no room for."""


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
    calibration: Sequence[Encoded] = (),
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
        calibration: rows with labels that are held out, for methods that choose something on them.
        resume: go on from the newest complete checkpoint, if there is one.
        callbacks: more callbacks for the Trainer.
        warn: told in words what a user should know.

    Returns:
        The posterior.

    Raises:
        Interrupted: stopped by SIGINT or SIGTERM; a checkpoint was written.
        NotFiniteError: stopped after `max_not_finite` bad steps; a checkpoint of the last good state was written.
        ConfigError: `training_arguments` has unknown fields, or fields that a setting of ours stands for; or the
            method cannot work in such a run.
        VarloraError: there are no rows, or a row has no label.
    """
    rows = list(rows)
    _check_rows(rows, calibration)
    plan = Plan(steps, accumulation, max(dropout_rates(model).values(), default=0.0), bool(calibration))
    arguments_problems = check_training_arguments(training_arguments or {})
    if problems := arguments_problems + check_method(method, plan, training_arguments or {}):
        raise ConfigError(problems)
    every: dict[str, Any] = {
        "pad_token_id": pad_token_id,
        "batch_size": batch_size,
        "calibration": calibration,
        "warn": warn,
    }
    if members := method.members():
        settings: dict[str, Any] = {
            "steps": steps,
            "accumulation": accumulation,
            "checkpoint_every": checkpoint_every,
            "max_not_finite": max_not_finite,
            "training_arguments": training_arguments,
            "callbacks": callbacks,
        }
        sources = [
            _fit_member(model, member, rows, run_dir / f"member-{number}", seed + number, resume, **settings, **every)
            for number, member in enumerate(members)
        ]
        return conclude(model, method, rows, run_dir, sources=sources, seed=seed, **every)
    start = latest_checkpoint(run_dir, warn) if resume else None
    if not resume and (old := next(run_dir.glob("checkpoint-[0-9]*"), None)):
        raise VarloraError(f"{old} is of an earlier run. Pass `resume=True` to go on with it, or another `run_dir`.")
    params = trainable(model)
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
    _ = arguments.device  # which sets up the process group, where there is one
    begin = start_of(model, rows, steps=steps, accumulation=accumulation, seed=seed, **every)
    method = _prepared(method, begin, run_dir, resume)
    optimizer = method.optimizer(params, len(rows), batch_size * accumulation, seed)
    state: dict[str, Any] = {}
    watch = _Watch(method, optimizer, params, state, max_not_finite, _chance(rows), warn)
    collator = partial(collate, pad_token_id=pad_token_id)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        optimizers=(optimizer, method.schedule(optimizer, steps)),
        callbacks=[watch, *callbacks],
        method_state=state,
    )
    trainer.varlora_method, trainer.varlora_optimizer = method, optimizer
    trainer.varlora_watch, trainer.varlora_run_dir = watch, run_dir
    for unwanted in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(unwanted)
    try:
        if start and step_of(start) >= steps:
            restore(model, optimizer, state, start)  # cut off after the last step; the Trainer would take one more
            step = steps
        else:
            with _stop_on_signals(watch), method.training(model, optimizer):
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
    return conclude(model, method, rows, run_dir, optimizer=optimizer, state=state, seed=seed, **every)


def start_of(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    pad_token_id: int,
    steps: int,
    batch_size: int = 4,
    accumulation: int = 1,
    calibration: Sequence[Encoded] = (),
    seed: int = 0,
    warn: Callable[[str], None] = print,
) -> Start:
    """Return what a method looks at before training; the arguments are those of `fit`. The model is in `eval` then."""
    model.eval()
    given = _given(model, rows, pad_token_id, batch_size, calibration, seed, warn)
    return Start(**given, steps=steps, accumulation=accumulation)


def _given(
    model: nn.Module,
    rows: Sequence[Encoded],
    pad_token_id: int,
    batch_size: int,
    calibration: Sequence[Encoded],
    seed: int,
    warn: Callable[[str], None],
) -> dict[str, Any]:
    """Return what a method is given to look at a model with, before training and after it."""
    return {
        "model": model,
        "rows": rows,
        "draw": partial(_draw, model, pad_token_id, seed),
        "forward": class_logits,
        "calibration": calibration,
        "pad_token_id": pad_token_id,
        "batch_size": batch_size,
        "seed": seed,
        "say": warn,
    }


def _prepared(method: Method, start: Start, run_dir: Path, resume: bool) -> Method:
    """Return the method with the settings that are left to it, as it finds them now or found them before a stop.

    They are written to `tuned.json`; ranks take the first one's.
    """
    path = run_dir / TUNED
    told: list[Any] = [None]
    if ranks()[0] == 0:
        if resume and path.is_file():
            told = [_stored_settings(path)]
        elif (found := method.prepare(start)) is not None:
            told = [dict(found.settings)]
            write_json(path, {"settings": told[0], "found": found.found, "steps": found.steps})
    if ranks()[1] > 1:
        dist.broadcast_object_list(told)
    if told[0] is None:
        return method
    try:
        return cast(Method, replace(cast(Any, method), **told[0]))
    except TypeError as error:
        raise DamagedFileError(f"{path} does not hold settings of {method.name}: {error}. Train a new run.") from error


def _stored_settings(path: Path) -> dict[str, Any]:
    stored = read_json(path)
    settings = stored.get("settings") if isinstance(stored, Mapping) else None
    if not isinstance(settings, Mapping):
        raise DamagedFileError(f"Expected settings in {path}, but there are none. Train a new run.")
    return dict(settings)


def _chance(rows: Sequence[Encoded]) -> float:
    """Return the loss of who knows how often each answer is right, and no more: the entropy of the labels, in nats."""
    shares = [count / len(rows) for count in Counter(row.label for row in rows).values()]
    return -sum(share * math.log(share) for share in shares)


def _draw(
    model: nn.Module, pad_token_id: int, seed: int, posterior: Posterior, rows: Sequence[Encoded], n: int
) -> tuple[Tensor, Tensor]:
    found = predict(model, posterior, rows, pad_token_id=pad_token_id, samples=n, seed=seed)
    return found.logits, found.labels


def _fit_member(
    model: nn.Module,
    method: Method,
    rows: Sequence[Encoded],
    folder: Path,
    seed: int,
    resume: bool,
    **settings: Any,
) -> Posterior:
    """Train a member of an ensemble on a fresh adapter, or load it if an interrupted run has finished it already."""
    folder.mkdir(exist_ok=True)
    if resume and (folder / "adapter").is_dir():
        return load_posterior(model, folder / "adapter")
    seed %= 2**32
    reset_adapter(model, seed)
    return fit(model, method, rows, folder, seed=seed, resume=resume, **settings)


def conclude(
    model: nn.Module,
    method: Method,
    rows: Sequence[Encoded],
    run_dir: Path,
    *,
    pad_token_id: int,
    batch_size: int = 4,
    calibration: Sequence[Encoded] = (),
    optimizer: torch.optim.Optimizer | None = None,
    state: Mapping[str, Any] | None = None,
    sources: Sequence[Posterior] = (),
    seed: int = 0,
    warn: Callable[[str], None] = print,
) -> Posterior:
    """Conclude the posterior from what was trained, now or before, and write `adapter/` to `run_dir`.

    Args:
        model: the trained model; afterwards it is at the posterior mean.
        method: how to reach the posterior.
        rows: the training rows.
        run_dir: the run directory, which exists.
        pad_token_id: token to pad with.
        batch_size: rows a batch of passes over the data.
        calibration: rows that were held out.
        optimizer: the optimizer that trained, if it did now.
        state: what the method collected while training.
        sources: posteriors of finished runs, or of members, to conclude from.
        seed: seed of whatever the conclusion draws.
        warn: told in words what a user should know.

    Returns:
        The posterior.
    """
    model.eval()
    given = _given(model, rows, pad_token_id, batch_size, calibration, seed, warn)
    posterior = method.posterior(Trained(**given, optimizer=optimizer, state=state or {}, sources=sources))
    if ranks()[0] == 0:
        save_adapter(model, posterior, run_dir / "adapter")
    if ranks()[1] > 1:
        dist.barrier()
    load_adapter(model, run_dir / "adapter")
    return posterior


def check_method(method: Method, plan: Plan, training_arguments: Mapping[str, Any]) -> list[str]:
    """Return why a method cannot work in such a run, one sentence each.

    Args:
        method: the method.
        plan: what the run is going to do.
        training_arguments: fields meant for `TrainingArguments`.

    Raises:
        ValueError: a setting of the method's optimizer is impossible; also `TypeError` or `RuntimeError`, as torch and
            the optimizers raise them.
    """
    if plan.finished and not method.concludes_from:
        return [f"`{method.name}` trains by itself and does not build on finished runs. Leave `--from` out."]
    hints = typing.get_type_hints(type(method))
    choices = {name: typing.get_args(hint) for name, hint in hints.items() if typing.get_origin(hint) is typing.Literal}
    if problems := [
        f"Expected `{name}` to be one of {', '.join(known)}, but got {getattr(method, name)!r}."
        for name, known in choices.items()
        if getattr(method, name) not in known
    ]:
        return problems
    if problems := method.problems(plan):
        return problems
    optimizer = method.optimizer({"weight": nn.Parameter(torch.zeros(1))}, 1, 1, 0)
    if plan.finished or method.schedule(optimizer, plan.steps) is None:
        return []
    return [
        f"`training_arguments.{name}` is set by the method {method.name}, which has its own schedule. Leave it out."
        for name in SCHEDULE
        if name in training_arguments
    ]


def _check_rows(rows: Sequence[Encoded], calibration: Sequence[Encoded]) -> None:
    if not rows:
        raise VarloraError("Expected `rows` to hold training rows, but got none. Check the task's files and filters.")
    for what, of in (("training", rows), ("held-out", calibration)):
        if unlabelled := sum(row.label is None for row in of):
            raise VarloraError(f"Expected a label in each {what} row, but {unlabelled} of {len(of)} have none.")


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
    varlora_flops_per_token: float | None = None
    # The loss is divided by the rows of all micro-batches of a step, so that accumulation equals the large batch.
    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Any:
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator)]
        rows = sum(len(batch["labels"]) for batch in batches)
        for group in self.varlora_optimizer.param_groups:
            if group.get("batch_size"):  # IVON's squared gradient scales with it; an epoch's last batch may be smaller
                group["batch_size"] = rows * ranks()[1]
        return batches, rows

    def floating_point_ops(self, inputs: Batch) -> int:
        tokens = inputs["input_ids"].numel()
        if self.varlora_flops_per_token is None:  # for which the Trainer would count all parameters at every step
            self.varlora_flops_per_token = super().floating_point_ops(inputs) / tokens
        return int(self.varlora_flops_per_token * tokens)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        watch, compares = self.varlora_watch, False
        if not watch.losses and watch.is_to_compare(self.state.global_step + 1):
            compares, at_mean = True, self._loss_at_mean(model, inputs)
        logits = class_logits(model, inputs)  # (B, C)
        loss = class_loss(logits, inputs["labels"]) / (num_items_in_batch or len(logits))
        watch.losses.append(loss.detach())
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
        logs |= self.varlora_method.log(self.varlora_optimizer, self.varlora_watch.state)
        if self.varlora_watch.not_finite:
            logs["not_finite_steps"] = self.varlora_watch.not_finite
        super().log(logs, start_time)
        if not self.is_world_process_zero():
            return
        path = self.varlora_run_dir / "training.jsonl"
        lines = "".join(json.dumps(entry) + "\n" for entry in self.state.log_history[self.varlora_logged :])
        if self.varlora_logged:
            with path.open("a") as file:
                file.write(lines)
        else:  # what a resumed run had logged before its checkpoint is written again, and no more than that
            write_text(path, lines)
        self.varlora_logged = len(self.state.log_history)


class _Watch(TrainerCallback):
    """Leaves out steps that are not finite, tells the method about each step, and stops when asked to."""

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        params: Mapping[str, nn.Parameter],
        state: dict[str, Any],
        max_not_finite: int,
        chance: float,
        say: Callable[[str], None],
    ) -> None:
        self.method, self.optimizer, self.params, self.state = method, optimizer, params, state
        self.max_not_finite, self.chance, self.say = max_not_finite, chance, say
        self.every = 0
        """Steps between comparisons of the mean with a draw."""
        self.comparison: Tensor | None = None
        """Loss at the mean and under noise of rows of this step, (2,), where they were compared."""
        self.losses: list[Tensor] = []  # of the micro-batches of this step
        self.not_finite = 0
        self.not_finite_run = 0
        self.asked = False
        """Whether this process was asked to stop."""
        self.stop = False
        """Whether all ranks know it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.not_finite = state.stateful_callbacks.get("varlora", {}).get("not_finite", 0)
        self.every = self.method.compare_every(state.max_steps)

    def is_to_compare(self, step: int) -> bool:
        """Whether the mean is to be compared with a draw at this step."""
        return bool(self.every) and step % self.every == 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.method.before_step(self.optimizer, state.global_step + 1, state.max_steps, self.state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.params.values() if p.grad is not None]
        norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float32)) if gradients else []
        total = torch.stack([*norms, *(loss.float() for loss in self.losses)]).sum()
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
                self.say(words)


def left_to_parent(number: int, frame: Any) -> None:
    """Handle a signal by nothing: of a process whose parent gets it too, and says what to do; `fit` leaves it so."""


@contextmanager
def _stop_on_signals(watch: _Watch) -> Iterator[None]:
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
