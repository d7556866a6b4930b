"""The main job from settings to files: train, evaluate, predict. The command line and the demo only call these."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from varlora import metrics
from varlora.calibration import Calibration, Search, load_calibration, save_calibration
from varlora.calibration import calibrate as search_calibration
from varlora.checkpoint import load_adapter, load_posterior
from varlora.config import TASK_FILE, Settings, settings_from, settings_of
from varlora.data import EncodedSet, encode_all
from varlora.drawing import LATIN, PLAIN, Drawing
from varlora.errors import DamagedFileError, VarloraError
from varlora.fit import conclude, fit, start_of
from varlora.methods import Prepared
from varlora.model import base_fingerprint, load_model
from varlora.overhead import Overhead, measure_overhead
from varlora.params import trainable
from varlora.posterior import Posterior, Tempered
from varlora.posterior.base import check_draws
from varlora.predict import predict
from varlora.predictions import Predictions, load_predictions, made_unlike, save_predictions
from varlora.prompt import PROMPT_VERSION, Encoded
from varlora.run import origin, prepare_run_dir, read_json, verify_manifest, write_bytes, write_json
from varlora.sources import check_sources, identities, load_sources, trains_on
from varlora.tasks import Task, get_task, is_task_file, load_rows, split_calibration
from varlora.tasks.base import Example
from varlora.temperature import fit_temperature

__all__ = [
    "Loaded",
    "answer_rows",
    "calibrate",
    "check_run_dir",
    "check_unchanged",
    "evaluate",
    "held_out_predictions",
    "load",
    "load_parts",
    "longest_prompt",
    "pad_of",
    "rows_of_split",
    "train",
    "training_costs",
    "training_rows",
    "tune",
    "validate",
]

Say = Callable[[str], None]

MOVABLE = ("run_dir", "data_dir", "model", "sources")
"""Settings that a resumed run may change: where things lie."""
CALIBRATION = "-calibration"
"""End of the names of the held-out rows' files: to choose on; a report never reads them."""
CALIBRATED = "-calibrated"
"""End of the name of the predictions by the calibrated posterior."""


@dataclass(frozen=True)
class Loaded:
    """What a run directory holds."""

    model: nn.Module
    """Base and adapter, at the posterior mean, in evaluation mode."""
    posterior: Posterior
    """The posterior over the adapter."""
    tokenizer: PreTrainedTokenizerBase
    """The base's tokenizer."""
    settings: Settings
    """The settings that it was trained with."""
    calibration: Calibration | None = None
    """How the posterior is to be used, if `varlora calibrate` chose it."""

    @property
    def calibrated(self) -> Posterior:
        """The posterior as it is to be drawn from: calibrated, where that was done."""
        return self.posterior if self.calibration is None else self.calibration.applied(self.posterior)

    def used(self, samples: int | None = None, tau: float | None = None) -> tuple[Posterior, int, float, Drawing]:
        """Return the posterior to draw from, the number of draws, the factor τ of its variance, and how it is drawn.

        Args:
            samples: draws; 0: only the mean; left out: what `calibrate` chose, else 10.
            tau: factor of the variance of what was trained, without the rest of what was chosen; left out: what was
                chosen, else 1.
        """
        chosen = self.calibration if tau is None else None
        if samples is None:
            samples = chosen.samples if chosen else 10
        if chosen:
            return chosen.applied(self.posterior), samples, chosen.tau, chosen.how
        tau = 1.0 if tau is None else tau
        return self.posterior.scale(tau), samples, tau, PLAIN

    def __iter__(self) -> Iterator[Any]:
        """Unpack as `model, posterior = load(run_dir)`."""
        return iter((self.model, self.posterior))


