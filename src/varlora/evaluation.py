"""From a trained run to predictions: evaluate, calibrate, answer."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlora import metrics
from varlora.calibration import MOST_CHOSEN, Search, save_calibration
from varlora.calibration import calibrate as search_calibration
from varlora.config import TASK_FILE, settings_of
from varlora.data import EncodedSet
from varlora.drawing import LATIN, PLAIN, Drawing
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import MANIFEST, file_digest, read_json, told_if_unwritten, write_json, written_together
from varlora.loading import (
    Loaded,
    Progress,
    Say,
    check_same,
    checksum_of,
    digest_of,
    encode_rows,
    load,
    no_progress,
    pad_of,
    rows_of_split,
    say_unsliced,
)
from varlora.posterior import Posterior, Tempered
from varlora.posterior.base import check_draws
from varlora.predict import Predictor, predict
from varlora.predictions import (
    CALIBRATED,
    CALIBRATION,
    Predictions,
    load_predictions,
    made_unlike,
    save_predictions,
)
from varlora.prompt import PROMPT_VERSION, Encoded
from varlora.run import origin
from varlora.tasks import Task, get_task, is_task_file
from varlora.tasks.base import Example
from varlora.temperature import fit_temperature

__all__ = [
    "answer_rows",
    "calibrate",
    "evaluate",
    "held_out_predictions",
]

AT_ONCE = 128
"""Rows that are answered before their answers are passed on."""


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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predict a split's rows, and write `predictions.safetensors` and `metrics.json` to the run directory.

    For the calibration split both names end in `-calibration`, so that no report shows them as results. Predictions at
    further factors of the variance, and of other tasks' rows, are written beside them: `predictions-tau-<tau>` and
    `predictions-ood-<task>`; so are those of the calibrated posterior, where there is one: `predictions-calibrated`.

    Args:
        run_dir: a trained run.
        split: the split to report on; left out: the task's own (dev, as WinoGrande and BoolQ have no labelled test
            split; the paper says "on the test set").
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

    Raises:
        DamagedFileError: a file of the run is absent, altered or of another model.
        VarloraError: the run is not finished; there is no such split or task, or no such rows; `samples`, `tau` or one
            of `taus` is out of its range; or the rows that were held out are other ones now.

    Example:
        >>> found = evaluate(run_dir, samples=0, say=lambda words: None)  # of a run that `train` made
        >>> 0 <= found["mean"]["ece"] <= 1
        True
    """
    run_dir = Path(run_dir)
    settings = settings_of(run_dir)
    task = get_task(settings.task)
    split = split or task.evaluation
    if data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=data_dir)
    config = read_json(run_dir / "config.json")
    if (trained_with := config.get("prompt_version", PROMPT_VERSION)) != PROMPT_VERSION:
        say(f"Prompts are of version {PROMPT_VERSION} now, and were of {trained_with} when {run_dir} was trained.")
    if (trained_with := config.get("task_version")) != task.version:
        say(f"{task.name} is of version {task.version} now, and was of {trained_with} when {run_dir} was trained.")
    elif _task_file_changed(settings.task, run_dir / TASK_FILE):
        say(
            f"{settings.task} was changed since {run_dir} was trained, and is read as it is now. "
            f"{run_dir / TASK_FILE} is what it was."
        )
    if split == "calibration" and (ood or taus or calibrated):
        raise VarloraError(
            "Expected neither `ood` nor `taus` nor `calibrated` with the split `calibration`, which is there to choose "
            "on and is not reported. Leave them out, or the split."
        )
    check_draws(samples, what="samples")
    _say_if_all_are_drawn(how, samples, say)
    adapter = _adapter(run_dir)
    loaded = load(run_dir, model=model)
    for factor in (tau, *taus):
        loaded.posterior.scale(factor)  # which raises for one out of range, before anything is replaced

    read: dict[tuple[int, str], tuple[list[Example], EncodedSet, str]] = {}

    def rows_of(task: Task, split: str) -> tuple[list[Example], EncodedSet, str]:
        """Return a split's rows and their checksum; they are read and encoded once, however often predicted."""
        if (id(task), split) not in read:
            examples = rows_of_split(task, split, settings, say)
            say_unsliced(task, examples, say)
            encoded = encode_rows(loaded.model, loaded.tokenizer, examples, settings, say)
            if split == "calibration":  # other data may hold out rows that were trained on
                check_same(run_dir, "held_out", checksum_of(encoded.rows), f"the held-out rows of {task.name}")
            read[id(task), split] = examples, encoded, digest_of(examples)
        return read[id(task), split]

    def predicted(
        split: str, task: Task = task, tau: float = tau, loaded: Loaded = loaded, **draws: Any
    ) -> Predictions:
        """Predict a split."""
        examples, encoded, digest = rows_of(task, split)
        with (progress or no_progress)(len(encoded.rows)) as advance:
            draws = {"samples": samples, "tau": tau, "seed": seed, "token_budget": token_budget, "how": how, **draws}
            found = _predict(loaded, encoded.rows, **draws, progress=advance)
        origin_of_rows = {"task": task.name, "split": split, "task_version": task.version, "cut": str(encoded.cut)}
        origin_of_rows["data"] = digest
        slices = tuple(example.slice for example in examples)
        return dataclasses.replace(
            found,
            slices=slices if any(slices) else (),
            prompts=tuple(example.prompt for example in examples),
            answers=tuple(tuple(example.answers) for example in examples),
            meta={**found.meta, **origin_of_rows},
        )

    def written(results: dict[str, Any], found: Mapping[str, Predictions], suffix: str = "") -> dict[str, Any]:
        """Write metrics and predictions, which are called `predictions` and their key, whole or not at all."""
        metrics_file = f"metrics{suffix}.json"
        with written_together(run_dir, metrics_file, "evaluate again") as folder:
            for name, predictions in found.items():
                save_predictions(predictions, folder / f"predictions{name}.safetensors")
            write_json(folder / metrics_file, results | origin())
            _check_still(run_dir, adapter)
            if not suffix:
                (run_dir / f"predictions{CALIBRATED}.safetensors").unlink(missing_ok=True)  # of others, it may be
        return results

    if split == "calibration":
        predictions = predicted(split)
        return written(_results(predictions), {CALIBRATION: predictions}, CALIBRATION)
    others = [get_task(name) for name in ood]
    for what, names in (("ood", [other.name for other in others]), ("taus", [f"{factor:g}" for factor in taus])):
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise VarloraError(
                f"Expected `{what}` to differ, as files are named by them, but {twice[0]} is there twice."
            )
    for other in others:
        rows_of(other, other.evaluation)  # which raises before any is worked on
    if calibrated and loaded.calibration is None and settings.calibration_fraction:
        rows = rows_of(task, "calibration")[1].rows
        search = _calibrate(run_dir, adapter, loaded, rows, seed=seed, token_budget=token_budget, say=say)
        loaded = dataclasses.replace(loaded, calibration=search.chosen)
    elif calibrated and loaded.calibration is None:
        say(f"{run_dir} held no rows out, so it is not calibrated. Train with `--calibration-fraction 0.1`.")
    found = {"": predicted(split)}
    for other in others:
        found[f"-ood-{other.name}"] = predicted(other.evaluation, other)
    for factor in taus:
        found[f"-tau-{factor:g}"] = predicted(split, tau=factor)
    more: dict[str, Any] = {}
    if (chosen := loaded.calibration) is not None:
        used = dataclasses.replace(loaded, posterior=loaded.calibrated)
        tuned = predicted(split, tau=1.0, loaded=used, samples=chosen.samples, how=how.over(chosen.how))
        facts = {name: str(value) for name, value in dataclasses.asdict(chosen).items() if value is not None}
        found[CALIBRATED] = dataclasses.replace(tuned, meta={**tuned.meta, **facts})
        known = tuned.labels >= 0
        more = {"calibration": dataclasses.asdict(chosen)}
        if known.any():
            more["calibrated"] = metrics.evaluate(tuned.probs[known], tuned.labels[known])
    if temperature and settings.calibration_fraction and loaded.posterior.kind != Tempered.kind:
        try:
            try:
                held_out = held_out_predictions(run_dir, found[""].meta)
            except DamagedFileError:
                held_out = None  # they are made anew
            if held_out is None:
                held_out = predicted("calibration")
                written(_results(held_out), {CALIBRATION: held_out}, CALIBRATION)
            fitted = {
                "temperature": repr(fit_temperature(held_out.logits, held_out.labels, say)),
                "temperature_mean": repr(fit_temperature(held_out.logits_mean[None], held_out.labels, say)),
            }
        except VarloraError as error:
            say(f"No temperature was fitted on the held-out rows: {error}")
        else:
            found[""] = dataclasses.replace(found[""], meta={**found[""].meta, **fitted})
    # Only now that all is there does it take the place of what was, but for what was chosen and predicted to choose on.
    return written(_results(found[""]) | more, found)


