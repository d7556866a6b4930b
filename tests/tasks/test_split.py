"""The split into training and calibration rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from varlora.errors import TaskError
from varlora.tasks import TASKS, Example, load_rows, split_calibration


def rows(count: int) -> list[Example]:
    return [Example(f"q{i}", "", str(i), "", ("A", "B"), i % 2, group=f"g{i // 2}") for i in range(count)]


def test_every_row_is_on_one_side_and_groups_stay_together():
    examples = rows(2000)
    train, calibration = split_calibration(examples, 0.1, seed=3)
    assert sorted(e.id for e in train + calibration) == sorted(e.id for e in examples)
    assert not {e.group for e in train} & {e.group for e in calibration}
    assert len(calibration) == pytest.approx(200, abs=60)  # 3 standard deviations of 2 * Binomial(1000, 0.1): 57


def test_same_seed_same_split_and_another_seed_another():
    examples = rows(200)
    assert split_calibration(examples, 0.3, 1) == split_calibration(examples, 0.3, 1)
    assert split_calibration(examples, 0.3, 1) != split_calibration(examples, 0.3, 2)


def test_a_row_keeps_its_side_when_others_come_or_move():
    examples = rows(200)
    _, few = split_calibration(examples[:100], 0.3, 1)
    _, many = split_calibration(examples[::-1], 0.3, 1)
    assert {e.id for e in few} == {e.id for e in many} & {e.id for e in examples[:100]}


def test_copies_of_a_prompt_stay_together_and_move_no_other_row():
    once = [replace(row, group="") for row in rows(300)]
    copies = [replace(row, id=f"{row.id} again", label=1 - row.label) for row in once[:100]]
    train, calibration = split_calibration([*once, *copies], 0.3, 1)
    assert not {row.prompt for row in train} & {row.prompt for row in calibration}
    assert [row for row in calibration if row in once] == split_calibration(once, 0.3, 1)[1]
    grouped = [replace(row, context="the same") for row in rows(300)]  # which is stronger
    by_group = split_calibration(rows(300), 0.3, 1)
    assert [[row.id for row in side] for side in split_calibration(grouped, 0.3, 1)] == [
        [row.id for row in side] for side in by_group
    ]


def test_no_calibration_rows_asked_for():
    assert split_calibration(rows(4), 0.0, 1) == (rows(4), [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(TaskError, match=r"in \[0, 1\)"):
        split_calibration(rows(10), fraction, 1)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_an_empty_side_is_an_error(fraction):
    with pytest.raises(TaskError, match="rows on both sides"):
        split_calibration(rows(10), fraction, 1)


def test_real_twins_stay_together(shared):
    examples = load_rows(TASKS["winogrande_s"], "train", shared / "data").examples
    train, calibration = split_calibration(examples, 0.2, seed=21)
    assert not {e.id.rsplit("-", 1)[0] for e in train} & {e.id.rsplit("-", 1)[0] for e in calibration}
    assert len(calibration) == pytest.approx(128, abs=45)
