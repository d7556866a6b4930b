"""A method's setting that is out of its range is told with what to set in its place."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from helpers import plan

from varlora.methods import METHODS

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("blob", {"prior_std": 0.0}, "Set e.g. `method.prior_std=0.2`."),
    ("ensemble", {"size": 1}, "Set e.g. `method.size=3`."),
    ("ivon", {"noise_warmup": 1.5}, "Leave it out to have it chosen."),
    ("ivon", {"recheck": 1.0}, "Set e.g. `method.recheck=0.0`."),
    ("ivon", {"sigma_by_layer": {"3": -1.0}}, "Leave the layer out for 1."),
    ("laplace_diag", {"prior_precision": 0.0}, "Leave it out to have it chosen."),
    ("laplace_kfac", {"rank": 0}, "Set e.g. `method.rank=10`."),
    ("pruned", {"fraction": math.nan}, "Set e.g. `method.fraction=0.1`."),
    ("swa", {"average_lr": -1.0}, "Leave it out for half of `lr`."),
    ("swa", {"every": 0}, "Set e.g. `method.every=10`."),
    ("swa", {"lr": math.nan}, "Set e.g. `method.lr=5e-05`."),
    ("swa", {"start": 1.0}, "Set e.g. `method.start=0.5`."),
    ("swag", {"rank": 1}, "Set e.g. `method.rank=20`."),
    ("temperature", {"samples": 0}, "Set e.g. `method.samples=10`."),
    ("tfb", {"anchor_rows": 0}, "Set e.g. `method.anchor_rows=500`."),
    ("tfb", {"bound": -1.0}, "Set e.g. `method.bound=0.003`."),
    ("tfb", {"samples": 0}, "Set e.g. `method.samples=10`."),
]


@pytest.mark.parametrize(("name", "settings", "cure"), WRONG)
def test_the_problem_ends_in_a_cure_that_works(name: str, settings: dict[str, Any], cure: str) -> None:
    where = plan(steps=1000, calibration=True)
    (setting,) = settings
    (problem,) = METHODS[name](**settings).problems(where)
    assert re.match(f"Expected `{setting}` to .*, but got ", problem)
    assert problem.endswith(f". {cure}")
    instead = re.search(rf"`method\.{setting}=(.+)`", cure)
    mended = {setting: json.loads(instead[1])} if instead else {}
    assert METHODS[name](**mended).problems(where) == []
