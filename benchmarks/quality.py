"""Accuracy and calibration of AdamW and IVON on SST-2, over a grid of the posterior's scale.

Both methods train the same adapter on the same rows and have the same number of learning rates to choose from. IVON is
trained at each initial posterior scale sigma0 = 1/sqrt(ess * hess_init), ess fixed. The learning rate is chosen by the
accuracy at the mean on calibration rows that nobody trains on, with the first seed; then every seed is trained at it
and evaluated on the dev rows, at the mean and (IVON) with 10 draws. Nothing is chosen on dev. Chosen by NLL instead,
every method would take the smallest rate, at which it has hardly left the zero-shot model.

A cell is one training run: method, sigma0, learning rate, seed. It is stored in the work folder as soon as it is
finished, with its posterior and its predictions, and never repeated: start again to go on. Cells come in the order in
which partial results are useful: first the search, then one seed after the other.

    python benchmarks/quality.py
    python benchmarks/quality.py --budget-minutes 30   # stop starting cells after that, write what there is
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, count, parser, print_table, set_up, shared_folder, write_result
from transformers.utils.logging import disable_progress_bar

from varlora.checkpoint import load_posterior, save_adapter
from varlora.data import encode_all
from varlora.errors import Interrupted
from varlora.files import read_json, write_json
from varlora.fit import NotFiniteError, fit
from varlora.methods import METHODS, Method
from varlora.metrics import evaluate, standard_error
from varlora.model import load_model
from varlora.params import trainable
from varlora.posterior import Point, Posterior
from varlora.predict import predict
from varlora.predictions import Predictions, save_predictions
from varlora.prompt import PROMPT_VERSION, Encoded
from varlora.run import origin
from varlora.tasks import Example, get_task, load_rows

ESS, CLIP_RADIUS = 1e6, 1e-3
METRICS = ("accuracy", "ece", "nll", "brier")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""As the Trainer chooses."""
# Estimates for 2 cores, until cells of this work folder say better: seconds a training step, and seconds for one pass
# of one model over one row.
STEP_SECONDS, ROW_SECONDS = 0.056, 0.0042


@dataclass(frozen=True)
class Variant:
    """What a learning rate is chosen for."""

    method: str
    """Key in METHODS."""
    sigma0: float | None = None
    """Initial standard deviation of IVON's posterior; None for AdamW."""

    @property
    def title(self) -> str:
        """What tables and folders call it."""
        return self.method if self.sigma0 is None else f"{self.method}-sigma{self.sigma0:g}"

    def at(self, lr: float) -> Method:
        """Return the method with a learning rate."""
        if self.sigma0 is None:
            return METHODS[self.method](lr=lr)
        hess_init = 1 / (ESS * self.sigma0**2)
        return METHODS[self.method](lr=lr, ess=ESS, hess_init=hess_init, clip_radius=CLIP_RADIUS)


@dataclass(frozen=True)
class Cell:
    """One training run."""

    variant: Variant
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.variant.title}-lr{self.lr:g}-seed{self.seed}"


class Stopped(Exception):
    """The time is up, or the user wants to stop."""


