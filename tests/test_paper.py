"""The paper's numbers against what the paper itself says of them, and beside ours."""

from __future__ import annotations

import pytest
from tables_helpers import evaluated, rows, settings_of

from varlora.paper import beside_paper, paper
from varlora.table import ALL, AVERAGE, TASKS
from varlora.tables import beyond, table1, table2, table3

CHANGES = {  # in parentheses in the paper's Table 1: six tasks and the average
    ("ACC (%)", "IVON@mean"): "+5.6 +3.2 +2.6 +3.1 +2.0 +0.3 +2.8",
    ("ACC (%)", "IVON"): "+5.7 -0.4 +0.8 +2.9 +1.5 -0.1 +1.7",
    ("ECE ×100", "IVON@mean"): "-5.3 -5.6 -4.4 -2.3 -7.9 -2.0 -4.6",
    ("ECE ×100", "IVON"): "-11.0 -20.7 -10.9 -3.9 -15.8 -5.0 -11.2",
    ("NLL", "IVON@mean"): "-0.69 -1.74 -0.83 +0.40 -0.88 -0.08 -0.64",
    ("NLL", "IVON"): "-1.94 -2.71 -1.12 +0.13 -1.00 -0.11 -1.13",
}
BOLD = {  # the paper's Table 2, by task: ACC, ECE, NLL
    "winogrande_s": ("0.5", "1.5", "1.5"),
    "arc_challenge": ("0.25", "1.25", "1 (IVON)"),
    "arc_easy": ("0 (IVON@mean)", "1 (IVON)", "1 (IVON)"),
    "winogrande_m": ("0.5", "1.5", "1.5"),
    "openbookqa": ("0 (IVON@mean) 0.25", "1 (IVON)", "1 (IVON)"),
    "boolq": ("0.25", "1.25", "0.75 1 (IVON)"),
}
LABELS = ["AdamW", "+ MC dropout", "+ LA (KFAC)", "+ LA (diag)", "+ SWA", "+ SWAG", "IVON@mean", "IVON"]


def test_table_1_is_whole_and_its_averages_are_those_of_its_cells():
    table = paper()["table1"]
    assert table.columns == (*TASKS, AVERAGE)
    assert [block.metric.name for block in table.blocks] == ["accuracy", "ece", "nll"]
    for block in table.blocks:
        assert [line.label for line in block.lines] == LABELS
        assert [line.label for line in block.lines if line.starred] == ["AdamW", "+ SWA", "IVON@mean"]
        for line in block.lines:
            mean = sum(line.cells[task].mean for task in TASKS) / len(TASKS)
            # a unit of the last place: averages were rounded once, and their cells each
            assert line.cells[AVERAGE].mean == pytest.approx(mean, abs=10**-block.metric.decimals / block.metric.factor)
            assert all(line.cells[task].stderr is not None for task in TASKS)
            assert line.cells[AVERAGE].stderr is None


def test_changes_are_those_that_the_paper_prints():
    for block in paper()["table1"].blocks:
        for line in block.lines[-2:]:
            found = [block.metric.text(line.cells[column].change, "+") for column in (*TASKS, AVERAGE)]
            assert " ".join(found) == CHANGES[block.title, line.label]
            assert all(block.metric.verdict(cell) == "untested" for cell in line.cells.values())


def test_the_best_of_table_2_are_those_that_the_paper_prints_in_bold():
    table = paper()["table2"]
    for task, of_metric in BOLD.items():
        for block, expected in zip(table.blocks, of_metric):
            assert " ".join(line.label for line in block.lines if line.cells[task].best) == expected


def test_table_1_and_table_2_agree_on_the_mean():
    one, two = paper()["table1"], paper()["table2"]
    for ours, theirs in zip(one.blocks, two.blocks):
        mean = next(line for line in ours.lines if line.label == "IVON@mean")
        assert {task: mean.cells[task].mean for task in TASKS} == {
            task: cell.mean for task, cell in theirs.lines[0].cells.items()
        }


def test_table_3_is_what_the_methods_defaults_are_but_for_what_is_found():
    """And that stands as `PAPER`, of the ARC columns."""
    from varlora.methods import Ivon
    from varlora.methods.ivon import PAPER

    (block,) = paper()["table3"].blocks
    defaults = Ivon(**PAPER)
    for line in block.lines:
        cell = line.cells.get(ALL) or line.cells["arc_easy"]
        assert float(cell.text) == getattr(defaults, line.label)


# --- beside ours


def test_the_papers_lines_stand_below_ours_for_the_tasks_that_both_have():
    ours = table1(rows(evaluated("boolq"), evaluated("arc_easy")), replicates=20)
    both = beside_paper(ours)
    assert both.columns == ("arc_easy", "boolq", AVERAGE)
    for block, alone in zip(both.blocks, ours.blocks):
        assert block.lines[:1] == alone.lines
        assert [line.label for line in block.lines[1:]] == LABELS
        assert {line.section for line in block.lines[1:]} == {"Llama-2-7B (paper)"}
    cells = both.blocks[0].lines[-1].cells
    assert cells[AVERAGE].mean == pytest.approx((0.857 + 0.857) / 2)  # IVON on ARC-E and BoolQ
    assert cells[AVERAGE].stderr == pytest.approx((0.003**2 + 0.002**2) ** 0.5 / 2)
    assert "arXiv:2411.04421" in both.caption


def test_the_papers_average_is_as_printed_over_its_six_tasks_and_absent_over_others():
    six = beside_paper(table1(rows(*(evaluated(task) for task in TASKS)), replicates=20))
    assert six.blocks[0].lines[1].cells[AVERAGE].mean == pytest.approx(0.761)
    other = beside_paper(table1(rows(evaluated("boolq"), evaluated("my_task")), replicates=20))
    assert set(other.blocks[0].lines[1].cells) == {"boolq"}


def test_where_there_is_nothing_to_lay_beside_a_note_says_so():
    tasks = beside_paper(table1(rows(evaluated("my_task")), replicates=20))
    assert [len(block.lines) for block in tasks.blocks] == [1, 1, 1]
    assert tasks.notes == ("The paper has no numbers for these tasks.",)
    metrics = beside_paper(beyond(rows(evaluated()), replicates=20))
    assert metrics.notes == ("The paper has no numbers for these metrics.",)


def test_tables_2_and_3_stand_beside_the_papers():
    two = beside_paper(table2([evaluated(method="ivon", noise=1.0)]))
    assert [line.label for line in two.blocks[0].lines] == [
        *("0 (IVON@mean)", "1 (IVON)"),
        *("0 (IVON@mean)", "0.25", "0.5", "0.75", "1 (IVON)", "1.25", "1.5"),
    ]
    settings = {"lr": 0.03, "ess": 1e6}
    one_task, two_tasks, foreign = (
        beside_paper(table3(settings_of([evaluated(task, "ivon", method_settings=settings) for task in tasks])))
        for tasks in (["boolq"], ["boolq", "arc_easy"], ["boolq", "my_task"])
    )

    def theirs(table, label):
        (line,) = [line for line in table.blocks[0].lines if line.section and line.label == label]
        return {column: cell.text for column, cell in line.cells.items()}

    assert theirs(one_task, "lr") == {"boolq": "0.03"}
    assert theirs(two_tasks, "lr") == {ALL: "0.03"}
    assert theirs(two_tasks, "ess") == {"arc_easy": "1e6", "boolq": "1e7"}
    assert theirs(foreign, "lr") == {"boolq": "0.03"}