def load(run_dir: str | Path, *, model: str | None = None, device: str | None = None) -> Loaded:
    """Load a trained run: `model, posterior = varlora.load(run_dir)`, bit for bit what was saved.

    Args:
        run_dir: a run directory.
        model: the base, if it is no longer where it was.
        device: where to load it to; left out: the current GPU, else the CPU.

    Raises:
        DamagedFileError: a file is absent, altered or of another model.
        VarloraError: the run is not finished, or its base cannot be loaded.
    """
    run_dir = Path(run_dir)
    settings = settings_of(run_dir)
    if not (run_dir / "adapter").is_dir():
        raise VarloraError(
            f"{run_dir} has no adapter yet: training is not finished. Go on with `varlora train --resume`."
        )
    trained_on = read_json(run_dir / "config.json").get("base")
    return load_parts(settings, run_dir / "adapter", trained_on, name=str(run_dir), model=model, device=device)


def load_parts(
    settings: Settings,
    adapter: Path,
    trained_on: str | None,
    *,
    name: str,
    model: str | None = None,
    device: str | None = None,
) -> Loaded:
    """Load a base, and an adapter with its posterior and calibration on it.

    Args:
        settings: those that it was trained with.
        adapter: the folder of the adapter's files.
        trained_on: checksum of the base that it was trained on, if that is known.
        name: what messages call it.
        model: the base, if it is no longer where it was.
        device: where to load it to; left out: the current GPU, else the CPU.

    Raises:
        DamagedFileError: a file is absent, altered or of another model.
        VarloraError: the base cannot be loaded.
    """
    loaded, tokenizer = _load_base(settings, model, device)
    posterior = load_posterior(loaded, adapter)
    if trained_on not in (None, base_fingerprint(loaded)):
        raise _other(f"the base model {model or settings.model}", name)
    load_adapter(loaded, adapter)
    return Loaded(loaded, posterior, tokenizer, settings, load_calibration(adapter))


def train(
    settings: Settings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Say = print,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Train as `settings` say and write the run directory.

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
    """
    settings = settings_from(dataclasses.asdict(settings))  # checked, also when made in Python
    run_dir = settings.folder
    check_run_dir(settings, resume=resume, overwrite=overwrite)
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
    model, tokenizer = _load_base(settings)
    encoded = _encode(model, tokenizer, examples, settings, say)
    calibration = _encode(model, tokenizer, held_out, settings, say).rows if held_out else []
    checksums = {"base": base_fingerprint(model), "rows": _checksum(encoded.rows), "held_out": _checksum(calibration)}
    sources = load_sources(model, settings, checksums)
    prepare_run_dir(run_dir, resume=resume, overwrite=overwrite)
    if (run_dir / "config.json").is_file():
        _check_same(run_dir, "base", checksums["base"], f"the base model {settings.model}")
        _check_same(run_dir, "rows", checksums["rows"], f"the training rows of {task.name}")
    else:
        config = {"settings": settings.to_dict(), "concluded_from": identities(settings)}
        versions = {"task_version": task.version, "prompt_version": PROMPT_VERSION}
        data = {**checksums, "training_rows": len(encoded.rows), "cut": encoded.cut}
        write_json(run_dir / "config.json", config | versions | data | origin())
    if is_task_file(settings.task) and not (run_dir / TASK_FILE).exists():
        write_bytes(run_dir / TASK_FILE, Path(settings.task).read_bytes())
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
    return run_dir


def _checksum(rows: Sequence[Encoded]) -> str:
    return hashlib.sha256(repr(list(rows)).encode()).hexdigest()


def _check_same(run_dir: Path, key: str, checksum: str, what: str) -> None:
    """Refuse a base or rows that are not those which a run was trained with; they may lie elsewhere, not differ."""
    if read_json(run_dir / "config.json").get(key, checksum) != checksum:
        raise _other(what, str(run_dir))


def _other(what: str, run: str) -> DamagedFileError:
    return DamagedFileError(
        f"Expected {what} to be what {run} was trained with, but its checksum differs. "
        "Pass the original, or train a new run."
    )


def check_run_dir(settings: Settings, *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a run directory or finished runs that training would refuse, before the work of loading.

    Raises:
        VarloraError: it exists without `resume` or `overwrite`, or has other settings than it was started with; see
            `check_sources`.
    """
    run_dir = settings.folder
    finished = resume and (run_dir / "adapter").is_dir()  # its sources may be gone
    if not finished:
        check_sources(settings)
    if not overwrite and run_dir.exists():
        prepare_run_dir(run_dir, resume=resume)
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
    _say_unsliced(task, evaluation, found.append)
    found.append(
        f"{task.name}: {len(train_examples)} training, {len(calibration)} calibration and {len(evaluation)} "
        f"{task.evaluation} rows."
    )
    model, tokenizer = _load_base(settings)
    count = sum(p.numel() for p in trainable(model).values())
    found.append(f"{settings.model}: {count:,} trainable parameters in {len(trainable(model))} matrices.")
    encoded = _encode(model, tokenizer, [*train_examples, *calibration, *evaluation], settings, found.append)
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
    model, tokenizer = _load_base(settings)
    rows, calibration = (_encode(model, tokenizer, of, settings, say).rows if of else [] for of in (examples, held_out))
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
            f"Nothing is left to `{settings.method}` to find: all its settings are given. "
            "Leave out `lr`, `ess` or `hess_init` of ivon, or set them to auto."
        )
    return dataclasses.replace(settings, method_settings={**settings.method_settings, **prepared.settings}), prepared