class Study:
    """Data, model and work folder of one pass over the grid."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work, self.started = args, args.work, time.monotonic()
        self.deadline = math.inf if args.budget_minutes is None else self.started + 60 * args.budget_minutes
        self.model_path = args.model or shared_folder() / "models" / "tinyllama-3m"
        task = get_task(ROOT / "recipes" / "local" / "sst2.yaml")
        data = args.data_dir or shared_folder() / "data"

        def rows(split: str, limit: int | None) -> list[Example]:
            limited = replace(task, limit={split: limit} if limit else {})
            return load_rows(limited, split, data_dir=data).examples

        train = rows("train", args.train_rows)
        trained = {example.id for example in train}  # a larger limit holds the rows of a smaller one
        more = rows("train", args.train_rows + args.calibration_rows)
        calibration = [example for example in more if example.id not in trained]
        dev = rows(task.evaluation, args.dev_rows)
        _, self.tokenizer = load_model(self.model_path, device=DEVICE)
        self.train, self.calibration, self.dev = (self._encode(examples) for examples in (train, calibration, dev))
        # What a stored cell depends on; the grid may change between two calls, this may not.
        self.conditions: dict[str, Any] = {
            "model": Path(self.model_path).name,
            "task": task.name,
            "task_version": task.version,
            "prompt_version": PROMPT_VERSION,
            "rows": {"train": len(train), "calibration": len(calibration), "dev": len(dev)},
            **{key: getattr(args, key) for key in ("steps", "batch_size", "max_length", "samples", "seed")},
            "ess": ESS,
            "clip_radius": CLIP_RADIUS,
        }
        known = self.work / "conditions.json"
        if not known.exists():
            write_json(known, self.conditions)
        elif (before := read_json(known)) != self.conditions:
            differ = sorted(key for key in self.conditions if before.get(key) != self.conditions[key])
            raise SystemExit(
                f"{self.work} holds cells made under other conditions ({', '.join(differ)}). Pass another `--work`, or "
                "delete it."
            )

    def _encode(self, examples: list[Example]) -> list[Encoded]:
        return encode_all(self.tokenizer, examples, self.args.max_length).rows

    # --- cells ---

    def stored(self, cell: Cell, file: str) -> dict[str, Any] | None:
        """Return what is stored of a cell: `training.json` or `dev.json`."""
        path = self.work / cell.name / file
        return read_json(path) if path.exists() else None

    def trained(self, cell: Cell) -> dict[str, Any]:
        """Train a cell, unless it is stored, and evaluate it on the calibration rows, at the mean."""
        known = self.stored(cell, "training.json")
        if known is not None:
            return known
        self._check_time()
        model, _ = load_model(self.model_path, device=DEVICE, seed=cell.seed)
        warnings: list[str] = []
        method: Any = cell.variant.at(cell.lr)
        found: dict[str, Any] = {**asdict(cell), "settings": asdict(method), "steps": self.args.steps}
        started = time.perf_counter()
        try:
            with tempfile.TemporaryDirectory() as run_dir:
                posterior = fit(
                    model,
                    method,
                    self.train,
                    Path(run_dir),
                    pad_token_id=self.tokenizer.pad_token_id,
                    steps=self.args.steps,
                    batch_size=self.args.batch_size,
                    seed=cell.seed,
                    checkpoint_every=10 * self.args.steps,
                    warn=warnings.append,
                )
        except NotFiniteError as error:
            found |= {"failed": str(error), "calibration": None}
        else:
            found["seconds"] = time.perf_counter() - started
            predictions = self._predict(model, posterior, self.calibration, 0)
            found |= {"failed": None, "calibration": evaluate(predictions.probs_mean, predictions.labels)}
            save_adapter(model, posterior, self.work / cell.name / "adapter")
        found |= {"warnings": warnings, "origin": origin()}
        write_json(self.work / cell.name / "training.json", found)  # last: it says that the cell is whole
        calibration = found["calibration"]
        outcome = "failed"
        if calibration:
            outcome = f"calibration accuracy {calibration['accuracy']:.3f}, NLL {calibration['nll']:.3f}"
        self._say(f"trained {cell.name} in {time.perf_counter() - started:.0f} s, {outcome}")
        return found

    def evaluated(self, cell: Cell) -> dict[str, Any] | None:
        """Train a cell and evaluate it on the dev rows, unless that is stored; None if its training failed."""
        if self.trained(cell)["failed"]:
            return None
        known = self.stored(cell, "dev.json")
        if known is not None:
            return known
        self._check_time()
        model, _ = load_model(self.model_path, device=DEVICE, seed=cell.seed)
        posterior = load_posterior(model, self.work / cell.name / "adapter")
        samples = 0 if cell.variant.sigma0 is None else self.args.samples
        started = time.perf_counter()
        predictions = self._predict(model, posterior, self.dev, samples)
        return self._store_dev(cell.name, predictions, samples, started)

    def zero_shot(self) -> dict[str, Any]:
        """Evaluate the base as it is: a fresh adapter changes nothing."""
        path = self.work / "zero-shot" / "dev.json"
        if path.exists():
            return read_json(path)
        self._check_time()
        model, _ = load_model(self.model_path, device=DEVICE)
        untrained = Point({name: p.detach().clone() for name, p in trainable(model).items()})
        started = time.perf_counter()
        return self._store_dev("zero-shot", self._predict(model, untrained, self.dev, 0), 0, started)

    def _predict(self, model: Any, posterior: Posterior, rows: list[Encoded], samples: int) -> Predictions:
        return predict(
            model, posterior, rows, pad_token_id=self.tokenizer.pad_token_id, samples=samples, seed=self.args.seed
        )

    def _store_dev(self, name: str, predictions: Predictions, samples: int, started: float) -> dict[str, Any]:
        spent = time.perf_counter() - started
        save_predictions(predictions, self.work / name / "predictions.safetensors")
        mean = evaluate(predictions.probs_mean, predictions.labels)
        draws = evaluate(predictions.probs, predictions.labels) if samples else None
        found = {"samples": samples, "seconds": spent, "mean": mean, "draws": draws}
        write_json(self.work / name / "dev.json", found)
        best = draws or mean
        self._say(f"evaluated {name} in {spent:.0f} s, dev accuracy {best['accuracy']:.3f}, NLL {best['nll']:.3f}")
        return found

    def _check_time(self) -> None:
        if time.monotonic() >= self.deadline:
            raise Stopped(f"{self.args.budget_minutes:g} minutes are spent")

    def _say(self, text: str) -> None:
        print(f"[{(time.monotonic() - self.started) / 60:5.1f} min] {text}", flush=True)

    # --- the grid ---

    def variants(self) -> list[Variant]:
        """AdamW, then IVON at each scale in the order given."""
        return [Variant("adamw"), *(Variant("ivon", sigma0) for sigma0 in self.args.sigma0)]

    def search(self, variant: Variant) -> list[Cell]:
        """Return the cells of the search for a learning rate."""
        rates = self.args.adamw_lr if variant.sigma0 is None else self.args.ivon_lr
        return [Cell(variant, lr, self.args.seeds[0]) for lr in rates]

    def chosen(self, variant: Variant) -> float | None:
        """Return the rate of best calibration accuracy; None if a cell of the search is missing or all failed."""
        found = {cell.lr: self.stored(cell, "training.json") for cell in self.search(variant)}
        return (
            None if None in found.values() else choose({lr: cell["calibration"] for lr, cell in found.items() if cell})
        )

    def run(self) -> str | None:
        """Work through the grid; return why it ended early, if it did."""
        try:
            self.zero_shot()
            for variant in self.variants():
                for cell in self.search(variant):
                    self.trained(cell)
                if (lr := self.chosen(variant)) is not None:
                    self.evaluated(Cell(variant, lr, self.args.seeds[0]))
            for seed in self.args.seeds[1:]:
                for variant in self.variants():
                    if (lr := self.chosen(variant)) is not None:
                        self.evaluated(Cell(variant, lr, seed))
        except (Stopped, Interrupted, KeyboardInterrupt) as reason:
            return str(reason) or "interrupted"
        return None

    def estimate(self) -> float:
        """Return the seconds that what is not stored will take."""
        steps, passes = 0, 0
        step_seconds: list[float] = []
        row_seconds: list[float] = []
        for variant in self.variants():
            lr = self.chosen(variant)
            models = 1 if variant.sigma0 is None else 1 + self.args.samples
            # Which cell of the search the first seed shares is not known before it is chosen.
            final = [Cell(variant, math.nan if lr is None else lr, seed) for seed in self.args.seeds]
            for cell in {*self.search(variant), *final[1:]}:
                if (known := self.stored(cell, "training.json")) is None:
                    steps += self.args.steps
                elif "seconds" in known:
                    step_seconds.append(known["seconds"] / self.args.steps)
            for cell in final:
                if (known := self.stored(cell, "dev.json")) is None:
                    passes += models * len(self.dev)
                else:
                    row_seconds.append(known["seconds"] / (models * len(self.dev)))
        a_step = statistics.mean(step_seconds) if step_seconds else STEP_SECONDS
        a_row = statistics.mean(row_seconds) if row_seconds else ROW_SECONDS
        return steps * a_step + passes * a_row

    def summary(self) -> dict[str, Any]:
        """Return the table's rows, what is missing, and times, all from what is stored."""
        rows: list[dict[str, Any]] = []
        missing: list[str] = []
        seconds: dict[str, list[float]] = {"adamw": [], "ivon": []}
        commits: set[str | None] = set()
        for variant in self.variants():
            lr, search = self.chosen(variant), self.search(variant)
            found = {cell: self.stored(cell, "training.json") for cell in search}
            missing += [cell.name for cell, known in found.items() if known is None]
            cells = [Cell(variant, lr, seed) for seed in self.args.seeds] if lr is not None else []
            found |= {cell: self.stored(cell, "training.json") for cell in cells}
            for known in found.values():
                if known:
                    commits.add(known["origin"]["commit"])
                    if "seconds" in known:
                        seconds[variant.method].append(known["seconds"])
            failed = [cell.name for cell, known in found.items() if known and known["failed"]]
            dev = {cell.seed: self.stored(cell, "dev.json") for cell in cells if cell.name not in failed}
            missing += [f"{variant.title}-seed{seed}: dev" for seed in self.args.seeds if dev.get(seed) is None]
            row: dict[str, Any] = {
                "variant": variant.title,
                **asdict(variant),
                "lr": lr,
                "lr_at_the_edge": None if lr is None else lr in (min(c.lr for c in search), max(c.lr for c in search)),
                "search": [
                    {"lr": c.lr, "calibration": known and known["calibration"]}
                    for c, known in found.items()
                    if c in search
                ],
                "failed": failed,
                "seeds": [seed for seed, known in dev.items() if known],
            }
            for at in ("mean", "draws"):
                every = [known[at] for known in dev.values() if known and known[at]]
                row[at] = {key: _mean_and_error([one[key] for one in every]) for key in METRICS} if every else None
                row[f"{at}_by_seed"] = every
            rows.append(row)
        zero_shot = self.work / "zero-shot" / "dev.json"
        return {
            "zero_shot": read_json(zero_shot)["mean"] if zero_shot.exists() else None,
            "rows": rows,
            "missing": missing,
            "training_seconds": {
                name: {"mean": statistics.mean(values), "runs": len(values)}
                for name, values in seconds.items()
                if values
            },
            "commits": sorted(map(str, commits)),
        }


