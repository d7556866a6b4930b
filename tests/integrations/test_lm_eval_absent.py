"""Without lm-eval the module can be imported, and says how to install it where it is needed."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from varlora.errors import VarloraError
from varlora.integrations import lm_eval


@pytest.fixture
def without(monkeypatch):
    """The module as it is where nothing of lm-eval can be imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    spec = importlib.util.spec_from_file_location("lm_eval_without", lm_eval.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_class_says_what_is_missing_before_it_looks_at_the_run(without, tmp_path):
    with pytest.raises(VarloraError, match=r"needs lm-eval.*pip install varlora\[lm-eval\]"):
        without.VarloraLM(tmp_path / "nowhere", samples=-1)


def test_the_command_line_says_what_is_missing(without):
    with pytest.raises(SystemExit, match=r"pip install varlora\[lm-eval\]"):
        without.main(["ls", "tasks"])
