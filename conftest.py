"""The environment of all tests, those in docstrings too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when a kernel is defined, that is at its import
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which accelerate imports, writes to stdout


@pytest.fixture(scope="session")
def example_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train` returned, for the examples that begin with a run."""
    from varlora import Settings, train
    from varlora.demo.base import BUNDLED

    task, base = str(BUNDLED / "tasks" / "two_choices.yaml"), str(BUNDLED / "base")
    run_dir = str(tmp_path_factory.mktemp("example") / "run")
    return train(Settings(task, base, "adamw", steps=1, run_dir=run_dir), say=lambda words: None)


@pytest.fixture(autouse=True)
def names_of_examples(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """Give examples that use them a run, `run_dir`, and a folder to write to, `scratch`."""
    doctest = getattr(request.node, "dtest", None)
    if doctest and any("(run_dir" in line.source or "[run_dir" in line.source for line in doctest.examples):
        run_dir = request.getfixturevalue("example_run")
        doctest_namespace |= {"run_dir": run_dir, "scratch": run_dir.parent}
