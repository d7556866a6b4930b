"""Fit: train an adapter with a method on `transformers.Trainer`, and conclude its posterior.

`fit` exists once; methods differ in their optimizer, in what they watch after each step, and in what they conclude.
Every field of `TrainingArguments` can be set, so mixed precision, accumulation, logging and checkpoints are the
Trainer's. What is added to it is in `varlora.trainer`.
"""

from __future__ import annotations

import math
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from varlora.adapter import dropout_rates, reset_adapter
from varlora.checkpoint import (
    latest_checkpoint,
    load_adapter,
    load_posterior,
    restore,
    step_of,
    write_adapter,
)
from varlora.data import collate
from varlora.errors import ConfigError, DamagedFileError, Interrupted, VarloraError, did_you_mean
from varlora.files import read_json, write_json
from varlora.methods import Method, Plan, Start, Trained
from varlora.methods.ensemble import APART
from varlora.model import class_logits
from varlora.optim.shards import ranks
from varlora.params import not_finite, trainable
from varlora.posterior import Posterior
from varlora.predict import Predictor
from varlora.prompt import Encoded
from varlora.trainer import MethodTrainer, Watch, of_first_rank, short_walks, stop_on_signals, wait_for_ranks

__all__ = [
    "NotFiniteError",
    "check_method",
    "check_start",
    "check_training_arguments",
    "conclude",
    "fit",
    "meet",
    "start_of",
]