def training_costs(
    runs: Mapping[str, Settings],
    rounds: int,
    *,
    say: Say = print,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None] | None]] | None = None,
) -> Overhead:
    """Time the training steps of methods on one model and its rows.

    Args:
        runs: name -> settings; model, rows and batches are the first one's, the methods each one's.
        rounds: timed steps of each method.
        say: told in words what a user should know.
        progress: given the number of rounds, a context that gives a function to call with the rounds done.
    """
    first = next(iter(runs.values()))
    model, tokenizer = _load_base(first)
    rows = _encode(model, tokenizer, training_rows(get_task(first.task), first, say)[0], first, say).rows
    methods = {name: settings.build_method() for name, settings in runs.items()}
    with (progress or _no_progress)(rounds) as advance:
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


def training_rows(task: Task, settings: Settings, say: Say) -> tuple[list[Example], list[Example]]:
    """Return the training rows and the calibration rows that were held out of them."""
    rows = load_rows(task, "train", settings.data_dir, settings.skip_bad_rows, settings.row_filter)
    _say_skipped(rows.skipped, rows.problems, say)
    return split_calibration(rows.examples, settings.calibration_fraction, settings.seed)


def rows_of_split(task: Task, split: str, settings: Settings, say: Say) -> list[Example]:
    """Return the rows of an official split, or of `calibration`: the training rows that were held out."""
    if split == "calibration":
        calibration = training_rows(task, settings, say)[1]
        if not calibration:
            if len(settings.sources) > 1:
                raise VarloraError(
                    "This run was concluded from finished ones that held out no rows in common, so none are left to "
                    "choose on. Calibrate those, or train `ensemble` itself with `--calibration-fraction 0.1`."
                )
            raise VarloraError("This run held no rows out for calibration. Train with `--calibration-fraction 0.1`.")
        return calibration
    rows = load_rows(task, split, settings.data_dir, settings.skip_bad_rows, settings.row_filter)
    _say_skipped(rows.skipped, rows.problems, say)
    return rows.examples