def _task_file_changed(task: str, kept: Path) -> bool:
    """Whether a run's task is a file that is no longer what the run kept of it."""
    path = Path(task)
    return is_task_file(task) and path.is_file() and kept.is_file() and path.read_bytes() != kept.read_bytes()


def calibrate(
    run_dir: str | Path,
    *,
    samples: int = MOST_CHOSEN,
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
    adapter = _adapter(run_dir)
    loaded = load(run_dir, model=model, calibrated=False)
    rows = encode_rows(loaded.model, loaded.tokenizer, examples, settings, say).rows
    check_same(run_dir, "held_out", checksum_of(rows), f"the held-out rows of {task.name}")
    of_draws: dict[str, Any] = {"samples": samples, "how": how, "seed": seed, "token_budget": token_budget}
    return _calibrate(run_dir, adapter, loaded, rows, **of_draws, say=say)


def _calibrate(
    run_dir: Path,
    adapter: str,
    loaded: Loaded,
    rows: Sequence[Encoded],
    *,
    seed: int,
    token_budget: int,
    say: Say,
    samples: int = MOST_CHOSEN,
    how: Drawing = LATIN,
) -> Search:
    """Choose on a loaded run's held-out rows; `adapter` is what `_adapter` returned before it was loaded."""

    labels = torch.tensor([row.label for row in rows])

    def draw(posterior: Posterior, n: int) -> tuple[Tensor, Tensor]:
        predictor = Predictor(loaded.model, posterior, n, seed=seed, how=how)
        return predictor.logits_of(rows, pad_token_id=pad_of(loaded.tokenizer), token_budget=token_budget), labels

    search = search_calibration(loaded.posterior, draw, samples, how)
    for doubt in search.doubts():
        say(doubt)
    _check_still(run_dir, adapter)
    with told_if_unwritten(run_dir / "adapter", "calibrate again"):
        save_calibration(search, run_dir / "adapter")
    (run_dir / f"predictions{CALIBRATED}.safetensors").unlink(missing_ok=True)  # of what was chosen before
    return search


def _adapter(run_dir: Path) -> str:
    """Return by what a run's adapter is known: the digest of its manifest, or nothing where there is none."""
    path = run_dir / "adapter" / MANIFEST
    return file_digest(path) if path.is_file() else ""


def _check_still(run_dir: Path, adapter: str) -> None:
    """Raise unless a run's adapter is still what was loaded."""
    if _adapter(run_dir) != adapter:
        raise VarloraError(f"{run_dir} was trained anew meanwhile, so nothing is written. Do it again.")


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

    if "passes_a_row" in predictions.meta:
        results["passes_a_row"] = float(predictions.meta["passes_a_row"])

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
    progress: Progress | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Yield for each example its id, the most probable answer, all probabilities and the uncertainty in nats.

    They come in the order of the examples, `AT_ONCE` at a time, so that there is something to keep of a long run that
    is interrupted. One whose logits are not finite, as they may be in float16, has its id and an `error`.

    Args:
        loaded: what `load` returned; it is used as `calibrate` chose, if it did.
        examples: the rows.
        samples: draws; 0: only the mean; left out: what was chosen, else 10.
        tau: factor of the posterior's variance, of what was trained and without the rest of what was chosen; left out:
            what was chosen, else 1.
        seed: seed of the draws.
        how: how the draws are made and run.
        say: told in words what a user should know.
        progress: given the number of rows, a context that gives a function to call with the rows done.
    """
    rows = encode_rows(loaded.model, loaded.tokenizer, examples, loaded.settings, say).rows
    posterior, samples, _, as_chosen = loaded.used(samples, tau)
    how = how.over(as_chosen)
    _say_if_all_are_drawn(how, samples, say)
    predictor = Predictor(loaded.model, posterior, samples, seed=seed, how=how)
    with (progress or no_progress)(len(rows)) as advance:
        for start in range(0, len(rows), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            logits = predictor.logits_of(rows[some], pad_token_id=pad_of(loaded.tokenizer), progress=advance)
            kept = metrics.finite_rows(logits)
            answers = _answers(list(itertools.compress(examples[some], kept.tolist())), logits[:, kept])
            for example, row, good in zip(examples[some], rows[some], kept.tolist()):
                yield next(answers) if good else _alone(example, row, predictor, loaded)


def _say_if_all_are_drawn(how: Drawing, samples: int, say: Say) -> None:
    """Say so where a tolerance can stop nothing."""
    if how.tolerance is not None and samples and how.stops(samples) == [samples]:
        say(
            f"`tolerance` leaves out none of {samples} draws: rows are looked at after each number of draws that "
            "divides them, from 4 on, or of antithetic draws from 8 on if it is even. Take 16 or 32."
        )


def _alone(example: Example, row: Encoded, predictor: Predictor, loaded: Loaded) -> dict[str, Any]:
    """Answer a row whose logits are not finite once more without others, whose padding may be what overflows."""
    logits = predictor.logits_of([row], pad_token_id=pad_of(loaded.tokenizer))
    if metrics.finite_rows(logits).all():
        return next(_answers([example], logits))
    return {"id": example.id, "error": "Its logits are not finite: the model overflows."}


def _answers(examples: Sequence[Example], logits: Tensor) -> Iterator[dict[str, Any]]:
    if not examples:
        return
    parts = metrics.uncertainty(logits)._asdict()
    for i, (example, probs) in enumerate(zip(examples, metrics.average_probs(logits).tolist(), strict=True)):
        probabilities = dict(zip(example.answers, probs))
        yield {
            "id": example.id,
            "answer": max(probabilities, key=lambda answer: probabilities[answer]),
            "probabilities": probabilities,
            "uncertainty": {name: values[i].item() for name, values in parts.items()},
        }


def _predict(loaded: Loaded, rows: Sequence[Encoded], **settings: Any) -> Predictions:
    return predict(loaded.model, loaded.posterior, rows, pad_token_id=pad_of(loaded.tokenizer), **settings)
