"""The table in docs/works_everywhere.md: written from the tests that ran, and read to compare it with the suite."""

from __future__ import annotations

import inspect
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from everywhere.cells import COLUMNS
from everywhere.rows import ROWS

BEGIN, END = "<!-- from here on made by `make works` -->", "<!-- up to here -->"
WORKS, FAILS, OPEN = "✓", "✗", "–"

Key = tuple[str, str]
"""Row and column."""


@dataclass
class Cell:
    """What the tests of a cell have come to."""

    passed: bool = False
    failed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def sign(self) -> str:
        return FAILS if self.failed else WORKS if self.passed else OPEN

    def add(self, outcome: str, note: str | None = None) -> None:
        """Add what a test has come to: passed, failed or anything else, which leaves it open."""
        self.passed |= outcome == "passed"
        self.failed |= outcome == "failed"
        if note and note not in self.notes:
            self.notes.append(note)


def render(cells: Mapping[Key, Cell], columns: Mapping[str, Iterable[str]]) -> str:
    """Return the table, its notes and what each column stands for, as Markdown.

    Args:
        cells: by row and column; all are there.
        columns: what the tests of a column assert.
    """
    numbers: dict[str, int] = {}
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- |" + " :---: |" * len(COLUMNS)]
    for row in ROWS:
        shown = []
        for name in COLUMNS:
            cell = cells[row.name, name]
            marks = [numbers.setdefault(note, len(numbers) + 1) for note in cell.notes]
            shown.append(cell.sign + "".join(f"<sup>{mark}</sup>" for mark in marks))
        lines.append(f"| {row.name} | " + " | ".join(shown) + " |")
    lines += ["", f"{WORKS} tested and works, {FAILS} does not work, {OPEN} not tested here.", ""]
    lines += [f"{number}. {note}" for note, number in numbers.items()]
    packages = ("torch", "transformers", "trl", "accelerate", "lightning")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    lines += ["", f"Python {platform.python_version()}, {versions}; on a CPU.", "", "What is asserted:", ""]
    lines += [f"- **{name}**: {' '.join(columns[name])}" for name in COLUMNS]
    return "\n".join(lines)


def read(page: str) -> dict[Key, tuple[str, list[str]]]:
    """Return the sign and the notes of each cell of a page's table."""
    made = page.partition(BEGIN)[2].partition(END)[0]
    notes = dict(re.findall(r"^(\d+)\. (.*)$", made, re.MULTILINE))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines() if line[:1] == "|"]
    return {
        (row[0], name): (cell[0], [notes[number] for number in re.findall(r"<sup>(\d+)</sup>", cell)])
        for row in lines[2:]
        for name, cell in zip(lines[0][1:], row[1:], strict=True)
    }


def cell_of(item: pytest.Item) -> Key | None:
    """Return the cell that a collected test is of."""
    mark = item.get_closest_marker("column")
    return (item.callspec.params["row"].name, mark.args[0]) if mark else None  # type: ignore[attr-defined]


class TableWriter:
    """Notes what the tests come to and writes the table at the end."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.cells = {(row.name, name): Cell() for row in ROWS for name in COLUMNS}
        self.columns: dict[str, dict[str, None]] = {name: {} for name in COLUMNS}

    def pytest_itemcollected(self, item: Any) -> None:
        if cell := cell_of(item):
            self.columns[cell[1]][" ".join(inspect.getdoc(item.function).split())] = None

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        for item in items:
            if (cell := cell_of(item)) and (note := item.get_closest_marker("column").args[1]):  # type: ignore[union-attr]
                self.cells[cell].add("open", note)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        if (cell := cell_of(item)) and (report.when == "call" or report.outcome != "passed"):
            if report.skipped:
                self.cells[cell].add("open", report.longrepr[2].removeprefix("Skipped: "))
            else:
                self.cells[cell].add(report.outcome)
        return report

    def pytest_sessionfinish(self) -> None:
        if missing := [key for key, cell in self.cells.items() if cell == Cell()]:
            raise pytest.UsageError(f"The table was not written: no test ran of {missing}.")
        before, _, rest = self.page.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        made = render(self.cells, self.columns)
        self.page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")