def choose(calibration: Mapping[float, Mapping[str, float] | None]) -> float | None:
    """Return the rate of highest calibration accuracy, of equal ones that of lowest NLL; failures are None."""
    scores = {lr: (metrics["accuracy"], -metrics["nll"]) for lr, metrics in calibration.items() if metrics is not None}
    return max(scores, key=scores.__getitem__) if scores else None


def _mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": statistics.mean(values),
        "standard_error": standard_error(values) if len(values) > 1 else None,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = _parser().parse_args(argv)
    set_up(args)
    disable_progress_bar()
    study = Study(args)
    rows = study.conditions["rows"]
    print(
        f"{rows['train']} training, {rows['calibration']} calibration and {rows['dev']} dev rows; "
        f"cells in {study.work}; about {study.estimate() / 60:.0f} minutes to go",
        flush=True,
    )
    reason = study.run()
    found = {"complete": reason is None, "stopped": reason, "conditions": study.conditions, **study.summary()}
    _print(found)
    write_result(args.out, "quality", args, DEVICE, **found)
    return found


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__, "quality")
    add = made.add_argument
    add("--work", type=Path, default=ROOT / "runs" / "quality", help="folder of the cells (default: %(default)s)")
    add("--budget-minutes", type=float, help="start no cell after so many minutes")
    add("--model", help="folder or hub name (default: tinyllama-3m of the shared folder)")
    add("--data-dir", type=Path, help="folder that holds sst2/ (default: data of the shared folder)")
    add("--seeds", type=int, nargs="+", default=[21, 42, 87], help="the first one is used to choose rates")
    add("--adamw-lr", type=float, nargs="+", default=[1e-4, 5e-4, 2e-3], help="default: %(default)s")
    add("--ivon-lr", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="for each sigma0; default: %(default)s")
    add("--sigma0", type=float, nargs="+", default=[0.03, 0.06, 0.01, 0.1], help="in this order; default: %(default)s")
    add("--steps", type=count, default=2000, help="optimizer steps a cell (default: %(default)s)")
    add("--batch-size", type=count, default=4, help="rows a step (default: %(default)s)")
    add("--max-length", type=count, default=256, help="tokens a row (default: %(default)s)")
    add("--train-rows", type=count, default=1000, help="default: %(default)s")
    add("--calibration-rows", type=count, default=1000, help="others of the training split (default: %(default)s)")
    add("--dev-rows", type=count, help="fewer dev rows, for a trial (default: all)")
    add("--samples", type=count, default=10, help="draws (default: %(default)s)")
    return made


