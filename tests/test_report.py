"""Reports from run directories that are written here by hand."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from varlora.curves import training
from varlora.errors import DamagedFileError, VarloraError
from varlora.evaluated import Skipped, read_run, read_runs
from varlora.files import load_tensors, save_tensors
from varlora.report import build_report, to_table
from varlora.results import Row, rows_of_runs
from varlora.tables import table1
from varlora.typeset import to_markdown


def write_run(
    folder: Path,
    task: str = "arc_easy",
    method: str = "ivon",
    seed: int = 21,
    n: int = 60,
    c: int = 4,
    samples: int = 10,
    evaluated: str | None = None,
    tau: float = 1.0,
    unknown: int = 0,
    commit: str | None = "0123456789abcdef",
    **settings: object,
) -> Path:
    """Write a run directory; the draws of adamw are its mean. The last answer of every third row is masked."""

    def seeded(text: str) -> torch.Generator:
        return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 2**31)

    generator = seeded(f"{task}{method}{seed}")
    mask = torch.ones(n, c, dtype=torch.bool)
    mask[::3, -1] = c <= 2
    mean = (2 * torch.randn(n, c, generator=generator)).masked_fill(~mask, -math.inf)
    drawn = torch.multinomial(mean.softmax(1), 1, generator=generator)[:, 0]
    labels = torch.randint(max(c - 1, 2), (n,), generator=seeded(task))  # of the task, so of all its runs
    for row, one, other in zip(mean, drawn.tolist(), labels.tolist()):
        row[[one, other]] = row[[other, one]]
    labels[:unknown] = -1
    logits = mean.expand(max(samples, 1), n, c).clone()
    if method != "adamw" and samples:
        logits += torch.randn(logits.shape, generator=generator)
    folder.mkdir(parents=True)
    metadata = {
        "ids": json.dumps([f"row-{i}" for i in range(n)]),
        "task": evaluated or task,
        "split": "dev",
        "seed": "0",
        "tau": str(tau),
        "samples": str(samples),
    }
    tensors = {"logits": logits, "logits_mean": mean, "mask": mask, "labels": labels}
    save_file(tensors, folder / "predictions.safetensors", metadata=metadata)
    config = {
        "settings": {"task": task, "model": "tiny", "method": method, "seed": seed, "run_dir": str(folder), **settings},
        "versions": {"varlora": "0.1.0", "torch": "2.6.0"},
        "commit": commit,
        "task_version": "1",
        "prompt_version": "1",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def told(run_dirs: Sequence[Path]) -> SimpleNamespace:
    """What a report tells of runs, without the pictures, which take the time."""
    runs, skipped = read_runs(run_dirs)
    rows, repeated, notes = rows_of_runs(runs)
    return SimpleNamespace(rows=rows, skipped=[*skipped, *repeated], notes=tuple(notes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / f"{task}-{method}-{seed}", task, method, seed)
        for task in ("arc_easy", "openbookqa")
        for method in ("adamw", "ivon")
        for seed in (21, 42, 87)
    ]


@pytest.fixture(scope="module")
def built(runs, tmp_path_factory):
    return build_report(runs, tmp_path_factory.mktemp("out"))


def text_of(report, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(to_table(report))
    return console.export_text()


def damage(run: Path, change) -> None:
    path = run / "predictions.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    path.unlink()
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


# --- numbers


def test_rows_are_methods_at_the_mean_and_with_draws(built):
    assert [(row.task, row.label, row.draws) for row in built.rows] == [
        (task, label, draws)
        for task in ("arc_easy", "openbookqa")
        for label, draws in (("adamw", 0), ("ivon@mean", 0), ("ivon x10", 10))
    ]
    assert all(len(row.runs) == 3 for row in built.rows)
    assert not built.skipped
    assert not built.notes


def test_numbers_agree_with_scikit_learn_and_scipy(runs, built):
    for row in built.rows:
        accuracies, losses, briers, eces, aurocs, aurcs = [], [], [], [], [], []
        for run in row.runs:
            tensors = load_file(run.run / "predictions.safetensors")
            logits = tensors["logits"] if row.draws else tensors["logits_mean"][None]
            probs = scipy.special.softmax(logits.double().numpy(), axis=-1).mean(0)
            y = tensors["labels"].numpy()
            accuracies.append(accuracy_score(y, probs.argmax(1)))
            losses.append(log_loss(y, probs / probs.sum(1, keepdims=True), labels=range(4)))
            briers.append(((probs - np.eye(4)[y]) ** 2).sum(1).mean())
            confidence, right = probs.max(1), probs.argmax(1) == y
            bins = np.ceil(confidence * 10)
            eces.append(sum(abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(1, 11)) / len(y))
            aurocs.append(roc_auc_score(right, confidence))
            order = np.argsort(-confidence, kind="stable")
            aurcs.append((np.cumsum(~right[order]) / np.arange(1, len(y) + 1)).mean())
        found = (accuracies, losses, briers, eces, aurocs, aurcs)
        for name, values in zip(("accuracy", "nll", "brier", "ece", "auroc", "aurc"), found):
            assert row.stats[name].values == pytest.approx(values, rel=1e-9), name
            assert row.stats[name].mean == pytest.approx(np.mean(values))
            assert row.stats[name].stderr == pytest.approx(scipy.stats.sem(values))


def test_reliability_pools_the_rows_of_all_seeds(built):
    for row in built.rows:
        assert row.reliability.count.sum() == 3 * 60


def test_bins_are_passed_on(runs, tmp_path):
    one = build_report(runs[:1], tmp_path, bins=1)
    ece = one.rows[0].stats["ece"].mean
    tensors = load_file(runs[0] / "predictions.safetensors")
    confidence = scipy.special.softmax(tensors["logits_mean"].double().numpy(), axis=-1).max(1)
    assert ece == pytest.approx(abs(confidence.mean() - one.rows[0].stats["accuracy"].mean))
    assert json.loads((tmp_path / "report.json").read_text())["ece"] == {
        "bins": 1,
        "rule": "right",
        "intervals": "(lo, hi]",
    }
    with pytest.raises(VarloraError, match="`bins`"):
        build_report(runs[:1], tmp_path, bins=0)


def test_one_seed_has_no_standard_error(runs, tmp_path):
    report = build_report(runs[:1], tmp_path)
    assert "±" not in (tmp_path / "report.md").read_text()
    row = json.loads((tmp_path / "report.json").read_text())["rows"][0]
    assert row["metrics"]["nll"]["stderr"] is None
    assert row["metrics"]["nll"]["mean"] == report.rows[0].stats["nll"].mean


def test_without_draws_a_posterior_has_its_mean_and_a_point_its_name(tmp_path):
    ivon = write_run(tmp_path / "ivon", samples=0)
    adamw = write_run(tmp_path / "adamw", method="adamw", samples=0)
    (adamw / "adapter").mkdir()
    (adamw / "adapter" / "posterior_config.json").write_text('{"kind": "point"}')
    report = told([ivon, adamw])
    assert [row.label for row in report.rows] == ["adamw", "ivon@mean"]


def test_one_draw_is_not_the_mean(tmp_path):
    report = told([write_run(tmp_path / "run", samples=1)])
    assert [(row.label, row.draws) for row in report.rows] == [("ivon@mean", 0), ("ivon x1", 1)]


# --- groups


def test_settings_tell_groups_apart_and_are_shown(tmp_path):
    runs = [
        write_run(tmp_path / f"{lr}-{seed}", seed=seed, optimizer={"lr": lr, "run_name": str(seed)})
        for lr in (0.1, 0.3)
        for seed in (1, 2)
    ]
    report = build_report(runs, tmp_path / "out")
    assert [(row.label, row.differs, len(row.runs)) for row in report.rows] == [
        ("ivon@mean", "optimizer.lr=0.1", 2),
        ("ivon x10", "optimizer.lr=0.1", 2),
        ("ivon@mean", "optimizer.lr=0.3", 2),
        ("ivon x10", "optimizer.lr=0.3", 2),
    ]
    assert "optimizer.lr=0.3" in text_of(report)
    assert "| ivon@mean | optimizer.lr=0.1 | 2 |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("change", [{"tau": 0.5}, {"samples": 5}, {"model": "other"}, {"evaluated": "openbookqa"}])
def test_what_was_evaluated_tells_groups_apart(tmp_path, change):
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2, **change)]
    report = told(runs)
    assert [len(row.runs) for row in report.rows] == [1, 1, 1, 1]
    if "evaluated" in change:
        assert [row.task for row in report.rows] == ["arc_easy", "arc_easy", "openbookqa", "openbookqa"]
    else:
        assert all(next(iter(change)) in row.differs for row in report.rows)


def test_another_model_is_named_across_methods(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", method="adamw", model="other")]
    assert [row.differs for row in told(runs).rows] == [
        "model=other",
        "model=tiny",
        "model=tiny",
    ]


def test_a_run_given_twice_counts_once_and_a_repeated_seed_is_skipped(tmp_path):
    first, again = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    report = told([first, first, tmp_path / "x" / ".." / "a", again])
    assert [len(row.runs) for row in report.rows] == [1, 1]
    assert [skip.run for skip in report.skipped] == [str(again)]
    assert "same seed 21" in report.skipped[0].reason


def test_order_of_the_arguments_does_not_matter(runs, tmp_path):
    for name, order in (("a", runs), ("b", runs[::-1])):
        build_report(order, tmp_path / name)
    for name in ("report.html", "report.md", "report.json", "table1.tex", "reliability.png", "reliability.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_unknown_labels_are_left_out_and_noted(tmp_path):
    report = build_report([write_run(tmp_path / "a", unknown=10)], tmp_path / "out")
    assert report.rows[0].size == "50"
    assert report.rows[0].reliability.count.sum() == 50
    assert "10 of 60 rows have no label" in (tmp_path / "out" / "report.md").read_text()


def test_seeds_evaluated_on_different_rows_are_noted(tmp_path):
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2, n=50)]
    report = told(runs)
    assert report.rows[0].size == "50-60"
    assert report.notes == ("arc_easy, ivon: the seeds were evaluated on different rows.",)


def test_seeds_of_which_one_stored_no_prompts_have_the_same_rows(tmp_path):
    """Predictions of older versions are without texts."""
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2)]
    tensors, meta = load_tensors(runs[1] / "predictions.safetensors")
    prompts = [f"Question {i}?" for i in range(60)]
    save_tensors(runs[1] / "predictions.safetensors", tensors, {**meta, "prompts": json.dumps(prompts)})
    assert told(runs).notes == ()


def test_of_paths_that_differ_only_the_end_is_shown_that_tells_them_apart(tmp_path):
    models = ["/home/me/llms/tiny", "/home/me/old/tiny", "/home/me/llms/large", "org/large"]
    runs = [write_run(tmp_path / str(i), model=model) for i, model in enumerate(models)]
    report = build_report(runs, tmp_path / "out")
    shown = {row.differs for row in report.rows}
    assert shown == {"model=llms/tiny", "model=old/tiny", "model=llms/large", "model=org/large"}
    assert "/home/me" not in (tmp_path / "out" / "report.md").read_text()


def test_a_file_of_somebody_elses_is_not_replaced(runs, tmp_path):
    build_report(runs[:1], tmp_path)
    build_report(runs[:2], tmp_path)  # its own are
    (tmp_path / "mine").mkdir()
    for name, text in (("report.md", "mine"), ("report.json", "[1]")):
        (tmp_path / "mine" / name).write_text(text)
        with pytest.raises(VarloraError, match=r"has a file report.*, but no earlier report, so it is not replaced"):
            build_report(runs[:1], tmp_path / "mine")
        assert (tmp_path / "mine" / name).read_text() == text


def test_pictures_of_somebody_elses_are_not_replaced(runs, tmp_path):
    (tmp_path / "slices.png").write_text("mine")
    with pytest.raises(VarloraError, match=r"has a file slices\.png, but no earlier report, so it is not replaced"):
        build_report(runs[:1], tmp_path)
    assert (tmp_path / "slices.png").read_text() == "mine"


def rows_of(*runs: Path) -> list[Row]:
    return told(runs).rows


def test_runs_on_other_weights_are_not_seeds_of_one_method(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    together = rows_of(*runs)
    for number, run in enumerate(runs):
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, "base": f"checksum {number}"}))
    assert len(rows_of(*runs)) == 2 * len(together)


def configured(run: Path, **changes: object) -> Path:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, **changes}))
    return run


def test_runs_on_other_training_rows_are_not_seeds_of_one_method(tmp_path):
    """As far as both know them, whatever a run of another method knows."""
    runs = [configured(write_run(tmp_path / str(seed), seed=seed), data="abc" * seed) for seed in (1, 2)]
    older = write_run(tmp_path / "adamw", method="adamw")
    lines = {row.differs for row in rows_of(*runs, older) if row.method == "ivon"}
    assert lines == {"data=abc", "data=abcabc"}
    configured(runs[1], data=None)
    assert {row.differs for row in rows_of(*runs, older)} == {""}


def test_runs_that_build_on_runs_of_other_lengths_are_not_seeds_of_one_method(tmp_path):
    def built(seed: int, steps: int, **changes: object) -> Path:
        source = {"method": "adamw", "method_settings": {}, "settings": {"steps": steps, "model": "tiny", **changes}}
        run = write_run(tmp_path / f"{seed}-{steps}", method="swag", seed=seed, model="tiny", steps=4)
        return configured(run, concluded_from=[source])

    runs = [built(1, 6), built(2, 6, model="moved", task="moved.yaml"), built(2, 30)]
    assert {len(row.runs) for row in rows_of(*runs[:2])} == {2}
    apart = rows_of(*runs[::2])
    assert {row.differs for row in apart} == {"on.steps=6", "on.steps=30"}
    for run in runs[::2]:
        (source,) = json.loads((run / "config.json").read_text())["concluded_from"]
        swag = {"method": "swag", "method_settings": {}, "settings": {}, "concluded_from": [source]}
        configured(run, concluded_from=[swag])
    below = rows_of(*runs[::2])
    assert {row.differs for row in below} == {"on.on.steps=6", "on.on.steps=30"}


@pytest.mark.parametrize("settings", [{}, {"settings": {"steps": 6}}])
def test_ensembles_of_other_members_are_not_seeds_of_one_method(settings, tmp_path):
    """With what config.json says of members now, and with what it said before."""

    def of(seed: int, lr: float) -> Path:
        members = [{"method": "adamw", "method_settings": {"lr": lr}, **settings} for _ in range(2)]
        return configured(write_run(tmp_path / f"{seed}{lr}", method="ensemble", seed=seed), concluded_from=members)

    assert {len(row.runs) for row in rows_of(of(1, 0.1), of(2, 0.2))} == {1}
    assert not rows_of_runs(read_runs([of(3, 0.1), of(3, 0.2)])[0])[1]


def test_a_base_that_was_moved_and_a_checksum_without_scales_are_one_base(tmp_path):
    """Seeds stay together, with the change against the baseline; another base of the same name stands apart."""

    def of(method: str, seed: int, model: str, base: str) -> Path:
        run = write_run(tmp_path / f"{method}{seed}{base}", method=method, seed=seed, model=model)
        settings = json.loads((run / "config.json").read_text())["settings"]
        return configured(run, base=base, data="abc", settings={**settings, "task": f"{model}/arc.yaml"})

    runs = [of("adamw", 1, "/a/base", "f00d"), of("adamw", 2, "/b/base", "f00d-cafe"), of("ivon", 1, "/b/base", "f00d")]
    rows = rows_of(*runs)
    assert {(row.method, len(row.runs), row.differs) for row in rows} == {("adamw", 2, ""), ("ivon", 1, "")}
    (line,) = [line for line in table1(rows, replicates=2).blocks[0].lines if line.label == "IVON"]
    assert line.cells["arc_easy"].change is not None
    apart = rows_of(runs[2], of("ivon", 2, "/b/base", "beef"))
    assert {row.differs for row in apart if row.method == "ivon"} == {"base=f00d", "base=beef"}
    scaled = [of("adamw", seed, "/a/base", f"f00d-{scales}") for seed, scales in ((3, "cafe"), (4, "beef"))]
    assert [len(row.runs) for row in rows_of(*scaled)] == [1, 1]


def test_calibrated_runs_that_were_evaluated_at_several_variances_are_told_apart(tmp_path):
    """Their calibrated rows do not depend on it, but they are of runs of two lines."""
    for seed, tau in ((1, 0.5), (2, 1.0)):
        run = write_run(tmp_path / str(seed), seed=seed, tau=tau)
        shutil.copy(run / "predictions.safetensors", run / "predictions-calibrated.safetensors")
    rows = rows_of(tmp_path / "1", tmp_path / "2")
    assert [row.differs for row in rows if row.calibrated] == ["tau=0.5", "tau=1.0"]
    alone = rows_of(tmp_path / "1")
    assert {(row.calibrated, row.differs) for row in alone} == {(False, "tau=0.5"), (True, "")}


def test_a_variance_or_drawing_that_is_not_the_usual_one_is_told(tmp_path):
    usual, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", task="obqa", tau=0.25)
    tensors, meta = load_tensors(other / "predictions.safetensors")
    save_tensors(other / "predictions.safetensors", tensors, {**meta, "last_layers": "1"})
    rows = rows_of(usual, other)
    assert {(row.task, row.differs) for row in rows} == {("arc_easy", ""), ("obqa", "last_layers=1, tau=0.25")}
    assert not any(line.cells["Average"].mean for block in table1(rows, replicates=2).blocks for line in block.lines)


def test_no_line_is_of_two_models(tmp_path):
    runs = [write_run(tmp_path / name, task=name, model=f"/models/{name}") for name in ("boolq", "obqa")]
    rows = rows_of(*runs)
    assert {row.differs for row in rows} == {"model=boolq", "model=obqa"}


@pytest.mark.parametrize("where", ["task", "config"])
def test_names_that_would_move_a_terminals_cursor_are_refused(where, tmp_path):
    run, bad = write_run(tmp_path / "run"), "x\x1b]0;pwned\x07\x1b[2J"
    if where == "task":
        tensors, meta = load_tensors(run / "predictions.safetensors")
        save_tensors(run / "predictions.safetensors", tensors, {**meta, "task": bad})
    else:
        configured(run, commit=bad)
    with pytest.raises(DamagedFileError, match="names that can be printed") as raised:
        build_report([run], tmp_path / "out")
    assert "\x1b" not in str(raised.value)


def test_rows_that_have_other_labels_are_different(tmp_path):
    """Where ids are the numbers of rows, a file that was replaced has the same."""
    runs = [write_run(tmp_path / "a", seed=1), write_run(tmp_path / "b", seed=2)]
    tensors, meta = load_tensors(runs[1] / "predictions.safetensors")
    save_tensors(runs[1] / "predictions.safetensors", {**tensors, "labels": (tensors["labels"] + 1) % 3}, meta)
    assert "the seeds were evaluated on different rows" in told(runs).notes[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"versions": "x"},
        {"concluded_from": [{}]},
        {"concluded_from": "abc"},
        {"concluded_from": [{"method": "adamw", "method_settings": {}, "settings": 3}]},
        {"data": 7},
        {"concluded_from": [{"method": [], "method_settings": {}}]},
        {"settings": {"model": None}},
        {"settings": {"method_settings": [1]}},
        {"settings": {"method_settings": {"of": []}}},
    ],
)
def test_a_config_of_wrong_types_is_left_out_beside_good_ones(changes, runs, tmp_path):
    bad = write_run(tmp_path / "bad", seed=99)
    config = json.loads((bad / "config.json").read_text())
    changes = {**changes, "settings": {**config["settings"], **changes.get("settings", {})}}
    (bad / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(DamagedFileError, match="to be of a run, but its"):
        build_report([bad], tmp_path / "out")
    assert [skip.run for skip in build_report([*runs[:1], bad], tmp_path / "out").skipped] == [str(bad)]


def test_runs_of_other_data_are_lines_of_their_own(tmp_path):
    """By the number of their rows; of as many, the second one of a seed is left out, and why is said.

    How many of them are held out differs between seeds.
    """
    few, many, seed = (write_run(tmp_path / name, data_dir=name) for name in ("few", "many", "seed"))

    def of(run: Path, rows: int, held_out: int, **changes: object) -> None:
        config = json.loads((run / "config.json").read_text())
        config["settings"] |= changes
        (run / "config.json").write_text(
            json.dumps({**config, "training_rows": rows - held_out, "held_out_rows": held_out, "rows": run.name})
        )

    of(few, 100, 10)
    of(many, 1000, 90)
    of(seed, 1000, 110, seed=99)
    lines = {row.differs: len(row.runs) for row in rows_of(few, many, seed)}
    assert lines == {"training and held-out rows=100": 1, "training and held-out rows=1000": 2}
    older = json.loads((seed / "config.json").read_text())
    del older["held_out_rows"]
    (seed / "config.json").write_text(json.dumps(older))
    assert {row.differs for row in rows_of(many, seed)} == {""}
    of(few, 1000, 90)
    _, (skip,), _ = rows_of_runs(read_runs([few, many])[0])
    assert "as many rows, though other ones" in skip.reason


def test_a_seed_without_a_temperature_is_noted(tmp_path):
    runs = [write_run(tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    tensors, meta = load_tensors(runs[0] / "predictions.safetensors")
    fitted = {"temperature": "2.0", "temperature_mean": "1.5"}
    save_tensors(runs[0] / "predictions.safetensors", tensors, {**meta, **fitted})
    shutil.copy(runs[0] / "predictions.safetensors", runs[0] / "predictions-calibrated.safetensors")
    temperature, calibrated = told(runs).notes
    assert f"not shown with a temperature, as {runs[1]} was not evaluated with one" in temperature
    assert "not shown with a calibrated posterior" in calibrated


def test_what_is_not_defined_is_marked(tmp_path):
    for seed in (1, 2):

        def right(tensors, metadata):
            tensors["labels"].copy_(tensors["logits_mean"].argmax(1))

        damage(write_run(tmp_path / str(seed), "mine", "adamw", seed), right)
    report = build_report([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    (row,) = report.rows
    assert row.stats["accuracy"].mean == 1
    assert math.isnan(row.stats["auroc"].mean)
    assert math.isnan(row.stats["auroc"].stderr)
    assert row.stats["auroc"].text(100, 1) == "–"
    stored = json.loads(report.files["report.json"].read_text(), parse_constant=pytest.fail)["rows"][0]["metrics"]
    assert stored["auroc"] == {"mean": None, "stderr": None, "values": [None, None]}
    for name in ("report.html", "report.md", "table1.tex"):
        assert not re.search(r"\bnan\b", report.files[name].read_text(), re.IGNORECASE), name


# --- files


def test_markdown_has_each_number_and_its_rule(built):
    text = built.files["report.md"].read_text()
    row = built.rows[2]
    mean, error = 100 * row.stats["accuracy"].mean, 100 * row.stats["accuracy"].stderr
    assert f"| arc_easy | ivon x10 | 3 | 60 | 10 | {mean:.1f} ± {error:.1f} |" in text
    assert "10 equal-width bins (lo, hi]" in text
    assert "![Reliability diagram](reliability.png)" in text
    assert "| 0123456789ab |" in text
    table = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    table1 = to_markdown(built.tables[0]).strip()
    assert table1 in text
    assert table == [10] * 8 + [line.count("|") for line in table1.splitlines() if line.startswith("|")] + [10] * 14


def test_json_carries_the_origin_of_each_number(runs, built):
    content = json.loads(built.files["report.json"].read_text(), parse_constant=pytest.fail)
    assert len(content["rows"]) == 6
    for row, found in zip(content["rows"], built.rows):
        assert row["label"] == found.label
        assert row["seeds"] == [21, 42, 87]
        assert row["metrics"]["ece"]["values"] == list(found.stats["ece"].values)
        assert sum(row["reliability"]["count"]) == 180
        for run in row["runs"]:
            assert Path(run["run"]) in runs
            assert run["rows"] == run["labelled"] == 60
            assert run["predictions"] == {
                "task": row["task"],
                "split": "dev",
                "seed": "0",
                "tau": "1.0",
                "samples": "10",
            }
            assert run["config"] == json.loads((Path(run["run"]) / "config.json").read_text())
            assert run["config"]["commit"] == "0123456789abcdef"
            assert run["config"]["versions"]["torch"] == "2.6.0"


def test_json_is_strict_where_a_setting_is_infinite(tmp_path):
    report = build_report([write_run(tmp_path / "run", clip_radius=math.inf)], tmp_path / "out")
    content = json.loads(report.files["report.json"].read_text(), parse_constant=pytest.fail)
    assert content["rows"][0]["runs"][0]["config"]["settings"]["clip_radius"] == "Infinity"


def test_diagrams_are_images_and_carry_no_date(built):
    with Image.open(built.files["reliability.png"]) as image:
        image.verify()
        assert min(image.size) > 300
    with Image.open(built.files["reliability.png"]) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == (0, 0x72, 0xB2)).all(1).mean() > 0.05  # bars of accuracy
    svg = built.files["reliability.svg"].read_text()
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert "dc:date" not in svg


def test_user_style_does_not_change_the_diagram(runs, built, tmp_path):
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        report = build_report(runs, tmp_path)
    for name, path in built.files.items():
        assert report.files[name].read_bytes() == path.read_bytes()


def test_files_are_replaced_whole(runs, tmp_path, monkeypatch):
    build_report(runs[:1], tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert sorted(before) == [
        "reliability.png",
        "reliability.svg",
        "report.html",
        "report.json",
        "report.md",
        "table1.tex",
    ]

    def full(handle: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("varlora.files.os.fsync", full)
    with pytest.raises(VarloraError, match="No space left"):
        build_report(runs, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_are_shown_as_they_are(tmp_path):
    name = "[bold]my|task[/nope] $x_1$ <b>"
    report = build_report([write_run(tmp_path / "run", task=name)], tmp_path / "out")
    assert name in text_of(report)
    assert r"\[bold\]my\|task\[/nope\] $x_1$ \<b\>" in report.files["report.md"].read_text()
    ElementTree.fromstring(report.files["reliability.svg"].read_text())


def test_table_has_all_columns_at_80(built):
    text = " ".join(text_of(built, 80).split())
    for word in ("task", "method", "seeds", "rows", "draws", "ACC (%)", "ECE", "NLL", "Brier", "ivon@mean", "(lo, hi]"):
        assert word in text


# --- wrong input


def test_a_run_without_predictions_says_what_to_run(runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(runs[0] / "config.json", run)
    with pytest.raises(VarloraError, match=f"not trained yet: go on with `varlora train --resume --run-dir {run}`"):
        build_report([run], tmp_path / "out")
    (run / "adapter").mkdir()
    with pytest.raises(VarloraError, match=f"run `varlora evaluate {run}` first"):
        build_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_directories_are_named(tmp_path):
    with pytest.raises(VarloraError, match="nowhere is not a directory"):
        build_report([tmp_path / "nowhere"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VarloraError, match=r"not a run directory: it has no config\.json"):
        build_report([tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(VarloraError, match="at least one run directory"):
        build_report([], tmp_path / "out")


def cut(run: Path) -> None:
    path = run / "predictions.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "cut short": cut,
    "empty": lambda run: (run / "predictions.safetensors").write_bytes(b""),
    "no ids": lambda run: damage(run, lambda tensors, meta: meta.pop("ids")),
    "ids of other rows": lambda run: damage(run, lambda tensors, meta: meta.update(ids='["a"]')),
    "no number of samples": lambda run: damage(run, lambda tensors, meta: meta.update(samples="ten")),
    "no labels": lambda run: damage(run, lambda tensors, meta: tensors.pop("labels")),
    "other shape": lambda run: damage(
        run, lambda tensors, meta: tensors.update(labels=torch.zeros(3, dtype=torch.int64))
    ),
    "not finite": lambda run: damage(run, lambda tensors, meta: tensors["logits"][0, 0, 0].fill_(math.nan)),
    "masked label": lambda run: damage(run, lambda tensors, meta: tensors["labels"][0].fill_(3)),
    "label out of range": lambda run: damage(run, lambda tensors, meta: tensors["labels"][0].fill_(4)),
    "config cut": lambda run: (run / "config.json").write_text('{"settings": {"task"'),
    "config a list": lambda run: (run / "config.json").write_text("[]"),
    "config without seed": lambda run: (run / "config.json").write_text(
        '{"settings": {"task": "t", "model": "m", "method": "ivon"}}'
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_named(tmp_path, name):
    run = write_run(tmp_path / "run")
    DAMAGES[name](run)
    file = "config.json" if name.startswith("config") else "predictions.safetensors"
    with pytest.raises(DamagedFileError, match=str(run / file)):
        build_report([run], tmp_path / "out")


def with_config(**changes):
    def change(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def with_meta(**changes):
    return lambda run: damage(run, lambda tensors, meta: meta.update(changes))


def with_tensors(**changes):
    """Replace tensors by what functions make of them."""
    return lambda run: damage(
        run, lambda tensors, meta: tensors.update({n: f(tensors[n]).contiguous() for n, f in changes.items()})
    )


def texts(text: object) -> str:
    return json.dumps([text] * 60)


STRANGE = {
    "a temperature that is none": with_meta(temperature="abc", temperature_mean="1"),
    "a temperature of 0": with_meta(temperature="0", temperature_mean="1"),
    "a temperature that overflows": with_meta(temperature="1", temperature_mean="1e-40"),
    "a temperature that is NaN": with_meta(temperature="nan", temperature_mean="1"),
    "one temperature of two": with_meta(temperature="1"),
    "tau NaN": with_meta(tau="nan"),
    "tau infinite": with_meta(tau="inf"),
    "tau below 0": with_meta(tau="-1"),
    "labels with fractions": with_tensors(labels=torch.Tensor.float),
    "labels of 8 bits": with_tensors(labels=lambda labels: labels.to(torch.uint8)),
    "labels true or false": with_tensors(labels=torch.Tensor.bool),
    "complex logits": with_tensors(logits=lambda logits: logits.to(torch.complex64)),
    "logits of whole numbers": with_tensors(logits=torch.Tensor.int, logits_mean=torch.Tensor.int),
    "a mask of numbers": with_tensors(mask=torch.Tensor.float),
    "no draws": with_tensors(logits=lambda logits: logits[:0]),
    "no answers": with_tensors(**dict.fromkeys(("logits", "logits_mean", "mask"), lambda values: values[..., :0])),
    "ids without end": with_meta(ids="[" * 100_000 + "]" * 100_000),
    "ids that are no list": with_meta(ids="1"),
    "ids that are mappings": with_meta(ids=texts({})),
    "slices that are numbers": with_meta(slices=texts(1)),
    "half a character in slices": with_meta(slices=texts("\ud800")),
    "prompts that are numbers": with_meta(prompts=texts(1)),
    "half a character in prompts": with_meta(prompts=texts("\ud800")),
    "answers that are texts": with_meta(answers=texts("abcd")),
    "config without end": with_config(deep=json.loads('{"a":' * 900 + "1" + "}" * 900)),
    "half a character in config": with_config(commit="\ud800"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strangers_files_that_cannot_be_used_are_named(tmp_path, name):
    good, bad = write_run(tmp_path / "good", n=60), write_run(tmp_path / "bad", n=60)
    STRANGE[name](bad)
    runs, (skipped,) = read_runs([bad, good])
    assert [run.run for run in runs] == [good]
    assert skipped.run == str(bad)
    assert str(bad / ("config.json" if "config" in name else "predictions.safetensors")) in skipped.reason
    assert len(skipped.reason) < 1000


@pytest.mark.parametrize(
    "change", [with_meta(ids=texts("x")), with_meta(tau="nan"), with_tensors(labels=torch.neg), cut]
)
def test_a_run_whose_calibrated_predictions_cannot_be_used_is_skipped(tmp_path, change):
    good, bad = write_run(tmp_path / "good"), write_run(tmp_path / "bad")
    whole = (bad / "predictions.safetensors").read_bytes()
    change(bad)
    (bad / "predictions.safetensors").rename(bad / "predictions-calibrated.safetensors")
    (bad / "predictions.safetensors").write_bytes(whole)
    _, (skipped,) = read_runs([bad, good])
    assert skipped.run == str(bad)
    assert "predictions-calibrated.safetensors" in skipped.reason


def test_a_report_goes_on_without_what_cannot_be_used(runs, tmp_path):
    bad = [write_run(tmp_path / str(i), n=60) for i, _ in enumerate(STRANGE)]
    for run, change in zip(bad, STRANGE.values()):
        change(run)
    odd = write_run(tmp_path / "odd", seed=1, lora={"x": [math.inf, {"y": [math.nan]}]}, samples=0)
    (odd / "adapter").mkdir()
    (odd / "adapter" / "posterior_config.json").write_text("[]")
    (odd / "training.jsonl").write_text(
        '[]\n1\n"loss"\nnull\n{"loss": 1, "step": 1e400}\n{"loss": 1, "step": NaN}\n{"loss": 1}\n'
        + '{"loss": 1, "step": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
        + '{"loss": ' + "9" * 400 + ', "step": 2}\n{"loss": 1e308, "step": 3}\n{"loss": -1e308, "step": 4}\n'
        + '{"loss": 0.25, "step": 5, "sigma": "a", "loss_under_noise": "a", "loss_at_mean": 1}\n'
        + '{"loss": 0.5, "step": 6, "sigma/layer_00": "x", "sigma/layer_xx": 1, "sigma/layer_100": 2, "sigma/q": {}, '
        + '"sigma/layer_01": 1, "sigma/layer_02": Infinity, "sigma/layer_99": 3}\n'
    )  # fmt: skip
    report = build_report([*runs[:3], odd, *bad], tmp_path / "out")
    assert [skip.run for skip in report.skipped] == list(map(str, bad))
    assert {str(run.run) for row in report.rows for run in row.runs} == {str(run) for run in [*runs[:3], odd]}
    shown = training([odd])
    assert (shown.loss.x, shown.loss.y) == ((5, 6), (0.25, 0.5))
    assert (shown.layers.x, shown.layers.y) == ((1, 99, 100), (1, 3, 2))
    settings = json.loads(report.files["report.json"].read_text())["rows"][-1]["runs"][0]["config"]["settings"]
    assert settings["lora"] == {"x": ["Infinity", {"y": ["NaN"]}]}


def test_a_run_whose_name_is_not_utf8_is_left_out_in_words(tmp_path):
    good, bad = write_run(tmp_path / "good", seed=42), tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(good, bad)
    with pytest.raises(VarloraError, match="Expected a path whose name is UTF-8") as raised:
        build_report([bad], tmp_path / "out")
    assert not isinstance(raised.value, DamagedFileError)
    report = build_report([good, bad], tmp_path / "out")
    assert [skip.run for skip in report.skipped] == [str(bad)]
    for name in ("report.html", "report.md", "report.json"):
        assert "caf?" in report.files[name].read_text(encoding="utf-8"), name


def test_labels_all_unknown(tmp_path):
    run = write_run(tmp_path / "run", unknown=60)
    with pytest.raises(VarloraError, match=r"all 60 labels .* are unknown"):
        build_report([run], tmp_path / "out")


def test_bad_runs_among_good_ones_are_listed(runs, tmp_path):
    broken = write_run(tmp_path / "broken")
    cut(broken)
    report = build_report([runs[0], broken, tmp_path / "nowhere"], tmp_path / "out")
    assert len(report.rows) == 1
    assert [skip.run for skip in report.skipped] == [str(broken), str(tmp_path / "nowhere")]
    text = report.files["report.md"].read_text()
    assert "## Skipped" in text
    assert "is damaged" in text
    assert json.loads(report.files["report.json"].read_text())["skipped"][1]["reason"] == report.skipped[1].reason


def test_a_run_of_an_older_version_is_read_or_refused_by_name(runs, tmp_path):
    read, refused = write_run(tmp_path / "read"), write_run(tmp_path / "refused")
    config = json.loads((read / "config.json").read_text())
    del config["versions"], config["commit"]
    (read / "config.json").write_text(json.dumps(config))
    damage(refused, lambda tensors, meta: meta.pop("split"))
    report = build_report([*runs[:1], read, refused], tmp_path / "out")
    assert {str(run.run) for row in report.rows for run in row.runs} == {str(runs[0]), str(read)}
    (skip,) = report.skipped
    assert skip.run == str(refused)
    for part in ("'split'", "older version", f"Run `varlora evaluate {refused}` again"):
        assert part in skip.reason


def test_the_papers_numbers_are_laid_beside(runs, tmp_path):
    alone = build_report(runs, tmp_path / "alone").files["table1.tex"].read_text()
    beside = build_report(runs, tmp_path / "beside", compare="paper")
    for name in ("report.html", "table1.tex"):
        assert "2411.04421" in beside.files[name].read_text(), name
    assert "2411.04421" not in alone


def test_failed_runs_are_listed_beside_the_skipped_ones(runs, tmp_path):
    report = build_report(runs[:1], tmp_path, failed=[Skipped("runs/ivon-seed1", "the loss was not finite")])
    assert [skip.run for skip in report.skipped] == ["runs/ivon-seed1"]
    for name in ("report.html", "report.md", "report.json", "table1.tex"):
        assert "the loss was not finite" in report.files[name].read_text(), name


def test_no_usable_run_lists_all_reasons(tmp_path):
    with pytest.raises(VarloraError, match=r"None of the 2 run directories.*\n.*one is not.*\n.*two is not"):
        build_report([tmp_path / "one", tmp_path / "two"], tmp_path / "out")


def test_out_dir_that_is_a_file(runs, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(VarloraError, match="`out_dir`"):
        build_report(runs[:1], tmp_path / "out")


def test_read_run_returns_what_was_saved(runs):
    run = read_run(runs[3])
    assert run.predictions.logits.shape == (10, 60, 4)
    assert run.drawn
    assert run.predictions.ids[0] == "row-0"
    assert run.settings["method"] == "ivon"
    assert not read_run(runs[0]).drawn


# --- slices


def sliced(run: Path, slices: list[str]) -> Path:
    def change(tensors, metadata):
        metadata["slices"] = json.dumps(slices)

    damage(run, change)
    return run


def test_slices_say_how_sure_and_how_right(tmp_path):
    parts = ["never told", "told", "told"] * 20
    for seed in (1, 2):
        sliced(write_run(tmp_path / str(seed), seed=seed, unknown=6), parts)
    report = build_report([tmp_path / "1", tmp_path / "2"], tmp_path / "out")
    for row in report.rows:
        assert [(part.name, part.size, len(part.confidence)) for part in row.slices] == [
            ("never told", "18", 36),
            ("told", "36", 72),
        ]
        for part in row.slices:
            for i, run in enumerate(row.runs):
                inside = np.array([p == part.name for p in parts]) & run.known.numpy()
                probs, labels = run.probs(row.draws > 0).numpy()[inside], run.predictions.labels.numpy()[inside]
                right, sure = accuracy_score(labels, probs.argmax(1)), probs.max(1).mean()
                assert part.stats["accuracy"].values[i] == pytest.approx(right)
                assert part.stats["confidence"].values[i] == pytest.approx(sure)
                assert part.stats["nll"].values[i] == pytest.approx(-np.log(probs[range(len(labels)), labels]).mean())
    text = report.files["report.md"].read_text()
    for row in report.rows:
        for part in row.slices:
            assert " | ".join(["", *report.slice_cells(row, part), ""]).strip() in text
            stored = json.loads(report.files["report.json"].read_text())["rows"][report.rows.index(row)]["slices"]
            assert stored[part.name]["confidence"]["mean"] == part.stats["confidence"].mean
    assert "(slices.png)" in text
    for name in ("slices.png", "slices.svg"):
        assert report.files[name].stat().st_size > 1000


def test_without_slices_nothing_is_said_of_them(built):
    assert not any(row.slices for row in built.rows)
    assert "slice" not in built.files["report.md"].read_text()
    assert "slices.png" not in built.files


def test_some_tasks_and_rows_without_slices(runs, tmp_path):
    few = sliced(write_run(tmp_path / "few", task="mine"), ["", "short", "long"] * 20)
    many = sliced(write_run(tmp_path / "many", task="other"), [f"part {i}" for i in range(60)])  # too many to show
    report = build_report([*runs, few, many], tmp_path / "out")
    found = {row.task: [part.name for part in row.slices] for row in report.rows}
    assert found == {"arc_easy": [], "openbookqa": [], "mine": ["long", "short"], "other": []}
    assert "other: its 60 slices are not shown; up to 12 are." in report.notes


def test_a_slice_that_one_seed_lacks_is_averaged_over_the_others(tmp_path):
    sliced(write_run(tmp_path / "1", seed=1), ["told"] * 60)
    sliced(write_run(tmp_path / "2", seed=2), ["told", "never told"] * 30)
    for row in build_report([tmp_path / "1", tmp_path / "2"], tmp_path / "out").rows:
        assert [(part.name, part.size, len(part.stats["nll"].values)) for part in row.slices] == [
            ("never told", "0-30", 1),
            ("told", "30-60", 2),
        ]


def test_a_seed_evaluated_before_the_task_had_slices_counts_only_in_the_whole(tmp_path):
    write_run(tmp_path / "1", seed=1)
    sliced(write_run(tmp_path / "2", seed=2), ["told"] * 60)
    for row in build_report([tmp_path / "1", tmp_path / "2"], tmp_path / "out").rows:
        assert row.size == "60"
        assert [(part.name, part.size) for part in row.slices] == [("told", "0-60")]


def test_the_picture_of_an_earlier_report_is_removed(runs, tmp_path):
    sliced(write_run(tmp_path / "1", seed=1), ["told"] * 60)
    build_report([tmp_path / "1"], tmp_path / "out")
    assert (tmp_path / "out" / "slices.png").is_file()
    build_report(runs, tmp_path / "out")
    assert not list((tmp_path / "out").glob("slices*"))


def test_slices_that_do_not_fit_the_rows_are_refused(tmp_path):
    run = sliced(write_run(tmp_path / "run"), ["told"])
    with pytest.raises(DamagedFileError, match="60 rows and 1 slices"):
        build_report([run], tmp_path / "out")
