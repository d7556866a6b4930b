"""From settings to a run directory: train, and what is checked, found or timed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from varlora import curves
from varlora.config import TASK_FILE, Settings, settings_from, settings_of
from varlora.diagnosis import signs
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import read_json, verify_manifest, write_bytes, write_json
from varlora.fit import check_start, conclude, fit, meet, start_of
from varlora.loading import (
    Progress,
    Say,
    check_same,
    checksum_of,
    digest_of,
    encode_rows,
    load_base,
    no_progress,
    pad_of,
    rows_of_split,
    say_unsliced,
    training_rows,
)
from varlora.methods import Prepared
from varlora.model import base_fingerprint
from varlora.optim.shards import ranks
from varlora.overhead import Overhead, measure_overhead
from varlora.params import trainable
from varlora.prompt import PROMPT_VERSION
from varlora.run import alone, check_place, is_first, origin, prepare_run_dir
from varlora.sources import check_sources, identities, load_sources, trains_on
from varlora.tasks import get_task, is_task_file
from varlora.trainer import wait_for_ranks

__all__ = [
    "check_run_dir",
    "check_unchanged",
    "train",
    "training_costs",
    "tune",
    "validate",
]

MOVABLE = ("run_dir", "data_dir", "model", "sources")
"""Settings that a resumed run may change: where things lie."""


def train(
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train as `settings` say and write the run directory; of several ranks the first one writes, and speaks.

    Args:
        settings: what to do; all of it is checked before the run directory is touched.
        resume: go on where an interrupted run stopped.
        overwrite: replace an existing run.
        say: told in words what a user should know.
        callbacks: more callbacks for the Trainer (a progress bar).

    Returns:
        The run directory.

    Raises:
        VarloraError: a problem with settings, data, model or run directory; see `fit` for those of training itself.

    Example:
        >>> import tempfile
        >>> from varlora.demo.base import BUNDLED
        >>> scratch = tempfile.TemporaryDirectory()
        >>> task, base = str(BUNDLED / "tasks" / "two_choices.yaml"), str(BUNDLED / "base")
        >>> settings = Settings(task, base, "adamw", steps=1, run_dir=f"{scratch.name}/run")
        >>> run_dir = train(settings, say=lambda words: None)
        >>> (run_dir / "adapter" / "posterior.safetensors").is_file()
        True
    """
    settings = settings_from(dataclasses.asdict(settings))  # checked, also when made in Python
    run_dir = settings.folder
    say = say if is_first() else _silent
    check_run_dir(settings, resume=resume, overwrite=overwrite)
    meet(settings.training_arguments)  # before the first rank changes what the others check
    if resume and not run_dir.exists():
        say(f"There is no {run_dir} to go on with: the run starts at its beginning.")
    if resume and (run_dir / "adapter").is_dir():
        try:
            verify_manifest(run_dir / "adapter")
        except DamagedFileError as error:
            say(f"{error} It is made again, from the last checkpoint where there is one.")
        else:
            say(f"{run_dir} is trained already; nothing is left to do.")
            return run_dir
    method = settings.build_method()
    task = get_task(settings.task)
    examples, held_out = training_rows(task, settings, say)
    model, tokenizer = load_base(settings)
    encoded = encode_rows(model, tokenizer, examples, settings, say)
    calibration = encode_rows(model, tokenizer, held_out, settings, say).rows if held_out else []
    checksums = {
        "base": base_fingerprint(model),
        "rows": checksum_of(encoded.rows),
        "held_out": checksum_of(calibration),
    }
    sources = load_sources(model, settings, checksums)
    if not sources or trains_on(settings):
        check_start(model, method, encoded.rows, settings.batch_size, settings.training_arguments)
    with alone(run_dir):
        if ranks()[0] == 0:
            prepare_run_dir(run_dir, resume=resume, overwrite=overwrite)
            if (run_dir / "config.json").is_file():
                check_same(run_dir, "base", checksums["base"], f"the base model {settings.model}")
                check_same(run_dir, "rows", checksums["rows"], f"the training rows of {task.name}")
            else:
                config = {"settings": settings.to_dict(), "concluded_from": identities(settings)}
                versions = {"task_version": task.version, "prompt_version": PROMPT_VERSION}
                counts = {"training_rows": len(encoded.rows), "held_out_rows": len(calibration), "cut": encoded.cut}
                data = {"data": digest_of([*examples, *held_out])}  # whatever the seed holds out
                write_json(run_dir / "config.json", config | versions | checksums | data | counts | origin())
            if is_task_file(settings.task) and not (run_dir / TASK_FILE).exists():
                write_bytes(run_dir / TASK_FILE, Path(settings.task).read_bytes())
        wait_for_ranks()
        common: dict[str, Any] = {
            "pad_token_id": pad_of(tokenizer),
            "batch_size": settings.batch_size,
            "calibration": calibration,
            "seed": settings.seed,
            "warn": say,
        }
        if sources and not trains_on(settings):
            conclude(model, method, encoded.rows, run_dir, sources=sources, **common)
            return run_dir
        fit(
            model,
            method,
            encoded.rows,
            run_dir,
            steps=settings.steps,
            accumulation=settings.accumulation,
            checkpoint_every=settings.checkpoint_every,
            max_not_finite=settings.max_not_finite,
            training_arguments=settings.training_arguments,
            resume=resume,
            callbacks=callbacks,
            **common,
        )
        if log := curves.training([run_dir]):
            for sentence in signs(log.end):
                say(sentence)
        return run_dir


