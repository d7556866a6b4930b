"""What makes a test a column of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from everywhere.rows import ROWS

COLUMNS = (
    "float32",
    "bfloat16 autocast",
    "bfloat16 weights",
    "float16, GradScaler",
    "gradient accumulation",
    "gradient clipping",
    "gradient checkpointing",
    "several samples",
    "learning-rate schedule",
    "EMA of the mean",
    "checkpoint and resume",
    "no gradient",
    "model moved",
    "two devices",
)
ON_A_GPU = (
    "the other device is one that the tests make, on the CPU's memory; with a GPU it is tested by `make test-gpu`, not "
    "run for this table"
)


def column(name: str, gpu: str | None = None) -> Callable[[Any], Any]:
    """Make a test, which takes a `row`, one of a column: a cell is ticked if all of the column's tests pass on its row.

    Args:
        name: one of COLUMNS.
        gpu: the test needs a GPU; the note of the cell where there is none.
    """
    assert name in COLUMNS
    rows = [pytest.param(row, id=row.name.replace("`", "")) for row in ROWS]

    def decorate(test: Any) -> Any:
        test = pytest.mark.column(name, gpu)(pytest.mark.parametrize("row", rows)(test))
        if gpu:
            test = pytest.mark.skipif(not torch.cuda.is_available(), reason=gpu)(pytest.mark.gpu(test))
        return test

    return decorate