def evaluate(
    run_dir: str | Path,
    *,
    split: str | None = None,
    samples: int = 10,
    tau: float = 1.0,
    seed: int = 0,
    token_budget: int = 4096,
    how: Drawing = PLAIN,
    data_dir: str | None = None,
    model: str | None = None,
    temperature: bool = True,
    taus: Sequence[float] = (),
    ood: Sequence[str] = (),
    calibrated: bool = False,
    say: Say = print,
    progress: Callable[[int], AbstractContextManager[Callable[[int], None] | None]] | None = None,
) -> dict[str, Any]:
    """Predict a split's rows, and write `predictions.safetensors` and `metrics.json` to the run directory.

    For the calibration split both names end in `-calibration`, so that no report shows them as results. Predictions at
    further factors of the variance, and of other tasks' rows, are written beside them: `predictions-tau-<tau>` and
    `predictions-ood-<task>`; so are those of the calibrated posterior, where there is one: `predictions-calibrated`.

    Args:
        run_dir: a trained run.
        split: the split to report on; left out: the task's own (dev, as in the paper).
        samples: draws; 0: only the mean.
        tau: factor of the posterior variance.
        seed: seed of the draws.
        token_budget: tokens a batch, padding included.
        how: how the draws are made and run.
        data_dir: where the data lie now, if not where they were.
        model: where the base lies now, if not where it was.
        temperature: fit a temperature on the held-out rows as well, if there are any.
        taus: further factors of the posterior variance to predict the same rows at.
        ood: other tasks, by name or task file, to whose rows the model is shown as well: out of distribution.
        calibrated: call `calibrate` first, if that was not done and rows were held out.
        say: told in words what a user should know.
        progress: given the number of rows, a context that gives a function to call with the rows done.

    Returns:
        What `metrics.json` holds.
    """
    run_dir = Path(run_dir)
    settings = settings_of(run_dir)
    task = get_task(settings.task)
    split = split or task.evaluation
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    trained_with = read_json(run_dir / "config.json").get("task_version")
    if trained_with != task.version:
        say(f"{task.name} is of version {task.version} now, and was of {trained_with} when {run_dir} was trained.")
    loaded = load(run_dir, model=model)
    check_draws(samples, what="samples")
    for factor in (tau, *taus):
        loaded.posterior.scale(factor)  # which raises for one out of range, before anything is replaced

    def predicted(
        split: str, task: Task = task, tau: float = tau, loaded: Loaded = loaded, **draws: Any
    ) -> Predictions:
        """Predict a split."""
        examples = rows_of_split(task, split, settings, say)
        _say_unsliced(task, examples, say)
        encoded = _encode(loaded.model, loaded.tokenizer, examples, settings, say)
        if split == "calibration":  # other data may hold out rows that were trained on
            _check_same(run_dir, "held_out", _checksum(encoded.rows), f"the held-out rows of {task.name}")
        with (progress or _no_progress)(len(encoded.rows)) as advance:
            draws = {"samples": samples, "tau": tau, "seed": seed, "token_budget": token_budget, "how": how, **draws}
            found = _predict(loaded, encoded.rows, **draws, progress=advance)
        origin_of_rows = {"task": task.name, "split": split, "task_version": task.version, "cut": str(encoded.cut)}
        slices = tuple(example.slice for example in examples)
        return dataclasses.replace(
            found,
            slices=slices if any(slices) else (),
            prompts=tuple(example.prompt for example in examples),
            answers=tuple(tuple(example.answers) for example in examples),
            meta={**found.meta, **origin_of_rows},
        )

    def written(found: Predictions, suffix: str = "", **more: Any) -> dict[str, Any]:
        save_predictions(found, run_dir / f"predictions{suffix}.safetensors")
        results = _results(found) | more
        write_json(run_dir / f"metrics{suffix}.json", results | origin())
        return results

    if split == "calibration":
        return written(predicted(split), CALIBRATION)
    others = [get_task(name) for name in ood]
    beside = run_dir / f"predictions{CALIBRATED}.safetensors"
    (run_dir / "metrics.json").unlink(missing_ok=True)  # it is written last: where it is, all is there
    beside.unlink(missing_ok=True)  # of other rows or draws, it may be
    predictions = predicted(split)
    save_predictions(predictions, run_dir / "predictions.safetensors")
    for other in others:
        save_predictions(predicted(other.evaluation, other), run_dir / f"predictions-ood-{other.name}.safetensors")
    for factor in taus:
        save_predictions(predicted(split, tau=factor), run_dir / f"predictions-tau-{factor:g}.safetensors")
    more: dict[str, Any] = {}
    if calibrated and loaded.calibration is None and settings.calibration_fraction:
        search = calibrate(run_dir, seed=seed, token_budget=token_budget, data_dir=data_dir, model=model, say=say)
        loaded = dataclasses.replace(loaded, calibration=search.chosen)
    if (chosen := loaded.calibration) is not None:
        used = dataclasses.replace(loaded, posterior=loaded.calibrated)
        tuned = predicted(split, tau=1.0, loaded=used, samples=chosen.samples, how=how.over(chosen.how))
        facts = {name: str(value) for name, value in dataclasses.asdict(chosen).items() if value is not None}
        save_predictions(dataclasses.replace(tuned, meta={**tuned.meta, **facts}), beside)
        known = tuned.labels >= 0
        more = {"calibration": dataclasses.asdict(chosen)}
        if known.any():
            more["calibrated"] = metrics.evaluate(tuned.probs[known], tuned.labels[known])
    if temperature and settings.calibration_fraction and loaded.posterior.kind != Tempered.kind:
        try:
            try:
                held_out = held_out_predictions(run_dir, predictions.meta)
            except DamagedFileError:
                held_out = None  # they are made anew
            if held_out is None:
                held_out = predicted("calibration")
                written(held_out, CALIBRATION)
            fitted = {
                "temperature": repr(fit_temperature(held_out.logits, held_out.labels, say)),
                "temperature_mean": repr(fit_temperature(held_out.logits_mean[None], held_out.labels, say)),
            }
        except VarloraError as error:
            say(f"No temperature was fitted on the held-out rows: {error}")
        else:
            predictions = dataclasses.replace(predictions, meta={**predictions.meta, **fitted})
    return written(predictions, **more)


