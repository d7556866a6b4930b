"""The table in docs/works_everywhere.md is that of the suite: a test for each cell, a cell for each test."""

from __future__ import annotations

from pathlib import Path

from everywhere import test_cells
from everywhere.cells import COLUMNS
from everywhere.rows import ROWS
from everywhere.table import BEGIN, END, FAILS, OPEN, WORKS, Cell, read, render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "works_everywhere.md"


def of_the_suite() -> dict[tuple[str, str], Cell]:
    """Return the cells as the tests' marks promise them, where there is no GPU."""
    cells: dict[tuple[str, str], Cell] = {}
    for test in vars(test_cells).values():
        marks = {mark.name: mark for mark in getattr(test, "pytestmark", ())}
        if "column" not in marks:
            continue
        name, gpu = marks["column"].args
        rows = next(mark.args[1] for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == "row")
        for parameter in rows:
            cell = cells.setdefault((parameter.values[0].name, name), Cell())
            cell.add("open" if gpu else "passed", gpu)
    return cells


def test_every_cell_of_the_table_has_its_test_and_every_test_its_cell() -> None:
    page, suite = read(PAGE.read_text(encoding="utf-8")), of_the_suite()
    written = {key: (sign, sorted(notes)) for key, (sign, notes) in page.items()}
    assert {key: (cell.sign, sorted(cell.notes)) for key, cell in suite.items()} == written, "run `make works`"
    assert suite.keys() == {(row.name, name) for row in ROWS for name in COLUMNS}


def test_what_is_written_can_be_read() -> None:
    cells = {(row.name, name): Cell(passed=True) for row in ROWS for name in COLUMNS}
    cells[ROWS[1].name, COLUMNS[0]] = Cell(failed=True, passed=True, notes=["one thing"])
    cells[ROWS[2].name, COLUMNS[3]] = Cell(notes=["another", "one thing"])
    made = render(cells, {name: ["What."] for name in COLUMNS})
    found = read(f"before | 1. no |\n{BEGIN}\n\n{made}\n\n{END}\n1. nor this\n")
    assert found == {key: (cell.sign, cell.notes) for key, cell in cells.items()}
    assert [found[key][0] for key in list(found)[:2]] == [WORKS, WORKS]
    assert found[ROWS[1].name, COLUMNS[0]][0] == FAILS
    assert found[ROWS[2].name, COLUMNS[3]][0] == OPEN