OURS = {
    "output_dir": "run_dir",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "auto_find_batch_size": "batch_size",
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
EVALUATES = {"eval_on_start": ("True", "1"), "eval_strategy": ("steps", "epoch"), "save_strategy": ("best",)}
"""Values of fields with which the Trainer would evaluate, and has nothing to evaluate on."""
BY_LENGTH = ("group_by_length", "batch_rebalance")
"""Values of `train_sampling_strategy` that need rows which are mappings, as ours are not."""


TUNED = "tuned.json"
"""File of a run directory: the settings that were left to the method, and what it saw when it looked for them."""
SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")
"""Fields of `TrainingArguments` that a method with a schedule of its own leaves no room for."""


class NotFiniteError(VarloraError):
    """Training was stopped because loss or gradient stayed infinite or NaN, or ended with weights that are."""


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
        NotFiniteError: stopped after `max_not_finite` bad steps, and a checkpoint of the last good state was written;
            or the posterior is not finite.
        ConfigError: `training_arguments` has unknown fields, or fields that a setting of ours stands for; or the
            method cannot work in such a run.
        VarloraError: there are no rows, or a row has no label.
    """
    rows = list(rows)
    _check_adapter(model)
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
            _fit_member(
                model, member, rows, run_dir / f"member-{number}", seed + APART * number, resume, **settings, **every
            )
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
    arguments._n_gpu = min(1, arguments.n_gpu)  # of several it would make DataParallel's, and as many times the batch
    check_start(model, method, rows, batch_size, training_arguments or {})
    begin = start_of(model, rows, steps=steps, accumulation=accumulation, seed=seed, **every)
    method = _prepared(method, begin, run_dir, resume)
    optimizer = method.optimizer(params, len(rows), batch_size * accumulation, seed)
    state: dict[str, Any] = {}
    chance = _chance(rows)
    if len(rows) > 1 and not chance:
        warn(
            f"All {len(rows)} training rows have the same answer, number {rows[0].label}: to give it always is all "
            "that can be learned. Check the labels; where each row lists its right answer first, shuffle the answers."
        )
    watch = Watch(method, optimizer, params, state, max_not_finite, chance, begin)
    collator = partial(collate, pad_token_id=pad_token_id)
    trainer = MethodTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        optimizers=(optimizer, method.schedule(optimizer, steps)),
        callbacks=[watch, *callbacks],
        method_state=state,
        warn=warn,
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
            walks = short_walks(model, list(params.values()))
            with stop_on_signals(watch), method.training(model, optimizer), walks:
                trainer.train(resume_from_checkpoint=str(start) if start else None)
            step = trainer.state.global_step
    finally:
        if hasattr(optimizer, "eval"):
            optimizer.eval()  # the mean, also when a batch failed in the middle of a draw
        model.eval()
    if watch.not_finite_run >= min(max_not_finite, steps):
        good = f"The last good state is in {run_dir}/checkpoint-{step}. " if not not_finite(params) else ""
        raise NotFiniteError(
            f"Loss or gradient was not finite in {watch.not_finite_run} steps in a row; stopped at step {step}. {good}"
            "Lower the learning rate or the posterior's scale, or train in float32 or bfloat16."
        )
    if watch.stop and step < steps:
        raise Interrupted(f"Stopped at step {step} of {steps}; {run_dir}/checkpoint-{step} is written.")
    if step < steps:
        warn(f"A callback ended training after step {step} of {steps}; the posterior is that of this step.")
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
    return Start(**given, steps=steps, accumulation=accumulation, ranks=ranks()[1])


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

    def settings() -> dict[str, Any]:
        if resume and path.is_file():
            return _stored_settings(path)
        if (found := method.prepare(start)) is None:
            return {}
        write_json(path, {"settings": dict(found.settings), "found": found.found, "steps": found.steps})
        return dict(found.settings)

    told = of_first_rank(settings)
    if not told:
        return method
    try:
        return cast(Method, replace(cast(Any, method), **told))
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
    logits = Predictor(model, posterior, n, seed=seed).logits_of(rows, pad_token_id=pad_token_id)
    return logits, torch.tensor([row.label for row in rows])


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
    if lost := not_finite(posterior.tensors()):
        raise NotFiniteError(
            f"The posterior that was concluded in {run_dir} is not finite, so nothing is written: with `{lost}` all "
            "answers would be NaN. Lower the learning rate or the posterior's scale, or train in float32 or bfloat16."
        )
    if ranks()[0] == 0:
        write_adapter(model, posterior, run_dir / "adapter")
    wait_for_ranks()
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
        f"`training_arguments.{name}` is set by the method {method.name}, which has its own schedule. "
        f"{method.schedule_remedy()}"
        for name in SCHEDULE
        if name in training_arguments
    ]


def check_start(
    model: nn.Module,
    method: Method,
    rows: Sequence[Encoded],
    batch_size: int,
    training_arguments: Mapping[str, Any],
) -> None:
    """Refuse a model or rows that a posterior could not be made of; to be asked before an older run is replaced.

    Raises:
        VarloraError: the method could not conclude from the model's adapter; see `Method.check_model`.
        ConfigError: no batch would be left.
    """
    method.check_model(model)
    whole = batch_size * ranks()[1]
    if training_arguments.get("dataloader_drop_last") and len(rows) < whole:
        raise ConfigError(
            [
                f"`training_arguments.dataloader_drop_last` drops all of {len(rows)} rows, as a batch has {whole}. "
                "Leave it out, or lower `batch_size`."
            ]
        )


def meet(training_arguments: Mapping[str, Any]) -> None:
    """Set up the process group of a run, where several processes were started for it, and wait for all of them.

    From then on each has a GPU of its own. Without this it is set up when training starts.

    Args:
        training_arguments: fields meant for `TrainingArguments`, which may name the group's backend.

    Raises:
        ConfigError: the fields are refused.
    """
    _arguments(output_dir="unused", **{"use_cpu": not torch.cuda.is_available(), **training_arguments})
    wait_for_ranks()


def _check_adapter(model: Any) -> None:
    """Refuse, before the hours of training, what could not be written down after them."""
    adapters = list(getattr(model, "peft_config", {"default": None}))
    if adapters != ["default"]:
        raise VarloraError(
            "Expected a peft model with one adapter, named `default`, as `load_model` makes it, but got "
            f"{', '.join(map(repr, adapters))}. Leave `adapter_name` out."
        )


def _check_rows(rows: Sequence[Encoded], calibration: Sequence[Encoded]) -> None:
    if not rows:
        raise VarloraError("Expected `rows` to hold training rows, but got none. Check the task's files and filters.")
    for what, of in (("training", rows), ("held-out", calibration)):
        if few := sum(len(row.label_tokens) < 2 for row in of):
            raise VarloraError(f"Expected two answers or more in each {what} row, but {few} of {len(of)} have less.")
        if unlabelled := sum(row.label is None for row in of):
            raise VarloraError(f"Expected a label in each {what} row, but {unlabelled} of {len(of)} have none.")
        if (wrong := next((r for r in of if not 0 <= (r.label or 0) < len(r.label_tokens)), None)) is not None:
            raise VarloraError(
                f"Expected `label` of each {what} row to be the number of one of its answers, from 0 to "
                f"{len(wrong.label_tokens) - 1} in row {wrong.id!r}, but got {wrong.label}."
            )


def check_training_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with fields meant for `TrainingArguments`, one sentence each.

    Example:
        >>> check_training_arguments({"learning_rate": 1e-3, "logging_steps": 5})
        ['`training_arguments.learning_rate` is set by `method.lr`. Set that and leave this out.']
    """
    known = typing.get_type_hints(TrainingArguments)
    problems = []
    for name, value in ((str(name), value) for name, value in arguments.items()):
        if name in ("deepspeed", "fsdp") and value:
            problems.append(_spreads(f"`training_arguments.{name}`", "Leave it out"))
        elif name in OURS:
            problems.append(f"`training_arguments.{name}` is set by `{OURS[name]}`. Set that and leave this out.")
        elif name not in known:
            near = did_you_mean(name, known)
            hint = near if near.startswith("Did") else "See `transformers.TrainingArguments`."
            problems.append(f"Unknown field `training_arguments.{name}`. {hint}")
        elif isinstance(value, str) and set(typing.get_args(known[name]) or (known[name],)) <= {bool, type(None)}:
            expected = f"Expected `training_arguments.{name}` to be true or false"  # any text would be true
            problems.append(f"{expected}, but got the text {value!r}. Leave its quotes out.")
        elif (word := str(getattr(value, "value", value))) in EVALUATES.get(name, ()):
            problems.append(
                f"`training_arguments.{name}` cannot be {word}: nothing is evaluated while training. Leave it out, and "
                "use `varlora evaluate`."
            )
        elif name == "train_sampling_strategy" and word in BY_LENGTH:
            expected = f"Expected `training_arguments.{name}` to be random or sequential"
            problems.append(f"{expected}, but got {word}. Leave it out.")
    return problems


def _spreads(what: str, remedy: str) -> str:
    return (
        f"{what} would spread the adapter over processes, and a run keeps it whole. {remedy}, or use `varlora.IVON` in "
        "a script of your own, as docs/distributed.md shows."
    )


def _arguments(**values: Any) -> TrainingArguments:
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):  # of `accelerate launch`
        if parse_flag_from_env(name):
            raise ConfigError([_spreads(f"`{name}` in the environment", "Start with `torchrun`")])
    try:
        return TrainingArguments(**values)
    except (ImportError, TypeError, ValueError) as error:  # transformers' message says which field and why
        raise ConfigError([f"`training_arguments` are refused: {error}"]) from error
