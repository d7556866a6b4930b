"""Tables from evaluated runs that are made up here."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import accuracy_score, log_loss
from tables_helpers import evaluated, failure, rows, seeds, settings_of, written

from varlora.bootstrap import paired_differences
from varlora.errors import VarloraError
from varlora.evaluated import Skipped, read_runs
from varlora.methods import METHODS
from varlora.metrics import evaluate
from varlora.predictions import load_predictions, save_predictions
from varlora.results import rows_of_runs
from varlora.table import ALL, AVERAGE, BEYOND_METRICS, PAPER_METRICS, Cell, Metric
from varlora.tables import average, beyond, setting_text, table1, table2, table3

FAST = {"replicates": 50}


def line(table, block, label):
    (found,) = [line for line in table.blocks[block].lines if line.label == label]
    return found


def labels(table, block=0):
    return [line.label for line in table.blocks[block].lines]


def two_tasks():
    return [
        run
        for task in ("boolq", "arc_easy")
        for run in [*seeds(task), *seeds(task, "ivon", skill=0.8, noise=3.0, own=0.5)]
    ]


# --- Table 1: numbers


def test_means_and_standard_errors_are_those_of_scikit_learn_and_scipy():
    runs = two_tasks()
    table = table1(rows(*runs), **FAST)
    assert table.columns == ("arc_easy", "boolq", AVERAGE)
    for task in ("arc_easy", "boolq"):
        mine = [run.predictions for run in runs if run.meta["task"] == task and run.settings["method"] == "ivon"]
        for label, probs in (("IVON", [p.probs for p in mine]), ("IVON@mean", [p.probs_mean for p in mine])):
            truth = {
                "accuracy": [accuracy_score(p.labels, q.argmax(1)) for p, q in zip(mine, probs)],
                "nll": [log_loss(p.labels, q, labels=range(4)) for p, q in zip(mine, probs)],
            }
            for block, name in ((0, "accuracy"), (2, "nll")):
                cell = line(table, block, label).cells[task]
                assert cell.mean == pytest.approx(np.mean(truth[name]))
                assert cell.stderr == pytest.approx(scipy.stats.sem(truth[name]))
                assert cell.seeds == 3


def test_changes_are_against_the_baseline_with_an_interval():
    found = rows(*two_tasks())
    table = table1(found, replicates=200, seed=7)
    base, drawn = (next(r for r in found if r.task == "boolq" and r.label == name) for name in ("adamw", "ivon x10"))
    generator = torch.Generator().manual_seed(7)
    expected = paired_differences(base.answers, drawn.answers, replicates=200, generator=generator)
    for block, metric in enumerate(PAPER_METRICS):
        cell = line(table, block, "IVON").cells["boolq"]
        assert (cell.low, cell.high) == (expected[metric.name].low, expected[metric.name].high)
        assert cell.change == pytest.approx(expected[metric.name].mean)
        assert cell.change == pytest.approx(cell.mean - line(table, block, "AdamW").cells["boolq"].mean)
        assert line(table, block, "AdamW").cells["boolq"].change is None
    assert PAPER_METRICS[2].verdict(line(table, 2, "IVON").cells["boolq"]) == "better"


def test_what_answers_as_the_baseline_does_is_noise():
    table = table1(rows(*seeds(), *seeds(method="swa")), **FAST)
    for block, metric in enumerate(PAPER_METRICS):
        cell = line(table, block, "+ SWA").cells["boolq"]
        assert (cell.change, cell.low, cell.high) == (0, 0, 0)
        assert metric.verdict(cell) == "noise"


@pytest.mark.parametrize(
    ("larger_is_better", "low", "high", "verdict"),
    [(True, 0.1, 0.2, "better"), (True, -0.2, -0.1, "worse"), (False, 0.1, 0.2, "worse"), (False, -0.1, 0.0, "noise")],
)
def test_a_change_is_worth_what_its_interval_and_the_metrics_direction_say(larger_is_better, low, high, verdict):
    metric = Metric("m", "M", larger_is_better, 1, 1)
    assert metric.verdict(Cell(1.0, change=(low + high) / 2, low=low, high=high)) == verdict
    assert metric.verdict(Cell(1.0)) == ""


def test_other_rows_leave_a_change_without_interval():
    others = [
        dataclasses.replace(run, predictions=dataclasses.replace(run.predictions, ids=run.predictions.ids[::-1]))
        for run in seeds(method="swa", own=1.0)
    ]
    table = table1(rows(*seeds(), *others), **FAST)
    cell = line(table, 0, "+ SWA").cells["boolq"]
    assert cell.change == pytest.approx(cell.mean - line(table, 0, "AdamW").cells["boolq"].mean)
    assert cell.low is cell.high is None
    assert PAPER_METRICS[0].verdict(cell) == "untested"


@pytest.mark.parametrize(("others", "shared"), [((1, 2, 4), (1, 2)), ((2,), (2,)), ((1, 2, 3, 4), (1, 2, 3))])
def test_a_change_is_over_the_seeds_that_both_have(others, shared):
    """Seed 4, which AdamW does not have, is a bad one, and of no account."""
    run = {seed: evaluated(method="swa", own=1.0, seed=seed, skill=0.5 - 0.4 * (seed == 4)) for seed in others}
    table = table1(rows(*seeds(), *run.values()), **FAST)
    alike = table1(rows(*(evaluated(seed=seed) for seed in shared), *(run[seed] for seed in shared)), **FAST)
    for block in range(3):
        cell, same = (line(found, block, "+ SWA").cells["boolq"] for found in (table, alike))
        assert (cell.change, cell.low, cell.high) == (same.change, same.low, same.high)
        assert cell.seeds == len(others)
    said = [note for note in table.notes if "+ SWA on BoolQ" in note]
    few = len(shared) < len(others)
    assert (
        said
        == [f"+ SWA on BoolQ: the change is over the {len(shared)} of {len(others)} seeds that AdamW has too."] * few
    )


@pytest.mark.parametrize("of", ["base", "split"])
def test_a_baseline_on_another_base_or_split_is_none(of):
    def elsewhere(run, name):
        if of == "base":
            return dataclasses.replace(run, config={**run.config, "base": name})
        predictions = dataclasses.replace(run.predictions, meta={**run.predictions.meta, "split": name})
        return dataclasses.replace(run, predictions=predictions)

    runs = [elsewhere(run, "dev") for run in seeds()] + [elsewhere(run, "test") for run in seeds(method="swa")]
    found = table1(rows(*runs), **FAST).blocks[0].lines
    assert [cell.change for line in found for cell in line.cells.values()] == [None, None]


@pytest.mark.parametrize(("bins", "rule"), [(2, "right"), (2, "left"), (1, "right")])
def test_the_bins_are_those_of_numbers_intervals_and_table_2(bins, rule, tmp_path):
    """Half of the rows have a confidence of 0.5, on the border of two of two bins."""

    def bordering(run, sure):
        mean = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [sure, 0.0, -math.inf, -math.inf]]).repeat(60, 1)
        found = dataclasses.replace(
            run.predictions, logits=mean.repeat(10, 1, 1), logits_mean=mean, labels=torch.tensor([0, 1]).repeat(60)
        )
        return dataclasses.replace(run, predictions=found)

    of = {"adamw": 2.0, "ivon": -3.0}
    a, b = (bordering(written(evaluated(method=name, folder=tmp_path)), sure) for name, sure in of.items())
    found, _, _ = rows_of_runs([a, b], bins, rule)
    ece = [evaluate(run.predictions.probs, run.predictions.labels, bins, rule)["ece"] for run in (a, b)]
    assert [row.stats["ece"].mean for row in found] == pytest.approx(ece)
    assert {(row.reliability.bins["bins"], row.reliability.bins["rule"]) for row in found} == {(bins, rule)}
    (cell,) = (line.cells["boolq"] for line in table1(found, **FAST).blocks[1].lines if line.cells["boolq"].change)
    generator = torch.Generator().manual_seed(0)
    pair = ([(run.predictions.probs, run.predictions.labels)] for run in (a, b))
    expected = paired_differences(*pair, bins=bins, rule=rule, replicates=50, generator=generator)["ece"]
    assert (cell.low, cell.high) == pytest.approx((expected.low, expected.high))
    (line,) = table2([a], method="adamw", bins=bins, rule=rule).blocks[1].lines
    assert line.cells["boolq"].mean == pytest.approx(ece[0])


def test_without_a_shared_seed_there_is_no_change():
    table = table1(rows(*seeds(), evaluated(method="swa", seed=7)), **FAST)
    assert line(table, 0, "+ SWA").cells["boolq"].change is None
    assert table.notes == ("+ SWA on BoolQ: no change, as it shares no seed with AdamW.",)


def test_one_seed_has_no_standard_error():
    cell = line(table1(rows(evaluated()), **FAST), 0, "AdamW").cells["boolq"]
    assert cell.stderr is None
    assert cell.seeds == 1


# --- Table 1: averages


def test_the_average_of_normal_tasks_is_the_normal_average():
    """Intervals of ±1.96 s give one of ±1.96 times the standard error of the average."""
    changes, errors = [0.1, 0.3, -0.1], [0.02, 0.05, 0.01]
    cells = [Cell(0.5 + c, s, c, c - 1.96 * s, c + 1.96 * s, seeds=3) for c, s in zip(changes, errors)]
    found = average(cells)
    error = math.sqrt(sum(s**2 for s in errors)) / 3
    assert found.mean == pytest.approx(0.6)
    assert found.stderr == pytest.approx(error)
    assert (found.change, found.low, found.high) == pytest.approx((0.1, 0.1 - 1.96 * error, 0.1 + 1.96 * error))


def test_the_average_of_a_task_with_itself_is_the_task():
    """Two sizes of one training set are evaluated on the same rows, so chance in these goes together."""
    one, other = Cell(0.5, 0.02, 0.1, 0.06, 0.13, seeds=3), Cell(0.7, 0.01, 0.2, 0.11, 0.27, seeds=3)
    found = average([one, one], ["rows", "rows"])
    assert (found.change, found.low, found.high) == pytest.approx((one.change, one.low, one.high))
    found = average([one, one, other], ["rows", "rows", "other rows"])
    assert found.low == pytest.approx(found.change - math.hypot(2 * 0.04, 0.09) / 3)
    assert found.high == pytest.approx(found.change + math.hypot(2 * 0.03, 0.07) / 3)


def test_tasks_with_the_same_prompts_and_labels_share_their_rows():
    def with_prompts(prefix):
        made, labels = two_tasks(), two_tasks()[0].predictions.labels
        for run in made:
            prompts = tuple(f"{prefix(run.meta['task'])} {row}" for row in run.predictions.ids)
            predictions = dataclasses.replace(run.predictions, prompts=prompts, labels=labels)
            yield dataclasses.replace(run, predictions=predictions)

    alike, apart = (
        line(table1(rows(*with_prompts(prefix)), **FAST), 0, "IVON").cells[AVERAGE]
        for prefix in (lambda task: "same", lambda task: task)
    )
    assert alike.change == apart.change
    assert alike.high - alike.low > 1.2 * (apart.high - apart.low)


def test_only_a_line_with_all_tasks_has_an_average():
    table = table1(rows(*two_tasks(), *seeds("boolq", "swa")), **FAST)
    for block in range(3):
        cells = line(table, block, "IVON").cells
        assert cells[AVERAGE].mean == pytest.approx((cells["boolq"].mean + cells["arc_easy"].mean) / 2)
        assert cells[AVERAGE].change == pytest.approx((cells["boolq"].change + cells["arc_easy"].change) / 2)
        assert cells[AVERAGE].low < cells[AVERAGE].change < cells[AVERAGE].high
        assert line(table, block, "+ SWA").cells[AVERAGE] == Cell()
        assert line(table, block, "+ SWA").cells["arc_easy"] == Cell()


def test_a_change_or_error_that_a_task_lacks_the_average_lacks():
    whole = Cell(0.5, 0.1, 0.1, 0.0, 0.2, seeds=3)
    assert average([whole, Cell(0.7, None, 0.1, 0.0, 0.2, seeds=1)]) == Cell(
        0.6,
        None,
        pytest.approx(0.1),
        pytest.approx(0.1 - math.sqrt(0.02) / 2),
        pytest.approx(0.1 + math.sqrt(0.02) / 2),
        1,
    )
    assert average([whole, Cell(0.7, 0.1, 0.3, seeds=3)]).change == pytest.approx(0.2)
    assert average([whole, Cell(0.7, 0.1, 0.3, seeds=3)]).low is None
    assert average([whole, Cell(0.7, 0.1, seeds=3)]).change is None


# --- Table 1: lines


def test_lines_are_in_the_papers_order_and_have_its_names():
    runs = [
        *(evaluated(method=name, own=1.0) for name in ("blob", "swa", "my_method", "adamw")),
        *(evaluated(method=name, own=1.0, noise=1.0) for name in ("ivon", "mc_dropout", "laplace_kfac", "swag", "tfb")),
        evaluated(method="laplace_diag", own=1.0, noise=1.0, temperature=2.0),
    ]
    table = table1(rows(*runs), **FAST)
    expected = [
        ("AdamW", True),
        ("+ MC dropout@mean", True),
        ("+ MC dropout", False),
        ("+ LA (KFAC)@mean", True),
        ("+ LA (KFAC)", False),
        ("+ LA (diag)@mean", True),
        ("+ LA (diag)", False),
        ("+ SWA", True),
        ("+ SWAG@mean", True),
        ("+ SWAG", False),
        ("+ TFB@mean", True),
        ("+ TFB", False),
        ("BLoB", True),
        ("IVON@mean", True),
        ("IVON", False),
        ("my_method", True),
        ("+ LA (diag)@mean +T", False),
        ("+ LA (diag) +T", False),
    ]
    for block in table.blocks:
        assert [(line.label, line.starred) for line in block.lines] == expected
        assert [line.section for line in block.lines] == [""] * 16 + ["Tempered"] * 2


def test_a_method_is_named_after_what_it_was_concluded_from():
    runs = [
        evaluated(method="tfb", own=1.0, noise=1.0, concluded_from=["ivon"]),
        evaluated(method="swa", own=1.0, concluded_from=["swag"]),
        evaluated(method="ensemble", noise=1.0, concluded_from=["adamw", "adamw"]),
        evaluated(method="temperature", own=1.0, method_settings={"of": "ivon"}),
    ]
    table = table1(rows(*runs), **FAST)
    assert labels(table) == [
        "+ SWA", "IVON + TFB@mean", "IVON + TFB", "Ensemble@mean", "Ensemble", "IVON + Temperature"
    ]  # fmt: skip
    assert not line(table, 0, "IVON + Temperature").starred  # the logits are divided


def test_numbers_of_draws_that_differ_and_settings_that_differ_are_in_the_label():
    few = evaluated("arc_easy", "ivon", noise=1.0)
    few = dataclasses.replace(
        few,
        predictions=dataclasses.replace(
            few.predictions, logits=few.predictions.logits[:4], meta={**few.predictions.meta, "samples": "4"}
        ),
    )
    table = table1(rows(few, evaluated("boolq", "ivon", noise=1.0)), **FAST)
    assert labels(table) == ["IVON@mean", "IVON x4", "IVON x10"]
    table = table1(rows(*(evaluated(own=lr, method_settings={"lr": lr}) for lr in (0.1, 0.2))), **FAST)
    assert labels(table) == ["AdamW, lr=0.1", "AdamW, lr=0.2"]


def test_the_mean_of_what_builds_on_another_is_left_out_where_it_repeats_that_one():
    runs = [*seeds(), *seeds(method="mc_dropout", noise=1.0), *seeds(method="laplace_kfac", noise=2.0)]
    table = table1(rows(*runs), **FAST)
    assert labels(table) == ["AdamW", "+ MC dropout", "+ LA (KFAC)"]
    assert "mc_dropout@mean repeats adamw: left out." in rows_of_runs(runs)[2]
    without_adamw = table1(rows(*runs[3:]), **FAST)
    assert labels(without_adamw) == ["+ MC dropout@mean", "+ MC dropout", "+ LA (KFAC)"]


def test_the_mean_is_kept_where_one_seed_or_task_differs_or_the_method_stands_alone():
    other_seed = [*seeds(method="swag", noise=1.0)[:2], evaluated(method="swag", seed=3, noise=1.0, own=0.5)]
    other_task = [*seeds("boolq", "mc_dropout", noise=1.0), *seeds("arc_easy", "mc_dropout", noise=1.0, own=0.5)]
    alone = seeds("boolq", "ivon", noise=1.0)
    table = table1(rows(*seeds("boolq"), *seeds("arc_easy"), *other_seed, *other_task, *alone), **FAST)
    assert {"+ SWAG@mean", "+ MC dropout@mean", "IVON@mean"} <= set(labels(table))
    assert table.notes == ()


@pytest.mark.parametrize("count", [1, 2])
def test_the_caption_says_what_the_intervals_of_one_seed_leave_out(count: int):
    runs = [evaluated("boolq", method, seed) for method in ("adamw", "ivon") for seed in range(count)]
    assert ("nothing of other seeds" in table1(rows(*runs), **FAST).caption) == (count == 1)
    others = [evaluated("boolq", "ivon", seed, own=1.0) for seed in range(count - 1, count + 3)]
    assert "nothing of other seeds" in table1(rows(*runs[:count], *others), **FAST).caption  # they share one


def test_the_baseline_can_be_another_row_and_has_to_be_one():
    runs = [*seeds(), *seeds(method="ivon", noise=2.0, own=0.5)]
    table = table1(rows(*runs), baseline="ivon@mean", **FAST)
    assert line(table, 0, "IVON@mean").cells["boolq"].change is None
    assert line(table, 0, "AdamW").cells["boolq"].change is not None
    assert "against IVON@mean" in table.caption
    two = [evaluated(own=lr, method_settings={"lr": lr}) for lr in (0.1, 0.2)]
    table = table1(rows(*two, evaluated(method="swa")), **FAST)
    assert all(line.cells["boolq"].change is None for line in table.blocks[0].lines)


def test_rows_that_were_not_told_apart_are_refused():
    with pytest.raises(VarloraError, match="one call of `rows_of_runs`"):
        table1([*rows(evaluated(seed=1)), *rows(evaluated(seed=2))])


def test_every_method_has_a_title_of_its_own():
    titles = [method.title for method in METHODS.values()]
    assert all(titles)
    assert len(set(titles)) == len(titles)


# --- failed runs


def test_failed_runs_are_reported_beside_the_others(tmp_path):
    lost = [evaluated("boolq", name, seed=9, folder=tmp_path) for name in ("ivon", "blob")]
    failed = [failure(run, "out of memory") for run in lost] + [Skipped("runs/gone", "never began")]
    table = table1(rows(*two_tasks()), failed=failed, **FAST)
    for block in range(3):
        ivon, blob = (line(table, block, name) for name in ("IVON", "BLoB"))
        assert ivon.cells["boolq"].failed == f"{lost[0].run} failed: out of memory"
        assert ivon.cells["boolq"].mean is not None
        assert ivon.cells[AVERAGE].failed == ivon.cells["boolq"].failed
        assert ivon.cells["arc_easy"].failed == ""
        assert blob.cells["boolq"] == Cell(failed=f"{lost[1].run} failed: out of memory")
        assert not blob.starred
    assert table.notes == ("runs/gone failed: never began",)


def test_a_failed_run_of_several_settings_is_noted_and_marks_none_of_them(tmp_path):
    lost = evaluated("boolq", "swa", seed=9, folder=tmp_path)
    runs = [evaluated(method="swa", own=lr, method_settings={"lr": lr}) for lr in (0.1, 0.2)]
    table = table1(rows(*runs), failed=[failure(lost, "loss is NaN")], **FAST)
    assert all(line.cells["boolq"].failed == "" for line in table.blocks[0].lines)
    assert table.notes == (f"{lost.run} failed: loss is NaN",)


def test_all_runs_may_have_failed(tmp_path):
    table = table1([], failed=[failure(evaluated(folder=tmp_path), "out of memory")], **FAST)
    assert line(table, 0, "AdamW").cells["boolq"].failed


def test_nan_probabilities_become_a_failed_run(tmp_path):
    good, bad = (written(evaluated(method=name, folder=tmp_path)) for name in ("adamw", "blob"))
    save_predictions(good.predictions, good.run / "predictions.safetensors")
    logits = bad.predictions.logits.clone()
    logits[0, 3, 1] = math.nan
    save_predictions(dataclasses.replace(bad.predictions, logits=logits), bad.run / "predictions.safetensors")
    runs, skipped = read_runs([good.run, bad.run])
    table = table1(rows_of_runs(runs)[0], failed=skipped, **FAST)
    assert line(table, 0, "BLoB").cells["boolq"].mean is None
    assert "not finite" in line(table, 0, "BLoB").cells["boolq"].failed


# --- beyond


def test_beyond_has_the_other_metrics_and_an_interval_where_there_is_a_bootstrap():
    runs = two_tasks()
    table = beyond(rows(*runs), **FAST)
    assert [block.metric for block in table.blocks] == list(BEYOND_METRICS)
    mine = [run.predictions for run in runs if run.meta["task"] == "boolq" and run.settings["method"] == "adamw"]
    brier = [((p.probs.numpy() - np.eye(4)[p.labels]) ** 2).sum(1).mean() for p in mine]
    assert line(table, 0, "AdamW").cells["boolq"].mean == pytest.approx(np.mean(brier))
    assert [line(table, block, "IVON").cells["boolq"].low is None for block in range(4)] == [False, True, True, True]


def test_what_is_not_defined_has_no_mean():
    right = evaluated(skill=100.0)
    cell = line(beyond(rows(right), **FAST), 2, "AdamW").cells["boolq"]
    assert cell == Cell(seeds=1)


# --- Table 2


@pytest.fixture
def scaled(tmp_path):
    runs = [written(run) for run in seeds(method="ivon", noise=4.0, folder=tmp_path)]
    for run in runs:
        for tau in (0.25, 1.5):
            at = evaluated("boolq", "ivon", run.settings["seed"], noise=4.0, tau=tau).predictions
            save_predictions(at, run.run / f"predictions-tau-{tau:g}.safetensors")
    return runs


def test_table_2_has_a_line_for_each_tau(scaled):
    table = table2([*scaled, *seeds()])
    assert table.columns == ("boolq",)
    for block in table.blocks:
        assert [line.label for line in block.lines] == ["0 (IVON@mean)", "0.25", "1 (IVON)", "1.5"]
    for label, tau in (("0.25", 0.25), ("1.5", 1.5)):
        files = [load_predictions(run.run / f"predictions-tau-{tau:g}.safetensors") for run in scaled]
        truth = [log_loss(p.labels, p.probs, labels=range(4)) for p in files]
        assert line(table, 2, label).cells["boolq"].mean == pytest.approx(np.mean(truth))
        assert line(table, 2, label).cells["boolq"].stderr == pytest.approx(scipy.stats.sem(truth))
    for label, drawn in (("0 (IVON@mean)", False), ("1 (IVON)", True)):
        truth = [log_loss(run.predictions.labels, run.probs(drawn), labels=range(4)) for run in scaled]
        assert line(table, 2, label).cells["boolq"].mean == pytest.approx(np.mean(truth))


def test_the_best_of_each_column_is_marked_and_so_are_its_equals(scaled):
    for block in table2(scaled).blocks:
        sign = 1 if block.metric.larger_is_better else -1
        printed = [sign * float(block.metric.text(line.cells["boolq"].mean)) for line in block.lines]
        assert [line.cells["boolq"].best for line in block.lines] == [value == max(printed) for value in printed]


def test_files_that_are_damaged_or_of_another_evaluation_are_noted(scaled):
    (scaled[0].run / "predictions-tau-0.25.safetensors").write_bytes(b"cut short")
    path = scaled[1].run / "predictions-tau-1.5.safetensors"
    found = load_predictions(path)
    save_predictions(dataclasses.replace(found, meta={**found.meta, "split": "test"}), path)
    table = table2(scaled)
    assert len(table.notes) == 2
    assert str(scaled[0].run) in table.notes[0]
    assert "τ = 1.5" in table.notes[1]
    assert "split" in table.notes[1]
    assert line(table, 0, "0.25").cells["boolq"].seeds == 2
    assert line(table, 0, "1.5").cells["boolq"].seeds == 1
    assert line(table, 0, "1 (IVON)").cells["boolq"].seeds == 3
    assert line(table, 0, "0 (IVON@mean)").cells["boolq"].seeds == 3


def test_predictions_of_other_rows_are_not_shown_at_another_variance(scaled):
    path = scaled[0].run / "predictions-tau-0.25.safetensors"
    found = load_predictions(path)
    save_predictions(dataclasses.replace(found, labels=(found.labels + 1) % 4), path)
    table = table2(scaled)
    assert [note.rpartition(": ")[2] for note in table.notes] == ["rows differ. Evaluate again."]
    assert line(table, 0, "0.25").cells["boolq"].seeds == 2


def test_what_failed_is_marked_in_table_2(scaled):
    lost = failure(evaluated("boolq", "ivon", 9), "killed"), failure(evaluated("arc_easy", "ivon", 9), "disk full")
    table = table2(scaled, failed=[*lost, failure(evaluated("arc_easy", "adamw", 9), "not of this table")])
    assert table.columns == ("arc_easy", "boolq")
    for block in table.blocks:
        for row in block.lines:
            assert "disk full" in row.cells["arc_easy"].failed
            assert row.cells["arc_easy"].mean is None
            assert "killed" in row.cells["boolq"].failed
            assert row.cells["boolq"].mean is not None
    assert table.notes == ()
    (note,) = table2([], failed=lost[:1]).notes
    assert "killed" in note


def test_table_2_of_nothing_is_empty():
    assert [block.lines for block in table2(seeds()).blocks] == [(), (), ()]


# --- Table 3


def texts(table, title):
    (block,) = [block for block in table.blocks if block.title == title]
    return {line.label: {column: cell.text for column, cell in line.cells.items()} for line in block.lines}


def test_settings_that_are_the_same_everywhere_stand_once():
    lora = {"rank": 8, "targets": None}
    runs = [
        evaluated(
            task,
            method,
            seed,
            method_settings={"lr": lr, "ess": ess},
            steps=100,
            lora=lora,
            dtype="float32",
            batch_size=b,
        )
        for seed in (1, 2)
        for task, ess, b in (("arc_easy", 1e6, 4), ("boolq", 1e7, 8))
        for method, lr in (("ivon", 0.03), ("adamw", 5e-5))
    ]
    table = table3(
        settings_of([*runs, evaluated("boolq", "ivon", 3, method_settings={"lr": 0.05, "ess": 1e7}, steps=100)])
    )
    assert table.columns == ("arc_easy", "boolq", ALL)
    assert [block.title for block in table.blocks] == ["All methods", "AdamW", "IVON"]
    assert texts(table, "All methods") == {
        "steps": {ALL: "100"},
        "batch_size": {"arc_easy": "4", "boolq": "8"},
        "lora.rank": {ALL: "8"},
        "lora.targets": {ALL: "none"},
        "model": {ALL: "tiny"},
        "dtype": {ALL: "float32"},
    }
    assert texts(table, "AdamW")["lr"] == {ALL: "5e-5"}
    assert texts(table, "AdamW")["seeds"] == {ALL: "1, 2"}
    assert texts(table, "IVON") == {
        "lr": {"arc_easy": "0.03", "boolq": "0.03, 0.05"},
        "ess": {"arc_easy": "1e6", "boolq": "1e7"},
        "seeds": {"arc_easy": "1, 2", "boolq": "1, 2, 3"},
    }


def test_a_setting_that_one_method_has_otherwise_stands_with_each_method():
    table = table3(settings_of([evaluated(steps=100), evaluated(method="blob", steps=200)]))
    assert texts(table, "AdamW")["steps"] == {"boolq": "100"}
    assert texts(table, "BLoB")["steps"] == {"boolq": "200"}
    assert set(texts(table, "All methods")) == {"model", "seeds"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e7, "1e7"),
        (5e-5, "5e-5"),
        (1 - 1e-5, "0.99999"),
        (1 - 1e-9, "0.999999999"),
        (0.0, "0"),
        (8, "8"),
        (None, "none"),
        (True, "true"),
        ("8bit", "8bit"),
        (["q", "v"], '["q", "v"]'),
        (math.inf, "inf"),
    ],
)
def test_settings_are_written_as_one_writes_them(value, text):
    assert setting_text(value) == text
