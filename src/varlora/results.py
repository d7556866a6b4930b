"""What evaluated runs say: their saved predictions, grouped over seeds, as rows of numbers.

The metrics are computed from the predictions anew. Runs that differ by seed only are one group, with mean and standard
error over seeds. A group has a row at the posterior mean (`ivon@mean`) and one of its averaged draws (`ivon x10`);
where there is nothing to draw from (`adamw`) it has one row. Where a task names a field to slice its rows by, each
slice's accuracy is shown beside its confidence.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlora import metrics
from varlora.drawing import Drawing
from varlora.errors import VarloraError
from varlora.evaluated import COUNTS, EvaluatedRun, Skipped, same_base
from varlora.files import read_json
from varlora.methods import METHODS

__all__ = ["Row", "Slice", "Stat", "origin_cells", "rows_of_runs", "without_tau"]

NOT_METHOD = frozenset({"seed", "data_dir", "run_dir", "run_name", "checkpoint_every", "sources"})
"""Settings in which runs of one group may differ: the seed, and where a run reads and is written."""
EVALUATED = ("split", "tau", "samples", *(of.name for of in dataclasses.fields(Drawing)))
"""What predictions say of how they were made; runs of one group are alike in it."""
USUAL = {"tau": "1.0", "noise": "independent", "last_layers": None, "tolerance": None}
"""How predictions are made where nothing else is asked for; what differs stands beside a method's name."""
MAX_SLICES = 12  # a field with more values divides the rows too finely to look at
SAME = 1e-4  # probabilities that differ less are the same model's, summed in another order
SLICE_METRICS = (("accuracy", 100, 1), ("confidence", 100, 1), ("nll", 1, 3))  # name, factor, decimals


@dataclass(frozen=True)
class Stat:
    """A metric over the seeds of a group."""

    values: tuple[float, ...]
    """One value for each seed."""

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return math.fsum(self.values) / len(self.values)

    @property
    def stderr(self) -> float:
        """Standard error over seeds; NaN for one seed, or where a value is NaN."""
        return metrics.standard_error(self.values) if math.isfinite(self.mean) else math.nan

    def text(self, factor: float, decimals: int) -> str:
        """Return `mean ± standard error`, the value alone for one seed, or – where a seed has no value."""
        if not math.isfinite(self.mean):
            return "–"
        error = "" if math.isnan(self.stderr) else f" ± {factor * self.stderr:.{decimals}f}"
        return f"{factor * self.mean:.{decimals}f}{error}"


@dataclass(frozen=True, eq=False)
class Slice:
    """A part of a row's data: how sure the method is there, and how right."""

    name: str
    """Value of the field that the task slices by."""
    stats: Mapping[str, Stat]
    """accuracy and confidence from 0 to 1, nll in nats."""
    confidence: Tensor
    """(N,) probability of the likeliest answer, all seeds pooled."""
    size: str
    """Number of rows, as a range where it differs between seeds."""

    @property
    def texts(self) -> list[str]:
        """Name, size, accuracy and confidence in %, and nll, as tables show them."""
        numbers = (self.stats[name].text(factor, decimals) for name, factor, decimals in SLICE_METRICS)
        return [self.name, self.size, *numbers]