def _print(found: dict[str, Any]) -> None:
    rows = []
    if found["zero_shot"]:
        rows.append(["zero-shot", "", "", *(f"{value:.2f}" for value in _scaled(found["zero_shot"]).values())])
    for row in found["rows"]:
        for at, label in (("mean", "at the mean"), ("draws", f"{found['conditions']['samples']} draws")):
            if row[at]:
                values = _scaled({key: value["mean"] for key, value in row[at].items()})
                errors = _scaled({key: value["standard_error"] or 0.0 for key, value in row[at].items()})
                cells = [f"{values[key]:.2f} ± {errors[key]:.2f}" for key in METRICS]
                edge = " (edge)" if row["lr_at_the_edge"] else ""
                rows.append(
                    [f"{row['variant']}, {label}", f"{row['lr']:g}{edge}", str(len(row[f"{at}_by_seed"])), *cells]
                )
    title = f"SST-2, {found['conditions']['rows']['dev']} dev rows; ± is the standard error over seeds"
    print_table(title, ["", "lr", "seeds", "ACC %", "ECE %", "NLL", "Brier"], rows)
    for name, spent in found["training_seconds"].items():
        print(f"{name}: {spent['mean']:.0f} s a training run (mean of {spent['runs']})")
    if found["missing"]:
        print(f"missing ({found['stopped'] or 'not trained'}): {', '.join(found['missing'])}")
    for row in found["rows"]:
        if row["failed"]:
            print(f"failed: {', '.join(row['failed'])}")
    if len(found["commits"]) > 1:
        print(f"the cells are of several commits: {', '.join(found['commits'])}")


def _scaled(metrics: Mapping[str, float]) -> dict[str, float]:
    """Accuracy and ECE in per cent."""
    return {key: metrics[key] * (100 if key in ("accuracy", "ece") else 1) for key in METRICS}


if __name__ == "__main__":
    main()
