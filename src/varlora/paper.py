"""The paper's own numbers, from `paper.json`, and how they are laid beside ours."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from varlora.table import ALL, AVERAGE, PAPER_METRICS, TASKS, Block, Cell, Line, Metric, ResultTable
from varlora.tables import average, setting_text, with_best

__all__ = ["beside_paper", "paper"]

BASELINE = "AdamW*"


def paper() -> dict[str, ResultTable]:
    """Return the paper's `table1`, `table2` and `table3`; changes are between its printed numbers, without interval.

    Example:
        >>> accuracy = paper()["table1"].blocks[0]
        >>> accuracy.lines[0].label, accuracy.lines[0].starred, round(accuracy.lines[0].cells["boolq"].mean, 3)
        ('AdamW', True, 0.858)
        >>> round(accuracy.lines[-1].cells["Average"].change, 3)
        0.017

    References:
        Cong et al. 2024, Variational Low-Rank Adaptation Using IVON (arXiv:2411.04421), Tables 1, 2 and 3.
    """
    data = _data()
    one = [Block(metric.title, _lines(data["table1"][metric.name], metric), metric) for metric in PAPER_METRICS]
    two = [
        Block(metric.title, with_best(_lines(data["table2"][metric.name], metric), metric), metric)
        for metric in PAPER_METRICS
    ]
    three = [
        Block(method, tuple(_settings_line(name, value) for name, value in settings.items()))
        for method, settings in data["table3"].items()
    ]

    def table(name: str, title: str, head: str, blocks: Sequence[Block], *last: str) -> ResultTable:
        return ResultTable(name, title, _source(), head, (*TASKS, *last), tuple(blocks))

    return {
        "table1": table("table1", "Accuracy and calibration by method and task", "Method", one, AVERAGE),
        "table2": table("table2", "IVON with its variance scaled by τ", "τ", two),
        "table3": table("table3", "IVON's hyperparameters", "Setting", three, ALL),
    }


def beside_paper(table: ResultTable) -> ResultTable:
    """Add the paper's lines below ours, for the tasks that both have; an average only if it is over the same tasks.

    Args:
        table: what `table1`, `table2`, `table3` or `beyond` returned.

    Returns:
        The table, with a note instead where the paper has nothing to lay beside it.
    """
    theirs = paper().get(table.name)
    tasks = [column for column in table.columns if column in TASKS]
    if theirs is None or not tasks:
        what = "these tasks" if theirs else "these metrics"
        return replace(table, notes=(*table.notes, f"The paper has no numbers for {what}."))
    lines = {block.title: block.lines for block in theirs.blocks}
    section = f"{_data()['model']} (paper)"

    def with_theirs(block: Block) -> Block:
        added = [
            replace(line, cells=_matched(line.cells, table.columns, tasks), section=section)
            for line in lines.get(block.title, ())
        ]
        return replace(block, lines=(*block.lines, *added))

    return replace(table, blocks=tuple(map(with_theirs, table.blocks)), caption=f"{table.caption} {_source()}")


def _matched(theirs: Mapping[str, Cell], columns: Sequence[str], tasks: Sequence[str]) -> dict[str, Cell]:
    """Return the paper's cells in the columns of another table; `tasks` are those that both have."""
    all_ours = len(tasks) == len([column for column in columns if column not in (AVERAGE, ALL)])
    if ALL in theirs:
        return {ALL: theirs[ALL]} if ALL in columns and all_ours else dict.fromkeys(tasks, theirs[ALL])
    cells = {task: theirs[task] for task in tasks}
    if AVERAGE in columns and all_ours:
        cells[AVERAGE] = theirs[AVERAGE] if len(tasks) == len(TASKS) else average(list(cells.values()))
    return cells


@functools.cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(resources.files("varlora").joinpath("paper.json").read_text(encoding="utf-8"))
    return data


def _source() -> str:
    data = _data()
    source = data["source"]
    return f"{data['model']} (paper): {source['citation']} (arXiv:{source['arxiv']}), {data['seeds']} seeds."


def _lines(numbers: Mapping[str, Mapping[str, Sequence[Any]]], metric: Metric) -> tuple[Line, ...]:
    """Return a block's lines; numbers are in the paper's units, cells in ours."""
    base = numbers.get(BASELINE, {})

    def cell(label: str, column: str, mean: float, stderr: float | None) -> Cell:
        return Cell(
            mean=mean / metric.factor,
            stderr=None if stderr is None else stderr / metric.factor,
            change=(mean - base[column][0]) / metric.factor if base and label != BASELINE else None,
            seeds=_data()["seeds"],
        )

    return tuple(
        Line(
            label.removesuffix("*"),
            {
                AVERAGE if column == "average" else column: cell(label, column, *pair)
                for column, pair in of_task.items()
            },
            starred=label.endswith("*"),
        )
        for label, of_task in numbers.items()
    )


def _settings_line(name: str, value: Any) -> Line:
    of_column = value if isinstance(value, dict) else {ALL: value}
    return Line(name, {column: Cell(text=setting_text(each)) for column, each in of_column.items()})