def calibrate(
    run_dir: str | Path,
    *,
    samples: int = 16,
    how: Drawing = LATIN,
    seed: int = 0,
    token_budget: int = 4096,
    data_dir: str | None = None,
    model: str | None = None,
    say: Say = print,
) -> Search:
    """Choose how a run's posterior is best used, on the rows that it held out, and store that with the adapter.

    Args:
        run_dir: a trained run.
        samples: draws at the most; 0: only the mean and its temperature.
        how: how the draws are made, now and later: their noise, and of how many layers.
        seed: seed of the draws.
        token_budget: tokens a batch, padding included.
        data_dir: where the data lie now, if not where they were.
        model: where the base lies now, if not where it was.
        say: told in words what a user should know.

    Returns:
        What was chosen, and among what; `adapter/calibration.json` holds it, and `answer_rows` uses it.

    Raises:
        VarloraError: the run held no rows out, or see `load`.
    """
    run_dir = Path(run_dir)
    settings = settings_of(run_dir)
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    task = get_task(settings.task)
    examples = rows_of_split(task, "calibration", settings, say)
    loaded = load(run_dir, model=model)
    rows = _encode(loaded.model, loaded.tokenizer, examples, settings, say).rows
    _check_same(run_dir, "held_out", _checksum(rows), f"the held-out rows of {task.name}")

    def draw(posterior: Posterior, n: int) -> tuple[Tensor, Tensor]:
        one = dataclasses.replace(loaded, posterior=posterior)
        found = _predict(one, rows, samples=n, seed=seed, token_budget=token_budget, how=how)
        return found.logits, found.labels

    search = search_calibration(loaded.posterior, draw, samples, how)
    for doubt in search.doubts():
        say(doubt)
    (run_dir / f"predictions{CALIBRATED}.safetensors").unlink(missing_ok=True)  # of what was chosen before
    save_calibration(search, run_dir / "adapter")
    return search


def held_out_predictions(run_dir: Path, meta: Mapping[str, str]) -> Predictions | None:
    """Return a run's predictions of its held-out rows, if it has them and they were made like others.

    Args:
        run_dir: a trained run.
        meta: how the others were made: the `meta` of predictions, or that of a `Predictor` with `task` and
            `task_version`.

    Raises:
        DamagedFileError: there is a file, and it cannot be read.
    """
    path = run_dir / f"predictions{CALIBRATION}.safetensors"
    if not path.is_file():
        return None
    found = load_predictions(path)
    return None if made_unlike(found.meta, meta, "task", "task_version") else found