def _silent(text: str) -> None:
    """Say nothing: a `Say` for ranks but the first."""


def check_run_dir(
    settings: Settings, *, resume: bool = False, overwrite: bool = False, recipe: Path | None = None
) -> None:
    """Refuse a run directory or finished runs that training would refuse, before the work of loading.

    Args:
        settings: of the run.
        resume: as for `train`.
        overwrite: as for `train`.
        recipe: the file that the settings are from, which `overwrite` must not delete either.

    Raises:
        VarloraError: it exists without `resume` or `overwrite`, or has other settings than it was started with; see
            `check_sources`.
    """
    run_dir = settings.folder
    finished = resume and (run_dir / "adapter").is_dir()  # its sources may be gone
    if not finished:
        check_sources(settings)
    check_place(run_dir, resume=resume, overwrite=overwrite)
    own = {"task": settings.task if is_task_file(settings.task) else None, "recipe": recipe} | {
        name: getattr(settings, name) for name in ("data_dir", "model")
    }
    for name, path in own.items():
        if overwrite and path and Path(path).exists() and Path(path).resolve().is_relative_to(run_dir.resolve()):
            raise VarloraError(
                f"`--overwrite` would delete {path}, which is `{name}` of the run. Move it out of {run_dir}, or give "
                "another run directory."
            )
    if resume and (run_dir / "config.json").is_file():
        check_unchanged(settings)
        begun = [source["adapter"] for source in read_json(run_dir / "config.json").get("concluded_from") or []]
        if not finished and begun != [source["adapter"] for source in identities(settings)]:
            raise VarloraError(
                f"Expected the finished runs that {run_dir} was begun from, but their adapters are others. "
                "Go on with the same ones, or give another run directory."
            )


def check_unchanged(settings: Settings) -> None:
    """Refuse other settings than those that the run directory was started with.

    Raises:
        VarloraError: there are some; or there is no such run.
    """
    then, now = settings_of(settings.folder).to_dict(), settings.to_dict()
    changed = [name for name in now if name not in MOVABLE and now[name] != then[name]]
    if "task" in changed and get_task(now["task"]).name == get_task(then["task"]).name:  # its file was moved
        changed.remove("task")
    if changed:
        difference = "; ".join(f"`{name}` is {now[name]!r} and was {then[name]!r}" for name in changed)
        raise VarloraError(
            f"Expected the settings that {settings.folder} was started with, but {difference}. "
            "Go on without changes, or give another run directory."
        )


