"""Every test trains on one thread and finds no state of accelerate's; `--works-table` writes the table of the docs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from everywhere.table import TableWriter
from helpers import trainers_afresh


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--works-table", type=Path, metavar="PAGE", help="write the table of what works into this page")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "column(name, gpu): the test is of this column of docs/works_everywhere.md")
    if page := config.getoption("--works-table", None):
        config.pluginmanager.register(TableWriter(page))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with trainers_afresh():
        yield