def _results(predictions: Predictions) -> dict[str, Any]:
    """Return what `metrics.json` holds."""
    known = predictions.labels >= 0
    drawn = predictions.meta["samples"] != "0"
    results: dict[str, Any] = {
        "task": predictions.meta["task"],
        "split": predictions.meta["split"],
        "samples": len(predictions.logits) if drawn else 0,
        "tau": float(predictions.meta["tau"]),
        "rows": int(known.sum()),
        "cut": int(predictions.meta["cut"]),
        "bins": "10 equal-width bins (lo, hi]",
    }

    def evaluated(probs: Tensor) -> dict[str, float]:
        return metrics.evaluate(probs[known], predictions.labels[known])

    if known.any():
        results["mean"] = evaluated(predictions.probs_mean)
        results["draws"] = evaluated(predictions.probs) if drawn else None
        if predictions.temperatures:
            results["temperature"] = predictions.temperatures._asdict()
            results["mean_tempered"] = evaluated(predictions.tempered(drawn=False))
            results["draws_tempered"] = evaluated(predictions.tempered(drawn=True)) if drawn else None
    return results


def answer_rows(
    loaded: Loaded,
    examples: Sequence[Example],
    *,
    samples: int | None = None,
    tau: float | None = None,
    seed: int = 0,
    how: Drawing = PLAIN,
    say: Say = print,
) -> Iterable[dict[str, Any]]:
    """Return for each example its id, the most probable answer, all probabilities and the uncertainty in nats.

    Args:
        loaded: what `load` returned; it is used as `calibrate` chose, if it did.
        examples: the rows.
        samples: draws; 0: only the mean; left out: what was chosen, else 10.
        tau: factor of the posterior's variance, of what was trained and without the rest of what was chosen; left out:
            what was chosen, else 1.
        seed: seed of the draws.
        how: how the draws are made and run.
        say: told in words what a user should know.
    """
    encoded = _encode(loaded.model, loaded.tokenizer, examples, loaded.settings, say)
    posterior, samples, _, as_chosen = loaded.used(samples, tau)
    used = dataclasses.replace(loaded, posterior=posterior)
    predictions = _predict(used, encoded.rows, samples=samples, seed=seed, how=how.over(as_chosen))
    parts = predictions.uncertainty._asdict()
    for i, (example, probs) in enumerate(zip(examples, predictions.probs.tolist())):
        probabilities = dict(zip(example.answers, probs))
        yield {
            "id": example.id,
            "answer": max(probabilities, key=lambda answer: probabilities[answer]),
            "probabilities": probabilities,
            "uncertainty": {name: values[i].item() for name, values in parts.items()},
        }


def _predict(loaded: Loaded, rows: Sequence[Encoded], **settings: Any) -> Predictions:
    return predict(loaded.model, loaded.posterior, rows, pad_token_id=pad_of(loaded.tokenizer), **settings)


def _load_base(settings: Settings, model: str | None = None, device: str | None = None) -> tuple[Any, Any]:
    return load_model(
        model or settings.model,
        dtype=settings.dtype,
        quantization=settings.quantization,
        lora=settings.lora,
        seed=settings.seed,
        device=device,
        revision=settings.revision,
    )


def _encode(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: Settings, say: Say
) -> EncodedSet:
    length = longest_prompt(model, settings, say)
    encoded = encode_all(tokenizer, examples, length, settings.chat)
    if encoded.cut:
        say(f"{encoded.cut} of {len(examples)} prompts were longer than {length} tokens and have been cut.")
    return encoded


def longest_prompt(model: nn.Module, settings: Settings, say: Say) -> int | None:
    """Return the tokens of the longest prompt that a run takes, which is never more than the model's context."""
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    if settings.max_length is not None and settings.max_length > context:
        say(f"`max_length` {settings.max_length} is more than the model's context; {context} tokens are used.")
    length = min(settings.max_length or math.inf, context)
    return None if length == math.inf else int(length)


def pad_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token to pad with."""
    return int(tokenizer.pad_token_id or 0)


def _say_unsliced(task: Task, examples: Sequence[Example], say: Say) -> None:
    if task.slice and not any(example.slice for example in examples):
        say(f"No row of {task.name} has the field `{task.slice}`, so that reports cannot be sliced by it.")


def _say_skipped(skipped: int, problems: Sequence[str], say: Say) -> None:
    if skipped:
        say(f"{skipped} malformed rows were left out; the first: {problems[0]}")


def _no_progress(rows: int) -> AbstractContextManager[None]:
    return nullcontext()