def validate(settings: Settings) -> list[str]:
    """Check data, answers and prompt lengths without training.

    Args:
        settings: checked already by themselves.

    Returns:
        What was found, line by line.

    Raises:
        VarloraError: the first thing that training would stop at.
    """
    found: list[str] = []
    task = get_task(settings.task)
    train_examples, calibration = training_rows(task, settings, found.append)
    evaluation = rows_of_split(task, task.evaluation, settings, found.append)
    say_unsliced(task, evaluation, found.append)
    trained = {example.prompt for example in train_examples}
    if copies := sum(example.prompt in trained for example in evaluation):
        found.append(f"{copies} of {len(evaluation)} {task.evaluation} prompts are trained on, word for word.")
    found.append(
        f"{task.name}: {len(train_examples)} training, {len(calibration)} calibration and {len(evaluation)} "
        f"{task.evaluation} rows."
    )
    model, tokenizer = load_base(settings)
    count = sum(p.numel() for p in trainable(model).values())
    found.append(f"{settings.model}: {count:,} trainable parameters in {len(trainable(model))} matrices.")
    encoded = encode_rows(model, tokenizer, [*train_examples, *calibration, *evaluation], settings, found.append)
    longest = max(len(row.input_ids) for row in encoded.rows)
    example = train_examples[0]
    tokens = tokenizer.convert_ids_to_tokens(list(encoded.rows[0].label_tokens))
    found.append(f"Longest prompt: {longest} tokens.")
    found.append(f"First prompt: {example.prompt!r}")
    found.append("Answers and their tokens: " + ", ".join(f"{a!r} {t!r}" for a, t in zip(example.answers, tokens)))
    return found


def tune(settings: Settings, *, say: Say = print) -> tuple[Settings, Prepared]:
    """Find the settings that are left to the method, as `train` would, without training.

    Args:
        settings: of the run; checked already by themselves.
        say: told in words what a user should know.

    Returns:
        The settings with what was found, and what was seen.

    Raises:
        VarloraError: nothing is left to the method; or a problem with data or model.
    """
    method = settings.build_method()
    examples, held_out = training_rows(get_task(settings.task), settings, say)
    model, tokenizer = load_base(settings)
    rows = encode_rows(model, tokenizer, examples, settings, say).rows
    calibration = encode_rows(model, tokenizer, held_out, settings, say).rows if held_out else []
    start = start_of(
        model,
        rows,
        pad_token_id=pad_of(tokenizer),
        steps=settings.steps,
        batch_size=settings.batch_size,
        accumulation=settings.accumulation,
        calibration=calibration,
        seed=settings.seed,
        warn=say,
    )
    prepared = method.prepare(start)
    if prepared is None:
        raise VarloraError(
            f"Nothing is left to `{settings.method}` to find. It is ivon that finds `lr`, `ess` and `hess_init`, where "
            "they are left out or auto."
        )
    return dataclasses.replace(settings, method_settings={**settings.method_settings, **prepared.settings}), prepared


def training_costs(
    runs: Mapping[str, Settings],
    rounds: int,
    *,
    say: Say = print,
    progress: Progress | None = None,
) -> Overhead:
    """Time the training steps of methods on one model and its rows.

    Args:
        runs: name -> settings; model, rows and batches are the first one's, the methods each one's.
        rounds: timed steps of each method.
        say: told in words what a user should know.
        progress: given the number of rounds, a context that gives a function to call with the rounds done.
    """
    first = next(iter(runs.values()))
    model, tokenizer = load_base(first)
    rows = encode_rows(model, tokenizer, training_rows(get_task(first.task), first, say)[0], first, say).rows
    methods = {name: settings.build_method() for name, settings in runs.items()}
    with (progress or no_progress)(rounds) as advance:
        return measure_overhead(
            model,
            rows,
            pad_token_id=pad_of(tokenizer),
            methods=methods,
            batch_size=first.batch_size,
            rounds=rounds,
            seed=first.seed,
            progress=advance,
        )