@dataclass(frozen=True, eq=False)
class Row:
    """A line of the table: a method on a task, at the mean or with draws, over seeds."""

    task: str
    """Task that was evaluated."""
    label: str
    """What the table calls the method, such as `ivon@mean` or `ivon x10`."""
    differs: str
    """Settings that tell this row from others of the same task and method, such as `lr=0.1`; often empty."""
    draws: int
    """Draws whose probabilities were averaged; 0 at the mean."""
    stats: Mapping[str, Stat]
    """accuracy, nll, ece, brier, adaptive_ece, auroc, aurc, each from 0 to 1 except nll (nats) and brier (0 to 2); NaN
    where a seed has none: auroc if all its answers are right, or all wrong."""
    reliability: metrics.Reliability
    """Bins of confidence, all seeds pooled."""
    runs: tuple[EvaluatedRun, ...]
    """The runs, one for each seed, ordered by seed."""
    tempered: bool = False
    """Whether the logits are divided by a temperature that was fitted on held-out rows."""
    calibrated: bool = False
    """Whether the posterior is used as `varlora calibrate` chose on held-out rows."""
    slices: tuple[Slice, ...] = ()
    """Parts of the data, in the order of their names; none where the task does not slice."""

    @property
    def method(self) -> str:
        """Key of the method in METHODS."""
        return str(self.runs[0].settings["method"])

    @property
    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """For each seed the probabilities (N, C) and labels (N,) of the rows with a known label."""
        return [
            (run.probs(self.draws > 0, self.tempered)[run.known], run.predictions.labels[run.known])
            for run in self.runs
        ]

    @property
    def several(self) -> bool:
        """Whether there are several seeds."""
        return len(self.runs) > 1

    @property
    def size(self) -> str:
        """Number of rows with a known label, as a range where it differs between seeds."""
        return _range([int(run.known.sum()) for run in self.runs])


# --- verbs


def rows_of_runs(
    runs: Sequence[EvaluatedRun], bins: int = 10, rule: metrics.Rule = "right"
) -> tuple[list[Row], list[Skipped], list[str]]:
    """Return the rows, ordered by task and method; the runs that repeat another; and notes on the numbers.

    Rows at the mean of what builds on another method are left out, and noted, where they repeat another row: the mean
    of MC dropout is AdamW, that of SWAG is SWA, and an ensemble of points has no other mean than its average.
    """
    known = _known_facts(runs)
    groups, repeated = _groups(runs, known)
    texts = _differences(groups, known)
    calibrated = _of_calibrated(groups, texts)
    rows = [
        row for group, *told in zip(groups, texts, calibrated) for row in _rows(group, told[0], told[1], bins, rule)
    ]
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.label, row.differs), []).append(row)
    notes = []
    for name, line in lines.items():
        others = [other for other in rows if (other.label, other.differs) != name]
        same = [next((other for other in others if _repeats(row, other)), None) for row in line]
        if all(same):
            rows = [row for row in rows if row not in line]
            notes.append(f"{name[0]} repeats {', '.join(sorted({other.label for other in same if other}))}: left out.")
    return rows, repeated, notes + _notes(groups)


def _repeats(row: Row, other: Row) -> bool:
    """Whether a row at the mean of what builds on another method has that one's answers, or those of its own draws."""
    made = METHODS.get(row.method)
    builds = made is not None and made.concludes_from + made.continues_from
    rival = other.draws == 0 or other.method == row.method
    if not (builds and "@mean" in row.label and rival) or (other.task, other.tempered) != (row.task, row.tempered):
        return False
    theirs = {run.settings["seed"]: run for run in other.runs}
    for run in row.runs:
        its = theirs.get(run.settings["seed"])
        if its is None or its.predictions.ids != run.predictions.ids:
            return False
        a, b = run.probs(False, row.tempered), its.probs(other.draws > 0, row.tempered)
        tolerance = SAME if other.draws == 0 else 1e-6  # draws that are close are draws all the same
        if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=tolerance):
            return False
    return True


def origin_cells(run: EvaluatedRun) -> list[Any]:
    """Return where a run's numbers come from: run, task, method, split, seed, tau, draws, version, commit."""
    return [
        str(run.run),
        run.meta["task"],
        run.settings["method"],
        run.meta["split"],
        run.settings["seed"],
        run.meta["tau"],
        run.meta["samples"],
        (run.config.get("versions") or {}).get("varlora", "-"),
        str(run.config.get("commit") or "-")[:12],
    ]


# --- grouping


Kind = tuple[str, str]
"""The task that a run was evaluated on, and its method."""


