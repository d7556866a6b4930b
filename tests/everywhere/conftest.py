"""Every test trains on one thread and finds no state of accelerate's; `--works-table` writes the table of the docs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from everywhere.table import TableWriter

from varlora.demo.run import one_thread


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--works-table", type=Path, metavar="PAGE", help="write the table of what works into this page")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "column(name, gpu): the test is of this column of docs/works_everywhere.md")
    if page := config.getoption("--works-table", None):
        config.pluginmanager.register(TableWriter(page))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with one_thread():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