def _kind(run: EvaluatedRun) -> Kind:
    return run.meta["task"], str(run.settings["method"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings by which runs are told apart; nested ones by dotted name."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if key in NOT_METHOD:
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else json.dumps(value)
    return found


def _facts(run: EvaluatedRun) -> dict[str, dict[str, str]]:
    """Return what runs are told apart by beside their settings, as far as config.json has it: older ones have less."""
    config, own = run.config, _flat(run.settings)
    base, _, scales = str(config.get("base") or "").partition("-")
    checksums = {"base": base, "scales": scales, "data": str(config.get("data") or "")}
    found = {name: {name: checksum[:12]} for name, checksum in checksums.items() if checksum}
    if config.keys() >= {*COUNTS}:  # how many are held out depends on the seed, their sum on the data alone
        found["rows"] = {"training and held-out rows": str(sum(config[name] for name in COUNTS))}
    sources = config.get("concluded_from") or []
    if sources and all("settings" in source for source in sources):
        each = [
            {name: value for name, value in _source_settings(source).items() if own.get(name) != value}
            for source in sources
        ]
        several = {"members' runs": json.dumps(each, sort_keys=True)}
        found["sources"] = several if len(each) > 1 else {f"on.{name}": value for name, value in each[0].items()}
    return found


def _source_settings(source: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a run that another builds on, and of what it builds on itself; not where things lay."""
    settings = {name: value for name, value in source.get("settings", {}).items() if name not in ("model", "task")}
    found = _flat({**settings, "method_settings": source["method_settings"]})
    for below in source.get("concluded_from") or []:
        found |= {f"on.{name}": value for name, value in _source_settings(below).items()}
    return found


def _known_facts(runs: Iterable[EvaluatedRun]) -> dict[Kind, set[str]]:
    """Return by which facts runs can be told apart: what is known of each one of the same task and method."""
    known: dict[Kind, set[str]] = {}
    for run in runs:
        facts = {*_facts(run)}
        known[_kind(run)] = known.get(_kind(run), facts) & facts
    return known


def _traits(run: EvaluatedRun, known: Mapping[Kind, Collection[str]]) -> dict[str, str]:
    """Return all by which a run is told from others, apart from its seed."""
    origin = {key: str(run.config.get(key)) for key in ("task_version", "prompt_version")}
    if len(members := run.config.get("concluded_from") or []) > 1:  # an ensemble
        origin["members"] = "+".join(member["method"] for member in members)
        origin["members' settings"] = json.dumps([member["method_settings"] for member in members])
    for name, facts in _facts(run).items():
        origin |= facts if name in known[_kind(run)] else {}
    evaluated = {key: run.meta[key] for key in EVALUATED if key in run.meta}
    moved = {name for name, fact in (("model", "base"), ("task", "data")) if fact in known[_kind(run)]}
    settings = {name: value for name, value in _flat(run.settings).items() if name not in moved}
    return {**settings, "task evaluated": run.meta["task"], **evaluated, **origin}


def _groups(
    runs: Iterable[EvaluatedRun], known: Mapping[Kind, Collection[str]]
) -> tuple[list[list[EvaluatedRun]], list[Skipped]]:
    """Return the runs by what they have in common, each group ordered by seed, and the repetitions left out."""
    groups: dict[tuple[str, ...], dict[str, EvaluatedRun]] = {}
    repeated = []
    for run in runs:
        key = (*_kind(run), json.dumps(_traits(run, known), sort_keys=True))
        seed = json.dumps(run.settings["seed"])
        first = groups.setdefault(key, {}).setdefault(seed, run)
        if first is not run:  # counted twice it would make the standard error too small
            same = f"same settings, same seed {seed}"
            if run.config.get("rows") != first.config.get("rows"):
                same += " and as many rows, though other ones; report on them apart"
            repeated.append(Skipped(str(run.run), f"repeats {first.run}: {same}"))
    ordered = [groups[key] for key in sorted(groups)]
    return [[group[seed] for seed in sorted(group, key=lambda s: (len(s), s))] for group in ordered], repeated


def _differences(groups: Sequence[Sequence[EvaluatedRun]], known: Mapping[Kind, Collection[str]]) -> list[str]:
    """Return for each group the traits that tell it from others, and how it was evaluated if not as usual.

    It is told from those of its task and method; by its split from those of its task, by its model from all.
    """
    firsts = [group[0] for group in groups]
    traits = [_traits(run, known) | {"model": str(run.settings["model"])} for run in firsts]
    found = []
    for mine, run in zip(traits, firsts):
        rivals = [(t, other) for t, other in zip(traits, firsts) if other.meta["task"] == run.meta["task"]]
        same = [t for t, other in rivals if _kind(other) == _kind(run)]
        names = {"split"} if any(t["split"] != mine["split"] for t, _ in rivals) else set()
        names |= {n for t in same for n in {*t, *mine} if t.get(n) != mine.get(n)} - {"model", "base"}
        for other in firsts:
            if not same_base(run, other):
                names.add("model" if other.settings["model"] != run.settings["model"] else "base")
        names |= {n for n, usual in USUAL.items() if mine.get(n, usual) != usual}
        told = {
            name: _end_of_path(mine.get(name, "unset"), {t.get(name, "") for t in traits}) for name in sorted(names)
        }
        found.append(", ".join(f"{name.removeprefix('method_settings.')}={value}" for name, value in told.items()))
    return found


def _of_calibrated(groups: Sequence[Sequence[EvaluatedRun]], texts: Sequence[str]) -> list[str]:
    """Return what tells the groups' calibrated rows apart: τ does not, unless they are not told apart without it."""
    told = [(_kind(group[0]), without_tau(text)) for group, text in zip(groups, texts)]
    return [of[1] if told.count(of) == 1 else text for of, text in zip(told, texts)]


def without_tau(differs: str) -> str:
    """Return what tells a row from others, but for the factor of the variance."""
    return ", ".join(part for part in differs.split(", ") if not part.startswith("tau="))


def _end_of_path(value: str, values: Collection[str]) -> str:
    """Return as much of the end of an absolute path as tells it from others; all else as it is."""
    parts = Path(value).parts
    if not Path(value).is_absolute():
        return value
    ends = ("/".join(parts[-n:]) for n in range(1, len(parts)))
    others = [f"/{other}" for other in values if other != value]
    return next((end for end in ends if not any(other.endswith(f"/{end}") for other in others)), value)


def _rows(
    group: Sequence[EvaluatedRun], differs: str, differs_calibrated: str, bins: int, rule: metrics.Rule
) -> Iterable[Row]:
    method = str(group[0].settings["method"])
    drawn = any(run.drawn for run in group)
    names = _slice_names(group)
    names = names if len(names) <= MAX_SLICES else []
    parts = [_known_slices(run) for run in group]
    # Draws that all equal the mean come from a point; without draws the adapter's kind of posterior says.
    point = not drawn and all(int(run.meta["samples"]) > 0 or _is_point(run.run) for run in group)
    variants = [(method if point else f"{method}@mean", 0, False, group)]
    if drawn:
        samples = len(group[0].predictions.logits)
        variants.append((f"{method} x{samples}", samples, False, group))
    if all(run.predictions.temperatures for run in group):
        variants = [
            one
            for label, draws, _, runs in variants
            for one in ((label, draws, False, runs), (f"{label} +T", draws, True, runs))
        ]
    tuned = [run for run in map(EvaluatedRun.calibrated, group) if run is not None]
    if len(tuned) == len(group):
        variants.append((f"{method} calibrated", max(int(run.meta["samples"]) for run in tuned), False, tuned))
    for label, draws, tempered, runs in variants:
        labels = [run.predictions.labels[run.known] for run in runs]
        probs = [run.probs(draws > 0, tempered)[run.known] for run in runs]
        values = [metrics.evaluate_all(p, y, bins, rule) for p, y in zip(probs, labels)]
        width = max(p.shape[1] for p in probs)
        pooled = torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in probs])
        yield Row(
            task=group[0].meta["task"],
            label=label,
            differs=differs_calibrated if runs is tuned else differs,
            draws=draws,
            stats={name: Stat(tuple(value[name] for value in values)) for name in values[0]},
            reliability=metrics.reliability(pooled, torch.cat(labels), bins, rule),
            runs=tuple(runs),
            tempered=tempered,
            calibrated=runs is tuned,
            slices=tuple(_slice(name, parts, probs, labels) for name in names),
        )


def _slice_names(group: Sequence[EvaluatedRun]) -> list[str]:
    return sorted({part for run in group for part in _known_slices(run) if part})


def _known_slices(run: EvaluatedRun) -> list[str]:
    """Return the slice of each row with a known label; empty texts where the rows are not sliced."""
    slices = run.predictions.slices or ("",) * len(run.known)
    return [part for part, known in zip(slices, run.known.tolist()) if known]


def _slice(name: str, parts: Sequence[Sequence[str]], probs: Sequence[Tensor], labels: Sequence[Tensor]) -> Slice:
    """Return one slice; `parts`, `probs` and `labels` are of the rows with a known label, one entry for each seed."""
    confidence, values, sizes = [], [], []
    for of_rows, all_probs, all_labels in zip(parts, probs, labels):
        inside = torch.tensor([part == name for part in of_rows])
        p, y = all_probs[inside], all_labels[inside]
        sure = p.amax(dim=1)
        confidence.append(sure)
        sizes.append(len(sure))
        if len(sure):
            right, nll = metrics.accuracy(p, y), metrics.nll(p, y)
            values.append({"accuracy": right, "confidence": sure.mean().item(), "nll": nll})
    stats = {key: Stat(tuple(value[key] for value in values)) for key, _, _ in SLICE_METRICS}
    return Slice(name, stats, torch.cat(confidence), _range(sizes))


def _range(sizes: Sequence[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}-{high}"


def _is_point(run_dir: Path) -> bool:
    try:
        config = read_json(run_dir / "adapter" / "posterior_config.json")
    except VarloraError:  # without the adapter's files the predictions still stand
        return False
    return isinstance(config, Mapping) and config.get("kind") == "point"


def _asked(run: EvaluatedRun, told: bool) -> frozenset[tuple[str, int, str]]:
    """Return the rows that a run was evaluated on: id, label and, if `told`, what is asked."""
    predictions = run.predictions
    prompts = predictions.prompts if told else ("",) * len(predictions.ids)
    return frozenset(zip(predictions.ids, predictions.labels.tolist(), prompts))


def _notes(groups: Sequence[Sequence[EvaluatedRun]]) -> list[str]:
    notes = []
    for group in groups:
        for run in group:
            unknown = int((~run.known).sum())
            if unknown:
                notes.append(f"{run.run}: {unknown} of {len(run.known)} rows have no label and are left out.")
        name = f"{group[0].meta['task']}, {group[0].settings['method']}"
        told = all(run.predictions.prompts for run in group)  # predictions of older versions are without prompts
        if len({_asked(run, told) for run in group}) > 1:
            notes.append(f"{name}: the seeds were evaluated on different rows.")
        for what, there in (
            ("temperature", [run.predictions.temperatures is not None for run in group]),
            ("calibrated posterior", [run.tuned is not None for run in group]),
        ):
            lacking = [str(run.run) for run, has in zip(group, there) if not has]
            if 0 < len(lacking) < len(group):
                without = f"{name}: not shown with a {what}, as {', '.join(lacking)} was not evaluated with one."
                notes.append(f"{without} Run `varlora evaluate --calibrate` on it.")
        slices = len(_slice_names(group))
        if slices > MAX_SLICES:
            task = group[0].meta["task"]
            notes.append(f"{task}: its {slices} slices are not shown; up to {MAX_SLICES} are.")
    return notes
